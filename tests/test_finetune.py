"""Training on with the encoder: it moves, connections stay, a stored model says the same, a kill changes nothing."""

import os
import signal

import pytest
import torch

from data_prep.features import store_features
from hlstm_src import experiments, packed, records
from hlstm_src.compact.pack import pack
from hlstm_src.compact.runtime import load_compact
from hlstm_src.corpora import CaptionCorpus, CorpusError
from hlstm_src.encoders import Pretrained, learner, load_encoder
from hlstm_src.neuraltalk import NeuralTalk
from hlstm_src.tasks import CaptionTask
from hlstm_src.training import Interrupted, Trainer
from tests.captions import make_corpus, trained

pytest.importorskip("efficientnet_lite_pytorch")
CPU, NAME, ENCODER = torch.device("cpu"), "nt-hlstm1-compact-tuned", "efficientnet_lite0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_corpus(tmp_path_factory.mktemp("finetune") / "squares", {"train": 4, "valid": 2, "test": 2})
    store_features(CaptionCorpus(folder), load_encoder(ENCODER), say=lambda line: None)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, folder):
    with trained(tmp_path_factory.mktemp("made") / "results", (NAME,), corpus=str(folder), encoder=ENCODER, batch=10,
                 limit=None, rounds=2, epochs=5, finetune_epochs=2, finetune_lr=1e-3) as results:
        yield results


@pytest.fixture
def record(made):
    return records.read(records.path_of(NAME, "smoke", 0))


def file_of(record):
    return records.path_of(record.experiment, "smoke", record.seed).with_suffix(".safetensors")


def test_the_encoder_learns_and_the_connections_stay(record):
    assert [row.phase for row in record.history][-3:] == ["prune", "finetune", "finetune"]
    assert [row.epoch for row in record.history] == list(range(len(record.history)))
    assert {row.lr for row in record.history[-2:]} == {1e-3}
    assert len({row.density for row in record.history[-3:]}) == 1
    model, masks, about = experiments.load(file_of(record))
    before = dict(load_encoder(ENCODER).network.named_parameters())
    after = dict(model.encoder.network.named_parameters())
    moved = [name for name, p in after.items() if not p.equal(before[name])]
    assert len(moved) > 0.9 * len(after) > 100 and about["encoder"] == about["model"]["encoder"] == ENCODER
    parameters = dict(model.named_parameters())
    assert masks and all((parameters[name][~mask] == 0).all() for name, mask in masks.items())
    assert record.counts.cell.nonzero_params == sum(int(m.sum()) for m in masks.values())


def test_a_stored_model_reads_the_pictures_and_scores_what_the_record_says(record, folder):
    corpus = experiments.open_corpus(file_of(record), folder)
    scores, said = experiments.evaluate(file_of(record), corpus)
    assert corpus.pixels and scores == record.scores
    assert said == [sample["hypothesis"] for sample in record.samples]


def test_the_engine_says_the_same_of_a_picture_with_the_encoder_in_its_file(record, folder, tmp_path):
    file = tmp_path / "tuned.safetensors"
    pack(file_of(record), file, values="fp32")
    fast, corpus = load_compact(file), experiments.open_corpus(file_of(record), folder)
    model, _, about = experiments.load(file_of(record))
    for picture in corpus.pictures:
        feature = model.encode(corpus.features([picture]))
        torch.testing.assert_close(torch.from_numpy(fast.tuned(corpus.image(picture)))[None], feature.detach())
        said = [about["vocabulary"][k - 1] for k in model.caption(feature, 1, about["longest"])[0]]
        assert fast.caption(picture.path, beam=1) == " ".join(said)
    # A score on the engine is that of the encoder which learnt, not of the features that were stored before.
    _, found, heard = packed.evaluate(file, folder)
    assert heard == [sample["hypothesis"] for sample in record.samples] and found["cider"] == record.scores["cider"]
    picture = corpus.split("test")[0].path                         # the training file itself opens, too
    assert load_compact(file_of(record)).caption(picture, beam=1) == heard[0]


@pytest.mark.parametrize("stop", [("dense", 1), ("finetune", 1)])
def test_a_run_stopped_anywhere_ends_with_the_same_bits(made, record, monkeypatch, stop, tmp_path):
    monkeypatch.setenv("HLSTM_RESULTS", str(tmp_path))
    step = Trainer._step

    def stopping(self, *args):
        value = step(self, *args)
        if (self.schedule.phase == "finetune") == (stop[0] == "finetune") and self.step == stop[1]:
            os.kill(os.getpid(), signal.SIGINT)
        return value
    monkeypatch.setattr(Trainer, "_step", stopping)
    with pytest.raises(Interrupted):
        experiments.run(NAME, "smoke", progress=False)
    monkeypatch.setattr(Trainer, "_step", step)
    again = experiments.run(NAME, "smoke", progress=False)
    assert not list(tmp_path.rglob("*checkpoint"))
    assert again.model.sha256 == record.model.sha256 and len(again.history) == len(record.history)


def test_each_caption_comes_once_with_the_others_of_its_picture(folder):
    task = CaptionTask(CaptionCorpus(folder, ENCODER, pixels=True), batch=10, seed=1)
    batches = task.batches(0)
    assert sorted(k for batch in batches for k in batch) == list(range(20)) and len(batches) == 2
    assert all(len({task.pairs[k][0] for k in batch}) == 2 for batch in batches)
    assert batches == task.batches(0) and batches != task.batches(1)


def test_pictures_shared_by_captions_are_seen_once_and_count_for_each(folder):
    corpus = CaptionCorpus(folder, ENCODER, pixels=True)
    task = CaptionTask(corpus, batch=10)
    torch.manual_seed(0)
    model = NeuralTalk(len(corpus.vocabulary), 1280, hidden=8, embedding=8, encoder=ENCODER).eval()
    seen = []
    model.encoder.register_forward_hook(lambda module, x, y: seen.append(len(x[0])))
    batch = task.batches(0)[0]
    together = task.loss(model, batch, CPU)
    assert seen == [2]
    stored = CaptionTask(CaptionCorpus(folder, ENCODER), batch=10)
    assert together.item() == pytest.approx(stored.loss(model, batch, CPU).item(), rel=1e-3)    # a store rounds


def test_an_encoder_that_came_trained_keeps_its_means(folder):
    encoder = learner(ENCODER, 1280)
    assert isinstance(encoder, Pretrained) and not encoder.train().training
    before = {name: b.clone() for name, b in encoder.named_buffers()}
    model = NeuralTalk(5, 1280, hidden=4, embedding=4, encoder=ENCODER).train()
    model(torch.randn(2, 3, 224, 224), torch.zeros(2, 2, dtype=torch.long)).sum().backward()
    assert all(b.equal(before[name]) for name, b in model.encoder.named_buffers())
    assert not any(m.training for m in model.encoder.modules())
    assert all(p.grad is not None and p.grad.any() for p in model.encoder.parameters())


def test_features_of_other_weights_are_refused(made, folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HLSTM_RESULTS", str(tmp_path))
    monkeypatch.setattr(Pretrained, "__init__", lambda self, *args: super(Pretrained, self).__init__() or setattr(
        self, "weights_sha256", "0" * 64))
    with pytest.raises(CorpusError, match="squares: its features were made with other weights of efficientnet_lite0"):
        experiments.run(NAME, "smoke", progress=False)
