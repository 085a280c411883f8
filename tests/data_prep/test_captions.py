"""Tokens, vocabulary, and the folder of a caption corpus."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import captions
from data_prep.captions import Scene, build_vocabulary, default_min_count, tokenize, verify_corpus, write_corpus
from data_prep.corpus import DataError
from hlstm_src.corpora import CaptionCorpus
from tests.captions import make_corpus


@pytest.mark.parametrize(("sentence", "tokens"), [
    ("A man, riding (slowly) a HORSE.", "a man riding slowly a horse"),
    ("Don't! It's the dog's.", "do n't it 's the dog 's"),
    ("a well-lit t-shirt -- and more", "a well-lit t-shirt and more"),
    ("two people can't fly , they cannot", "two people ca n't fly they can not"),
    ("red/orange petals \u2018and\u2019 we\u2019ll see", "red orange petals and we 'll see"),
    ("1,000 cars at 3.5 km", "1,000 cars at 3.5 km"),
    ("ends in a hyphen- or 'quotes'", "ends in a hyphen or quotes"),
    ("rock 'n' roll o'clock", "rock n roll o'clock"),
    ("caf\u00e9 UNK", "caf\u00e9 unk"),
    (" .?! ", ""),
])
def test_sentences_are_split_as_the_penn_treebank_does(sentence, tokens):
    assert " ".join(tokenize(sentence)) == tokens


@given(st.text())
def test_tokens_are_lower_case_without_spaces_and_stay_as_they_are_when_split_again(sentence):
    tokens = tokenize(sentence)
    assert all(token and not any(sign.isspace() for sign in token) for token in tokens)
    assert tokenize(" ".join(tokens)) == tokens or any("cannot" in token for token in tokens)


@given(st.lists(st.lists(st.sampled_from("abcdefg"), max_size=9), max_size=20), st.integers(1, 5))
def test_a_vocabulary_holds_the_frequent_words_most_frequent_first(said, least):
    words = build_vocabulary(said, least)
    counts = [sum(caption.count(word) for caption in said) for word in words[1:]]
    assert words[0] == "UNK" and counts == sorted(counts, reverse=True) and all(n >= least for n in counts)
    rare = {word for caption in said for word in caption} - set(words)
    assert all(sum(caption.count(word) for caption in said) < least for word in rare)
    assert words == build_vocabulary(said[::-1], least)


def test_large_corpora_ask_for_five_and_small_ones_for_two():
    assert [default_min_count(n) for n in (8_400, 49_999, 50_000, 566_435)] == [2, 2, 5, 5]


def test_words_of_validation_and_test_alone_are_unknown(tmp_path):
    scenes = [Scene(split, split, tmp_path / "a.png", f"{split}.png", (f"a {split} word",))
              for split in ("train", "valid", "test")]
    (tmp_path / "a.png").write_bytes(b"png")
    write_corpus(tmp_path / "c", scenes, name="c", title="", licence="", source="", min_count=1)
    assert (tmp_path / "c/vocabulary.txt").read_text().split() == ["UNK", "a", "train", "word"]
    assert json.loads((tmp_path / "c/corpus.json").read_text())["words"] == 4


def scene(folder, name="x", split="train"):
    (folder / "p.png").write_bytes(b"png")
    return Scene(name, split, folder / "p.png", f"{name}.png", ("a word",))


def test_what_is_twice_missing_or_no_split_is_refused_and_leaves_nothing(tmp_path):
    whole = [scene(tmp_path, split, split) for split in ("train", "valid", "test")]
    about = dict(name="c", title="", licence="", source="", where="captions.json")
    for scenes, what in (
        ([*whole, replace(whole[0], path="other.png")], "captions.json: id 'train' stands there twice"),
        ([*whole, replace(whole[0], id="other")], "captions.json: file 'train.png' stands there twice"),
        (whole[:2], "captions.json: no picture in split test"),
        ([*whole, replace(scene(tmp_path, "y"), file=tmp_path / "none.png")], "none.png: the picture of 'y' is"),
    ):
        with pytest.raises(DataError, match=what):
            write_corpus(tmp_path / "c", scenes, **about)
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]


def test_a_corpus_that_is_there_stays_and_a_damaged_one_is_made_anew(tmp_path):
    out = make_corpus(tmp_path / "one")
    corpus = CaptionCorpus(out)
    pictures = CaptionCorpus(make_corpus(tmp_path / "two")).pictures
    scenes = [Scene(p.id, p.split, p.path, p.path.name, p.raw) for p in pictures]
    about = dict(name="squares", title="Squares", licence="CC0-1.0", source="made for a test", min_count=1)
    stamp = out.stat().st_ino
    assert write_corpus(out, scenes, **about)[1] is False and out.stat().st_ino == stamp
    corpus.pictures[0].path.unlink()
    with pytest.raises(DataError, match="train-00.png: the picture 'train-00' is missing"):
        verify_corpus(out)
    assert write_corpus(out, scenes, **about)[1] is True
    assert verify_corpus(out)["sha256"] == corpus.sha256


def test_features_stay_while_the_pictures_do(tmp_path):
    out = make_corpus(tmp_path / "one")
    (out / "features").mkdir()
    (out / "features/vgg16.safetensors").write_text("features")
    pictures = CaptionCorpus(make_corpus(tmp_path / "two")).pictures
    scenes = [Scene(p.id, p.split, p.path, p.path.name, p.raw) for p in pictures]
    about = dict(name="squares", title="Squares", licence="CC0-1.0", source="made for a test")
    assert write_corpus(out, scenes, min_count=3, **about)[1] is True
    assert (out / "features/vgg16.safetensors").read_text() == "features"
    write_corpus(out, [replace(s, split="train") if s.id == "valid-00" else s for s in scenes], **about)
    assert not (out / "features").exists()


def test_where_links_are_not_possible_pictures_are_copied(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("another disk")

    linked = make_corpus(tmp_path / "one")
    monkeypatch.setattr(captions.os, "link", refuse)
    copied = make_corpus(tmp_path / "two")
    assert CaptionCorpus(linked).sha256 == CaptionCorpus(copied).sha256 == verify_corpus(copied)["sha256"]
