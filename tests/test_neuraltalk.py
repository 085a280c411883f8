"""The captioner: training and decoding compute the same, and neither padding nor neighbours matter."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hlstm_src.neuraltalk import IGNORE, NeuralTalk, caption_loss, collate

V, D = 11, 6
CELLS = {"lstm x1": {}, "lstm x3": {"layers": 3}, "gru x2": {"cell": "gru", "layers": 2}, "hlstm": {"cell": "hlstm"},
         "hlstm tanh": {"cell": "hlstm", "layers": 2, "activation": "tanh", "gate_width": 5}}
CAPTIONS = [[3, 1, 4], [1], [5, 9, 2, 6, 5]]


def features(count=3):
    return torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=CELLS, scope="module")
def model(request):
    """A captioner that has learnt three captions by heart."""
    torch.manual_seed(0)
    made = NeuralTalk(V, D, hidden=7, embedding=8, dropout=0, **CELLS[request.param]).double()
    adam, (inputs, targets) = torch.optim.Adam(made.parameters(), 0.03), collate(CAPTIONS)
    for _ in range(120):
        adam.zero_grad()
        caption_loss(made(features(), inputs), targets).backward()
        adam.step()
    return made.eval()


def test_collate_reads_the_words_behind_a_mark_and_says_them_before_one():
    inputs, targets = collate([[3, 4], [5], []])
    assert inputs.tolist() == [[0, 3, 4], [0, 5, 0], [0, 0, 0]]
    assert targets.tolist() == [[3, 4, 0], [5, 0, IGNORE], [0, IGNORE, IGNORE]]


def test_steps_say_what_the_whole_caption_says(model):
    inputs, _ = collate(CAPTIONS)
    whole = model(features(), inputs).log_softmax(-1)
    state = model.start(features())
    assert whole.shape == (3, 6, V)
    for t in range(inputs.shape[1]):
        log_probs, state = model.step(inputs[:, t], state)
        torch.testing.assert_close(log_probs, whole[:, t])


def test_padding_and_neighbours_change_neither_loss_nor_gradient(model):
    words = sum(len(c) + 1 for c in CAPTIONS)
    inputs, targets = collate(CAPTIONS)
    loss = caption_loss(model(features(), inputs), targets)
    together = torch.autograd.grad(loss, list(model.parameters()))
    alone = 0
    for k, caption in enumerate(CAPTIONS):
        one, wanted = collate([caption])
        alone = alone + caption_loss(model(features()[k:k + 1], one), wanted) * (len(caption) + 1) / words
    torch.testing.assert_close(loss, alone)
    for a, b in zip(together, torch.autograd.grad(alone, list(model.parameters()))):
        torch.testing.assert_close(a, b)
    garbage = torch.where(targets == IGNORE, 10, inputs)           # behind the end, but never in its place
    garbage[:, 0] = 0
    torch.testing.assert_close(caption_loss(model(features(), garbage), targets), loss)


def test_the_loss_is_the_mean_surprise_at_words_and_end_marks(model):
    inputs, targets = collate(CAPTIONS)
    logits = model(features(), inputs)
    said = [-logits[k, t].log_softmax(-1)[w] for k, c in enumerate(CAPTIONS) for t, w in enumerate([*c, 0])]
    torch.testing.assert_close(caption_loss(logits, targets), torch.stack(said).mean())
    uniform = torch.zeros(3, 6, V)
    assert caption_loss(uniform, targets).item() == pytest.approx(math.log(V), rel=1e-6)


def test_an_lstm_captioner_is_torchs_lstm_between_its_own_ends():
    torch.manual_seed(0)
    model = NeuralTalk(V, D, layers=2, hidden=7, embedding=8).eval()
    theirs = nn.LSTM(8, 7, 2)
    theirs.load_state_dict(model.rnn.state_dict())
    x, (inputs, _) = torch.randn(3, D), collate(CAPTIONS)
    model.norm.running_mean += 0.5
    steps = torch.cat([F.linear((x - 0.5) / (1 + 1e-5) ** 0.5, model.picture.weight, model.picture.bias)[:, None],
                       model.words.weight[inputs]], 1)
    expected = theirs(steps.transpose(0, 1))[0][1:].transpose(0, 1) @ model.output.weight.T + model.output.bias
    torch.testing.assert_close(model(x, inputs), expected)


@pytest.mark.parametrize("beam", [1, 2, 3, 5])
def test_captions_are_the_same_in_any_company_and_whatever_the_mode(model, beam):
    x = torch.cat([features(), features() + 0.3 * features().flip(0)])
    together = model.caption(x, beam, longest=9)
    assert together[:3] == CAPTIONS
    model.train()
    assert together == [model.caption(x[k:k + 1], beam, longest=9)[0] for k in range(6)]
    assert not model.training


def test_a_wider_beam_finds_likelier_captions(model):
    x = features(6)

    def surprise(beam):
        found = model.caption(x, beam, longest=4)
        total = 0.0
        for k, caption in enumerate(found):
            inputs, targets = collate([caption])
            targets = targets[:, :4]                               # at full length the end mark is free
            total += caption_loss(model(x[k:k + 1], inputs)[:, :4], targets).item() * targets.numel()
        return total
    assert surprise(V ** 3) <= surprise(1) + 1e-9


def test_dropout_acts_in_training_at_the_input_and_at_the_output():
    torch.manual_seed(0)
    model = NeuralTalk(V, D, hidden=7, embedding=8, dropout=0.5).train()
    x, (inputs, _) = torch.randn(3, D), collate(CAPTIONS)
    seen = {}
    model.rnn.register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out[0]))
    model.output.register_forward_pre_hook(lambda m, args: seen.update(read=args[0]))
    model(x, inputs)
    assert 0.3 < (seen["x"] == 0).float().mean() < 0.7
    assert 0.3 < (seen["read"] == 0).float().mean() < 0.7
    torch.testing.assert_close(seen["read"][seen["read"] != 0], 2 * seen["y"][1:][seen["read"] != 0])
    model.eval()(x, inputs)
    assert (seen["x"] != 0).all() and (seen["read"] != 0).all()


def test_pixels_go_through_an_encoder_that_learns_along():
    torch.manual_seed(0)
    model = NeuralTalk(V, D, hidden=7, embedding=8, encoder="tiny")
    inputs, targets = collate(CAPTIONS)
    caption_loss(model(torch.rand(3, 3, 64, 64), inputs), targets).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.encoder.parameters())
    assert len(model.caption(torch.rand(2, 3, 64, 64))) == 2


@pytest.mark.parametrize("options", [*CELLS.values(), {"cell": "hlstm", "gate_layers": 2, "gate_width": 5}])
def test_the_gate_that_keeps_the_state_begins_open(options, monkeypatch):
    kept = {}
    for opened in (True, False):
        if not opened:
            monkeypatch.setattr(NeuralTalk, "_remember", lambda self: None)
        torch.manual_seed(0)
        model = NeuralTalk(V, D, hidden=50, embedding=8, **options).eval()
        a, b = (model.start(s * 5 * torch.ones(1, D)) for s in (1, -1))
        with torch.no_grad():
            for _ in range(5):
                _, a = model.step(torch.tensor([1]), a)
                _, b = model.step(torch.tensor([1]), b)
            kept[opened] = sum((s - z)[0].abs().sum().item() for s, z in zip(a, b))    # h and c of the first layer
    assert kept[True] > 1.5 * kept[False]


def test_what_all_features_have_in_common_is_taken_away_and_a_single_picture_trains():
    torch.manual_seed(0)
    model = NeuralTalk(V, D, hidden=7, embedding=8).train()
    x = 100 + torch.randn(64, D)
    for _ in range(100):
        model.embed(x)
    spread = model.eval().embed(x) - model.picture.bias
    assert spread.mean(0).abs().max() < 0.05 and spread.std(0).min() > 0.1
    inputs, targets = collate(CAPTIONS[:1])
    assert caption_loss(model.train()(x[:1], inputs), targets).isfinite()
    assert model.train()(x, inputs.expand(64, -1)).isfinite().all() and model.norm.training


@pytest.mark.parametrize("options", [{"cell": "rnn"}, {"encoder": "vgg61"}])
def test_unknown_parts_are_refused(options):
    with pytest.raises(ValueError, match="choose"):
        NeuralTalk(V, D, **options)
