"""Speech as a training task: repeatable batches and augmentation, transcripts in the order asked for."""

import pytest
import torch

from hlstm_src import corpora, tasks
from hlstm_src.audio import ALPHABET
from hlstm_src.corpora import SpeechCorpus, length_batches
from hlstm_src.deepspeech2 import DeepSpeech2, ctc_loss, disagreement, spectrogram
from hlstm_src.scores import error_rates, greedy
from hlstm_src.tasks import SPEEDS, SpeechTask, _played
from tests.speech import SIZES, make_corpus

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return SpeechCorpus(make_corpus(tmp_path_factory.mktemp("tones")))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = DeepSpeech2(len(ALPHABET), "lstm", 1, 8, 2)
    model.output.weight.data *= 20                                 # so that it hears something
    return model


def test_the_batches_of_an_epoch_depend_on_seed_and_epoch_alone(corpus):
    task = SpeechTask(corpus, batch=5, seed=1)
    torch.manual_seed(0)
    first = task.batches(0)
    torch.manual_seed(7)
    assert first == SpeechTask(corpus, batch=5, seed=1).batches(0)
    assert sorted(k for batch in first for k in batch) == list(range(SIZES["train"]))
    assert len({str(batches) for batches in (first, task.batches(1), SpeechTask(corpus, batch=5).batches(0))}) == 3


def test_the_first_epochs_may_go_from_short_to_long(corpus):
    task, usual = SpeechTask(corpus, batch=3, ordered=2), SpeechTask(corpus, batch=3)
    for epoch in (0, 1):
        longest = [max(task.train[k].seconds for k in batch) for batch in task.batches(epoch)]
        assert longest == sorted(longest) and len(set(longest)) > 1
        assert sorted(task.batches(epoch)) == sorted(usual.batches(epoch))
        assert task.batches(epoch) != usual.batches(epoch)
    assert task.batches(2) == usual.batches(2)


def test_the_loss_without_augmentation_is_that_of_the_plain_batch(corpus, model):
    task = SpeechTask(corpus, augment=False)
    chosen = [task.train[k] for k in (3, 0, 7)]
    batch = corpora.collate([corpus.audio(u) for u in chosen], [u.transcript for u in chosen])
    expected = ctc_loss(*model(*spectrogram(batch.waves, batch.lengths)), batch.targets, batch.target_lengths)
    assert task.loss(model, [3, 0, 7], CPU).item() == pytest.approx(expected.item(), abs=1e-6)


def test_augmentation_follows_the_global_seed(corpus, model):
    task, losses = SpeechTask(corpus), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(task.loss(model, [0, 1, 2], CPU).item())
    assert losses[0] == losses[1] != losses[2]
    plain = SpeechTask(corpus, augment=False).loss(model, [0, 1, 2], CPU).item()
    assert plain not in losses


def test_more_is_blanked_from_the_chosen_epoch_on(corpus):
    def blanked(task, epoch):
        """Share of the entries that are zero in all training spectrograms of an epoch; sound itself has none."""
        torch.manual_seed(0)
        zeros = sounds = 0
        for indices in task.batches(epoch):
            spec, lengths, _ = task.sounds(indices, CPU)
            zeros += sum(int((own[:, :n] == 0).sum()) for own, n in zip(spec, lengths))
            sounds += spec.shape[1] * int(lengths.sum())
        return zeros / sounds
    usual, later = SpeechTask(corpus, batch=4), SpeechTask(corpus, batch=4, harder=2)
    assert [blanked(later, k) for k in (0, 1)] == [blanked(usual, k) for k in (0, 1)]
    assert blanked(later, 2) > 1.5 * blanked(usual, 2) > 0
    assert blanked(later, 3) > 1.5 * blanked(usual, 3) and blanked(later, 1) == blanked(usual, 1)    # back again, too


def test_each_utterance_is_heard_twice_from_the_chosen_epoch_on(corpus, model):
    usual, twice = (SpeechTask(corpus, batch=4, harder=2, agree=agree) for agree in (0.0, 0.2))
    for epoch in (0, 1, 2, 3, 1):                                  # and back again
        pairs, every = epoch >= 2, twice.batches(epoch)
        assert sorted(k for batch in every for k in batch) == list(range(len(twice.train)))
        assert max(map(len, every)) == (2 if pairs else 4)
        if not pairs:
            assert every == usual.batches(epoch)
        torch.manual_seed(epoch)
        spec, lengths, batch = twice.sounds(every[0], CPU)
        said, n = [twice.train[k].transcript for k in every[0]], len(every[0])
        assert len(spec) == len(lengths) == (2 * n if pairs else n)
        assert batch.target_lengths.tolist() == [len(text) for text in said] * (2 if pairs else 1)
        assert batch.targets.equal(corpora.collate([torch.zeros(1)] * n, said).targets.repeat(2 if pairs else 1))
        if pairs:                                                  # one sound, blanked in other places
            one, other = spec[:n], spec[n:]
            heard = (one != 0) & (other != 0)
            assert one[heard].equal(other[heard]) and not one.equal(other) and heard.any()
            assert lengths[:n].equal(lengths[n:]) and batch.waves[:n].equal(batch.waves[n:])


def test_the_loss_of_two_hearings_is_that_of_both_and_so_much_of_what_they_differ_by(corpus, model):
    losses = {}
    model.eval()                                                   # each hearing alone is as it is among others
    for agree in (1e-9, 0.2, 0.5):
        task = SpeechTask(corpus, batch=4, harder=1, agree=agree)
        indices = task.batches(1)[0]
        torch.manual_seed(0)
        losses[agree] = task.loss(model, indices, CPU).item()
    torch.manual_seed(0)
    spec, lengths, batch = task.sounds(indices, CPU)
    log_probs, frames = model(spec, lengths)
    apart = disagreement(log_probs, frames, batch.target_lengths).item()
    assert apart > 0 and losses[1e-9] == pytest.approx(
        ctc_loss(log_probs, frames, batch.targets, batch.target_lengths).item(), rel=1e-5)
    assert losses[0.2] - losses[1e-9] == pytest.approx(0.2 * apart, rel=1e-3)
    assert losses[0.5] - losses[1e-9] == pytest.approx(0.5 * apart, rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"harder": 1, "augment": False}])
def test_two_hearings_that_cannot_differ_are_refused(corpus, options):
    with pytest.raises(ValueError, match="agree 0.2: two hearings differ only from epoch `harder` on"):
        SpeechTask(corpus, agree=0.2, **options)


@pytest.mark.parametrize("agree", [-0.2, float("nan")])
def test_hearings_cannot_be_asked_to_differ(corpus, agree):
    with pytest.raises(ValueError, match="agree .* must be at least 0"):
        SpeechTask(corpus, agree=agree, harder=1)


@pytest.mark.parametrize("speed", SPEEDS)
def test_a_tone_played_at_another_speed_has_another_length_and_pitch(speed):
    t = torch.arange(16_000) / 16_000
    played = _played(torch.sin(2 * torch.pi * 440 * t), speed)
    assert len(played) == int(16_000 / speed)
    loudest = torch.fft.rfft(played).abs().argmax() * 16_000 / len(played)
    assert loudest.item() == pytest.approx(440 * speed, abs=1)


def test_transcripts_come_in_the_order_asked_for_whatever_the_batches(corpus, model):
    utterances = corpus.split("test", "train")[::-1]
    model.eval()
    with torch.no_grad():
        sounds = [corpus.audio(u) for u in utterances]
        alone = [greedy(*model(*spectrogram(w[None], torch.tensor([len(w)]))))[0] for w in sounds]
    assert len(set(alone)) > 3
    for batch in (1, 4, 100):
        model.train()
        assert SpeechTask(corpus, batch=batch).transcribe(model, utterances, CPU) == alone
        assert not model.training


def test_validation_scores_are_error_rates_on_the_validation_set(corpus, model):
    task = SpeechTask(corpus, limit=3)
    rates = error_rates([u.transcript for u in corpus.split("valid")[:3]],
                        task.transcribe(model, corpus.split("valid")[:3], CPU))
    assert task.evaluate(model, CPU) == {"wer": rates["wer"], "cer": rates["cer"]}
    assert len(task.train) == len(task.valid) == 3


def test_everything_is_all_but_the_test_set(corpus, model):
    task = SpeechTask(corpus, everything=True)
    read = {task.train[k].id for batch in task.batches(0) for k in batch}
    assert read == {u.id for u in corpus.split("train", "valid")}
    assert not read & {u.id for u in corpus.split("test")} and len(task.train) == len(read)
    usual = SpeechTask(corpus).evaluate(model, CPU)
    assert task.evaluate(model, CPU) == {f"{name}_learned": rate for name, rate in usual.items()}


def test_a_sound_is_read_once(tmp_path):
    corpus = SpeechCorpus(make_corpus(tmp_path, {"train": 1, "valid": 1, "test": 1}))
    task = SpeechTask(corpus)
    first = task.wave(task.train[0])
    task.train[0].path.unlink()
    assert task.wave(task.train[0]) is first


def test_each_utterance_is_played_at_a_speed_of_its_own(corpus, monkeypatch):
    played = []
    monkeypatch.setattr(tasks, "_played", lambda wave, speed: played.append(speed) or wave)
    torch.manual_seed(0)
    SpeechTask(corpus).sounds(list(range(12)), CPU)
    assert len(played) == 12 and set(played) == set(SPEEDS)


def test_sounds_are_blanked_in_time_and_in_frequency(corpus):
    task, rows, columns = SpeechTask(corpus, batch=4), 0, 0
    torch.manual_seed(0)
    for indices in task.batches(0):
        spec, lengths, _ = task.sounds(indices, CPU)
        for own, n in zip(spec, lengths):
            rows += int((own[:, :n] == 0).all(1).sum())
            columns += int((own[:, :n] == 0).all(0).sum())
    assert rows > 12 and columns > 12


def test_batches_come_in_random_order():
    seconds = [float(k) for k in range(1, 101)]
    first = [length_batches(seconds, 10, torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert len({min(seconds[k] for k in batches[0]) // 10 for batches in first}) > 4
