"""Reading caption corpora: what is damaged is refused with file, key and remedy; features come from the right store."""

import hashlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from hlstm_src.corpora import END, UNKNOWN, CaptionCorpus, CorpusError, UndecodablePicture, Vocabulary, pixels
from tests.captions import SIZES, make_corpus


@pytest.fixture
def folder(tmp_path):
    return make_corpus(tmp_path / "squares")


def rewrite(folder, name, change, agree=True):
    """Changes the text of a table, and corpus.json with it unless they are to disagree."""
    (folder / name).write_text(change((folder / name).read_text()), newline="\n")
    if agree:
        data = b"".join((folder / part).read_bytes() for part in ("manifest.csv", "captions.csv", "vocabulary.txt"))
        info = json.loads((folder / "corpus.json").read_text()) | {"sha256": hashlib.sha256(data).hexdigest()}
        (folder / "corpus.json").write_text(json.dumps(info))


def store(folder, name="vgg16", rows=21, **about):
    """A feature store whose row k is k in every place, with what it says of itself changed by `about`."""
    manifest = hashlib.sha256((folder / "manifest.csv").read_bytes()).hexdigest()
    about = {"encoder": "vgg16", "manifest_sha256": manifest, "skipped": "[]", **about}
    (folder / "features").mkdir(exist_ok=True)
    features = torch.arange(rows).half()[:, None].repeat(1, 7)
    save_file({"features": features}, folder / "features" / f"{name}.safetensors", metadata=about)


def test_a_corpus_gives_what_was_written(folder):
    corpus = CaptionCorpus(folder)
    assert corpus.name == "squares" and corpus.sha256 == json.loads((folder / "corpus.json").read_text())["sha256"]
    assert {name: len(corpus.split(name)) for name in SIZES} == SIZES
    assert len(corpus.split("train", "valid")) == SIZES["train"] + SIZES["valid"]
    first, second = corpus.split("train", limit=2)
    assert (first.id, second.id) == ("train-00", "train-01")
    assert first.raw[0].startswith("A ") and first.captions[0] == tuple(first.raw[0].lower().rstrip(".").split())
    assert len(first.captions) == len(first.raw) == 5
    drawn = folder.with_name("squares-drawn") / "train-01.png"
    assert np.array_equal(np.asarray(corpus.image(second)), np.asarray(Image.open(drawn)))


def test_a_vocabulary_of_the_corpus_has_its_words_and_both_marks(folder):
    words = CaptionCorpus(folder).vocabulary
    said = {word for p in CaptionCorpus(folder).split("train") for caption in p.captions for word in caption}
    assert set(words.words) == said | {"UNK"} and len(words) == len(said) + 2
    assert (END, UNKNOWN) == (0, 1) and words.encode(["zebra"]) == [UNKNOWN]


@given(st.lists(st.sampled_from(["a", "b", "c"]), max_size=30), st.integers(1, 20), st.lists(st.integers(0, 4)))
def test_words_survive_the_way_to_ids_and_back(tokens, longest, more):
    vocabulary = Vocabulary(["UNK", "a", "b", "c"], longest)
    ids = vocabulary.encode(tokens)
    assert vocabulary.decode([*ids, END, *more]) == " ".join(tokens[:longest]) and len(vocabulary) == 5
    assert all(0 < k < len(vocabulary) for k in ids)
    assert vocabulary.decode(torch.tensor(ids + [END])) == vocabulary.decode(ids)


@pytest.mark.parametrize("spoil, where, what", [
    (lambda f: (f / "corpus.json").unlink(), "corpus.json", "no such file"),
    (lambda f: (f / "captions.csv").unlink(), "captions.csv", "no such file"),
    (lambda f: (f / "vocabulary.txt").unlink(), "vocabulary.txt", "no such file"),
    (lambda f: (f / "corpus.json").write_text("{"), "corpus.json", "not JSON"),
    (lambda f: (f / "corpus.json").write_text("[]"), "corpus.json", "key 'kind' is not 'captions'"),
    (lambda f: (f / "corpus.json").write_text('{"kind": "speech"}'), "corpus.json", "key 'kind' is not 'captions'"),
    (lambda f: rewrite(f, "captions.csv", lambda t: t + "x,a,A\n", agree=False), "corpus.json", "key 'sha256'"),
    (lambda f: rewrite(f, "captions.csv", lambda t: t + "train-00, ,?\n"), "captions.csv, row 107", "is empty"),
    (lambda f: rewrite(f, "captions.csv", lambda t: t + "train-00,a\n"), "captions.csv, row 107", "raw is missing"),
    (lambda f: rewrite(f, "captions.csv", lambda t: t.replace("id,", "name,", 1)), "captions.csv, row 2", "is missing"),
    (lambda f: rewrite(f, "captions.csv", lambda t: t.replace("valid-00", "valid-01")), "manifest.csv, row 14",
     "'valid-00' has no caption"),
    (lambda f: rewrite(f, "manifest.csv", lambda t: t.replace("valid,", "dev,", 1)), "manifest.csv, row 14", "'dev'"),
    (lambda f: rewrite(f, "manifest.csv", lambda t: t + t.splitlines()[3] + "\n"), "manifest.csv, row 23",
     "'train-02' stands there twice"),
])
def test_a_damaged_corpus_is_refused(folder, spoil, where, what):
    spoil(folder)
    with pytest.raises(CorpusError) as error:
        CaptionCorpus(folder)
    message = str(error.value)
    assert f"{folder}/{where}: " in message and what in message
    assert "prepare the corpus" in message and "\n" not in message


def test_a_missing_a_changed_and_a_broken_picture_are_refused(folder):
    corpus = CaptionCorpus(folder)
    missing, changed, broken = corpus.split("train", limit=3)
    missing.path.unlink()
    changed.path.write_bytes(changed.path.read_bytes() + b"x")
    broken.path.write_bytes(b"no picture")
    digest = hashlib.sha256(b"no picture").hexdigest()
    rewrite(folder, "manifest.csv", lambda t: t.replace(broken.sha256, digest))
    corpus = CaptionCorpus(folder)
    for picture, what in zip(corpus.pictures, ("'train-00' is missing", "SHA-256 differs", "does not decode")):
        with pytest.raises(CorpusError, match=f"{picture.path.name}: .*{what}.*prepare the corpus again"):
            corpus.image(picture)
    with pytest.raises(UndecodablePicture):
        corpus.image(corpus.pictures[2])
    deep = corpus.pictures[4]
    Image.fromarray(np.full((8, 8), 60_000, np.uint16)).save(deep.path, "PNG")
    digest = hashlib.sha256(deep.path.read_bytes()).hexdigest()
    rewrite(folder, "manifest.csv", lambda t: t.replace(deep.sha256, digest))
    with pytest.raises(UndecodablePicture, match="more than 8 bits a channel"):
        CaptionCorpus(folder).image(CaptionCorpus(folder).pictures[4])
    assert corpus.image(corpus.pictures[3]).mode == "RGB"


def test_features_are_the_rows_of_their_pictures(folder):
    store(folder)
    corpus = CaptionCorpus(folder, "vgg16")
    test = corpus.split("test")
    assert torch.equal(corpus.features(test)[:, 0], torch.arange(16.0, 21.0))
    assert corpus.feature(test[2]).tolist() == [18.0] * 7 and corpus.feature(test[2]).dtype == torch.float32
    assert corpus.features([]).shape == (0, 7) and corpus.encoder_info["encoder"] == "vgg16"


def test_skipped_pictures_are_in_no_split_and_have_no_feature(folder):
    store(folder, skipped='["train-01", "test-00"]')
    corpus = CaptionCorpus(folder, "vgg16")
    assert [p.id for p in corpus.split("train", limit=2)] == ["train-00", "train-02"]
    assert len(corpus.split("test")) == SIZES["test"] - 1
    with pytest.raises(CorpusError, match="train-01.png: the encoder vgg16 skipped this picture"):
        corpus.feature(CaptionCorpus(folder).pictures[1])


@pytest.mark.parametrize("make, what", [
    (lambda f: None, "no such feature store"),
    (lambda f: store(f, encoder="tiny"), "key 'encoder' is 'tiny', not 'vgg16': features of another encoder"),
    (lambda f: store(f, manifest_sha256="0" * 64), "key 'manifest_sha256' is '0000.*features of another corpus"),
    (lambda f: store(f, rows=20), "20 features for 21 pictures"),
    (lambda f: store(f, skipped="["), "not a feature store"),
    (lambda f: (store(f), (f / "features/vgg16.safetensors").write_bytes(b"12")), "not a feature store"),
    (lambda f: (store(f), rewrite(f, "manifest.csv", lambda t: t.replace(",valid,", ",test,", 1))), "another corpus"),
])
def test_a_store_of_something_else_is_refused(folder, make, what):
    make(folder)
    with pytest.raises(CorpusError, match=f"vgg16.safetensors: .*{what}.*data_prep.features --corpus .* vgg16"):
        CaptionCorpus(folder, "vgg16")


def test_the_tiny_encoder_reads_pixels_and_the_others_are_asked_for(folder):
    corpus = CaptionCorpus(folder, "tiny")
    train = corpus.split("train")
    x = corpus.features(train[:3])
    assert x.shape == (3, 3, 64, 64) and x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1
    expected = np.asarray(corpus.image(train[2])).transpose(2, 0, 1) / np.float32(255)
    np.testing.assert_array_equal(corpus.feature(train[2]).numpy(), expected.astype(np.float32))
    with pytest.raises(CorpusError, match="opened without an encoder"):
        CaptionCorpus(folder).feature(train[0])


def test_a_split_that_holds_nothing_is_refused(folder):
    with pytest.raises(CorpusError, match="no picture in dev; there are: test, train, valid"):
        CaptionCorpus(folder).split("dev")


def test_how_long_captions_may_be_is_said_by_the_corpus(folder):
    info = json.loads((folder / "corpus.json").read_text())
    for about, longest in ((info | {"longest": 3}, 3), ({k: v for k, v in info.items() if k != "longest"}, 16)):
        (folder / "corpus.json").write_text(json.dumps(about))
        assert len(CaptionCorpus(folder).vocabulary.encode(["a"] * 40)) == longest


def test_pixels_are_asked_of_large_encoders_alone(folder):
    tiny = CaptionCorpus(folder, "tiny", pixels=True)
    assert not tiny.pixels and not CaptionCorpus(folder, pixels=True).pixels
    assert torch.equal(tiny.features(tiny.split("test")), CaptionCorpus(folder, "tiny").features(tiny.split("test")))


def test_with_pixels_the_store_still_says_which_pictures_were_skipped(folder):
    store(folder, skipped='["train-01"]')
    corpus = CaptionCorpus(folder, "vgg16", pixels=True)
    assert corpus.pixels and corpus.width == 7 and corpus.encoder_info["encoder"] == "vgg16"
    assert "train-01" not in {p.id for p in corpus.split("train")}
    with pytest.raises(CorpusError, match="train-01.png: the encoder vgg16 skipped this picture"):
        corpus.features(CaptionCorpus(folder).pictures[:2])


def test_pixels_that_were_stored_are_read_from_there(folder):
    rows = torch.randint(256, (21, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    store(folder, "tiny", encoder="tiny")
    path = folder / "features/tiny.safetensors"
    with safe_open(path, "pt") as file:
        about = file.metadata()
    save_file({"features": rows}, path, metadata=about)
    corpus = CaptionCorpus(folder, "tiny")
    assert torch.equal(corpus.feature(corpus.pictures[5]), rows[5].float() / 255)


def test_every_picture_becomes_a_square_of_three_colours(folder):
    corpus = CaptionCorpus(folder)
    first, second = corpus.split("train", limit=2)
    Image.new("L", (10, 20), 77).save(first.path)
    Image.new("RGBA", (64, 32), (1, 2, 3, 0)).save(second.path)         # of which nothing is to be seen
    for picture in (first, second):
        digest = hashlib.sha256(picture.path.read_bytes()).hexdigest()
        rewrite(folder, "manifest.csv", lambda t, old=picture.sha256, new=digest: t.replace(old, new))
    corpus = CaptionCorpus(folder)
    for picture, colour in zip(corpus.pictures, ((77, 77, 77), (255, 255, 255))):
        seen = pixels(corpus.image(picture))
        assert seen.shape == (3, 64, 64) and seen.dtype == torch.uint8
        assert all((channel == value).all() for channel, value in zip(seen, colour, strict=True))


def test_small_detail_is_averaged_rather_than_picked():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 200
    seen = pixels(Image.fromarray(stripes)).float()
    assert (seen - 100).abs().max() < 30


def test_a_picture_too_large_to_be_meant_is_one_that_does_not_decode(folder, monkeypatch):
    corpus = CaptionCorpus(folder)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)           # Pillow refuses more than twice as many
    with pytest.raises(UndecodablePicture, match="'train-00' does not decode"):
        corpus.image(corpus.pictures[0])


def test_a_table_with_a_cell_too_large_to_read_is_an_error_to_mend(folder):
    rewrite(folder, "captions.csv", lambda text: text + "x," + "a " * 100_000 + ",x\n")
    with pytest.raises(CorpusError, match="captions.csv, behind row .*: no table .field larger.*prepare the"):
        CaptionCorpus(folder)
