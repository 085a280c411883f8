"""Captioners as task and as experiments: batches, scores, sizes, records, and stored models that score the same."""

import math

import pytest
import torch

from hlstm_src import caption_scores, experiments, profiles, records, rivals
from hlstm_src.corpora import CaptionCorpus
from hlstm_src.counting import count
from hlstm_src.masks import live_count, load_tensors, save_tensors
from hlstm_src.neuraltalk import NeuralTalk, caption_loss, collate
from hlstm_src.tasks import CaptionTask, tokens
from tests.captions import SIZES, make_corpus, trained

CPU = torch.device("cpu")
NAMES = tuple(name for name in experiments.CATALOGUE if name.startswith("nt-"))
RUNS = "nt-lstm3", "nt-gru1", "nt-hlstm1-gp", "nt-small-hlstm-flowers"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("captions") / "squares")


@pytest.fixture(scope="module")
def corpus(folder):
    return CaptionCorpus(folder, "tiny")


@pytest.fixture(scope="module")
def made(tmp_path_factory, folder):
    with trained(tmp_path_factory.mktemp("made") / "results", RUNS, corpus=str(folder), epochs=12, lr=2e-2,
                 limit=None) as results:
        yield results


@pytest.fixture
def model(corpus):
    torch.manual_seed(0)
    return NeuralTalk(len(corpus.vocabulary), 8, hidden=8, embedding=8, encoder="tiny")


def stored(name):
    path = records.path_of(name, "smoke", 0)
    return records.read(path), path.with_suffix(".safetensors")


# --- the task --------------------------------------------------------------------------------------

def test_an_epoch_holds_each_caption_once_and_depends_on_seed_and_epoch_alone(corpus):
    task = CaptionTask(corpus, batch=7, seed=1)
    first = task.batches(0)
    torch.manual_seed(7)
    assert first == CaptionTask(corpus, batch=7, seed=1).batches(0)
    assert sorted(k for batch in first for k in batch) == list(range(5 * SIZES["train"]))
    assert len({str(b) for b in (first, task.batches(1), CaptionTask(corpus, batch=7).batches(0))}) == 3
    said = sorted((k, tuple(words)) for k, words in task.pairs)
    assert said == sorted((k, tuple(corpus.vocabulary.encode(c))) for k, p in enumerate(task.train) for c in p.captions)


def test_the_loss_of_a_batch_is_that_of_its_pictures_and_captions(corpus, model):
    task = CaptionTask(corpus)
    model.eval()
    total, words = 0.0, 0
    for k in (3, 11, 26):
        number, caption = task.pairs[k]
        inputs, targets = collate([caption])
        loss = caption_loss(model(corpus.features([task.train[number]]), inputs), targets).item()
        total, words = total + loss * (len(caption) + 1), words + len(caption) + 1
    assert task.loss(model, [3, 11, 26], CPU).item() == pytest.approx(total / words, rel=1e-5)


def test_validation_scores_are_greedy_cider_and_the_perplexity_of_all_captions(corpus, model):
    task = CaptionTask(corpus)
    model.train()
    found = task.evaluate(model, CPU)
    said = [corpus.vocabulary.decode(model.caption(corpus.features([p]))[0]) for p in task.valid]
    assert found["cider"] == pytest.approx(caption_scores.cider(tokens(task.valid), said).mean())
    losses = []
    for p in task.valid:
        for caption in p.captions:
            inputs, targets = collate([corpus.vocabulary.encode(caption)])
            losses += [caption_loss(model(corpus.features([p]), inputs), targets).item()] * targets.numel()
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert found["perplexity"] == pytest.approx(task.perplexity(model, task.valid, CPU, batch=3), rel=1e-5)
    assert (task.train, task.valid) == (corpus.split("train"), corpus.split("valid"))
    assert CaptionTask(corpus, limit=2).valid == task.valid[:2]


def test_captions_come_in_the_order_asked_for(corpus, model):
    task, pictures = CaptionTask(corpus), corpus.split("train", "test")
    for p in model.parameters():
        p.data *= 2
    said = task.captions(model, pictures, CPU, 3, batch=4)
    assert said == task.captions(model, pictures[::-1], CPU, 3)[::-1]
    assert len(said) == len(pictures)


# --- experiments -----------------------------------------------------------------------------------

def test_a_record_holds_every_score_and_says_how_words_were_compared(made, corpus):
    for name in RUNS:
        record, _ = stored(name)
        assert record.normalisation == caption_scores.PYTHON and record.provenance.corpus == "squares"
        assert {"cider", "cider_low", "cider_high", "bleu1", "bleu4", "rouge_l", "perplexity", "cider_beam2",
                "cider_beam3", "cider_beam5"} <= record.scores.keys()
        assert record.scores["cider_low"] <= record.scores["cider"] <= record.scores["cider_high"]
        assert record.valid_scores.keys() == record.history[-1].scores.keys() == {"cider", "perplexity"}
        assert record.scores["pictures"] == SIZES["test"] == len(record.samples)
        said = [sample["hypothesis"] for sample in record.samples]
        assert caption_scores.cider(tokens(corpus.split("test")), said).mean() == record.scores["cider"]
        assert any(said), "it says nothing, so equal scores say nothing"
        assert record.history[-1].loss < record.history[0].loss


@pytest.mark.parametrize("name", RUNS)
def test_the_stored_model_scores_what_the_record_says(made, folder, name):
    record, file = stored(name)
    scores, said = experiments.evaluate(file, experiments.open_corpus(file, folder))
    assert scores == record.scores and said == [sample["hypothesis"] for sample in record.samples]
    valid, _ = experiments.evaluate(file, experiments.open_corpus(file, folder), "valid")
    assert {k: valid[k] for k in record.valid_scores} == pytest.approx(record.valid_scores)


def test_a_second_run_with_the_same_seed_gives_the_same(made):
    before, _ = stored("nt-hlstm1-gp")
    again = experiments.run("nt-hlstm1-gp", "smoke", force=True, progress=False)
    assert again.model.sha256 == before.model.sha256 and again.scores == before.scores


def test_counts_are_of_one_word_and_leave_out_what_is_done_once_a_picture(made, corpus):
    record, file = stored("nt-lstm3")
    V, H, cell = len(corpus.vocabulary), 16, record.counts.cell
    assert cell.params == cell.macs == 3 * 4 * H * 2 * H
    assert record.counts.model.macs == cell.macs + H * V
    model, masks, about = experiments.load(file)
    assert record.counts.model.params == sum(p.numel() for p in model.parameters())
    assert about["vocabulary"] == list(corpus.vocabulary.words) and about["longest"] == corpus.vocabulary.longest
    sparse, file = stored("nt-hlstm1-gp")
    model, masks, _ = experiments.load(file)
    assert masks.keys() == {"rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.weight_gate1_l0"}
    assert sparse.counts.cell.nonzero_params == sum(int(m.sum()) for m in masks.values())


def test_a_captioner_wants_its_own_corpus(made, folder, tmp_path):
    _, file = stored("nt-lstm3")
    with pytest.raises(ValueError, match="seed0.safetensors: a captioner is scored on a corpus"):
        experiments.evaluate(file)
    other = make_corpus(tmp_path / "other", captions=1)
    with pytest.raises(ValueError, match="its vocabulary is not that of .*other"):
        experiments.evaluate(file, experiments.open_corpus(file, other))


@pytest.mark.parametrize("profile", ["laptop", "desk", "wide", "paper"])
def test_the_compact_models_are_at_least_as_small_as_the_papers_and_alike(profile):
    recipes = {name: experiments.recipe(name, profile) for name in NAMES}
    with torch.device("meta"):
        made = {name: (recipe, NeuralTalk(300, 1280, **recipe.model)) for name, recipe in recipes.items()}
    cells = {name: count(model, include="rnn.", weights_only=True).params for name, (_, model) in made.items()}
    most = cells["nt-lstm3"] / 45.5                                 # the paper's factor of FLOPs
    for name, (recipe, _) in made.items():
        if "density" in recipe.schedule:
            live = recipe.schedule["density"] * cells[name]
            compact = "compact" in name
            assert live <= most if compact else live > 2 * most
            assert live > 0.99 * most
        if "small" in name:
            assert abs(cells[name] / most - 1) < 0.08           # a narrow cell grows in large steps
    assert cells["nt-lstm1"] * 3 == cells["nt-lstm3"] and cells["nt-hlstm1"] * 2 == cells["nt-lstm3"]


@pytest.mark.parametrize("name, zero", [("nt-hlstm1-relu", True), ("nt-hlstm1", False), ("nt-lstm1", None)])
def test_a_record_says_how_many_units_in_the_gates_are_zero(name, zero):
    made = experiments.trainer(name, "smoke", progress=False)
    bench = experiments.benchmark(experiments.recipe(name, "smoke"), profiles.profile("smoke"))
    pictures = bench.corpus.split("test", limit=12)
    scores = bench.scored(made.model, made.task, pictures)[1]
    assert ("zero_units" in scores) == (zero is not None)
    if zero is not None:
        assert 20 < scores["zero_units"] < 80 if zero else scores["zero_units"] == 0
    read = list(made.task.unpadded(made.model, pictures))
    assert sum(len(inputs) for _, inputs in read) == sum(len(p.captions) for p in pictures)
    assert all((inputs[:, 1:] != 0).all() and len(features) == len(inputs) for features, inputs in read)


def test_the_paper_profile_trains_as_the_paper_did():
    for name in NAMES:
        recipe = experiments.recipe(name, "paper")
        how, sparse = recipe.settings, "rival" in recipe.schedule
        assert (how.lr, how.decay, how.decay_epochs, how.weight_decay) == (3e-4, 0.8, 6, 0)
        assert (how.patience is None) == sparse and recipe.schedule["epochs"] == 90
        assert recipe.model["dropout"] == 0.5 and recipe.task["batch"] == 64
    assert experiments.recipe("nt-hlstm1", "desk").settings.weight_decay > 0


def test_at_the_desk_the_compact_cell_meets_the_papers_factors_of_parameters_and_flops():
    recipe = experiments.recipe("nt-hlstm1-compact", "desk")
    density, schedule = rivals.rival(**{"name" if k == "rival" else k: v for k, v in recipe.schedule.items()})
    with torch.device("meta"):
        model = NeuralTalk(305, 1280, **recipe.model)
    matrices = [p for name, p in model.named_parameters() if name.startswith("rnn.weight")]
    assert [p.shape for p in matrices] == [(2048, 512)] * 3
    live = sum(live_count(p.shape, schedule.density) for p in matrices)
    assert 138_000 < live <= 6 * 2 ** 20 / 45.5


@pytest.mark.parametrize("profile", profiles.PROFILES)
def test_every_captioner_can_be_built_and_takes_the_epochs_of_its_profile(profile):
    p = profiles.PROFILES[profile]
    for name in NAMES:
        recipe, sizes = experiments.recipe(name, profile), p.captions
        if name.endswith("-flowers") and p.flowers:
            sizes = p.flowers
        assert recipe.task["corpus"] == sizes.corpus and recipe.benchmark == "captions"
        schedule = dict(recipe.schedule)
        if "rival" in schedule:
            _, made = rivals.rival(schedule.pop("rival"), **schedule)
            assert made.epochs_left == sizes.epochs
        else:
            assert schedule == {"epochs": sizes.epochs}
        assert recipe.settings.lr == (sizes.small_lr or sizes.lr if name.endswith("-fitted") else sizes.lr)


def test_a_packed_captioner_scores_the_same_on_the_engine(made, folder, corpus, tmp_path):
    pytest.importorskip("numba")
    from hlstm_src import packed
    from hlstm_src.compact.pack import pack
    record, file = stored("nt-hlstm1-gp")
    pack(file, tmp_path / "compact")
    opened, found, said = packed.evaluate(tmp_path / "compact", folder)
    assert opened.name == corpus.name and said == [s["hypothesis"] for s in record.samples]
    assert len(found) > 3 and found == {name: record.scores[name] for name in found}
    assert packed.evaluate(tmp_path / "compact", folder, limit=2)[2] == said[:2]
    with pytest.raises(ValueError, match="a captioner is scored on a corpus; name its folder, such as data/ucm"):
        packed.evaluate(tmp_path / "compact", None)
    tensors, metadata = load_tensors(tmp_path / "compact")
    save_tensors(tmp_path / "other", tensors, metadata | {"vocabulary": ["other", *metadata["vocabulary"][1:]]})
    with pytest.raises(ValueError, match="its vocabulary is not that of"):
        packed.evaluate(tmp_path / "other", folder)
