"""The feature store: whole, resumed to the same bits, up to date, and without pictures that do not decode."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from typer import Typer
from typer.testing import CliRunner

from data_prep import features
from data_prep.captions import Scene, write_corpus
from data_prep.features import store_features
from data_prep.karpathy import prepare_archive
from hlstm_src.corpora import CaptionCorpus, CorpusError, UndecodablePicture, pixels
from hlstm_src.encoders import Encoder, load_encoder
from hlstm_src.files import alone
from tests.captions import make_corpus


class Means(nn.Module):
    """Three numbers a picture: its mean colour. Stops after so many batches, if it is told to."""

    def __init__(self, stop=None):
        super().__init__()
        self.left = stop

    def forward(self, x):
        if self.left is not None:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
        return x.float().mean((2, 3))


def means(stop=None, weights="0" * 64):
    return Encoder("vgg16", (3,), weights, pixels, Means(stop))


@pytest.fixture
def corpus(tmp_path):
    return CaptionCorpus(make_corpus(tmp_path / "squares"))


def content(path):
    """What a store holds and says; the bytes of two such files may differ in the order of their keys."""
    with safe_open(path, "pt") as file:
        return file.metadata(), file.get_tensor("features").numpy().tobytes()


def names(corpus):
    return sorted(p.name for p in (corpus.folder / "features").iterdir())


def test_every_picture_has_its_feature(corpus):
    path, new = store_features(corpus, means())
    assert new and names(corpus) == ["vgg16.safetensors"] and path.parent == corpus.folder / "features"
    stored = CaptionCorpus(corpus.folder, "vgg16")
    for picture in stored.pictures:
        expected = np.asarray(corpus.image(picture), np.float32).mean((0, 1))
        np.testing.assert_allclose(stored.feature(picture).numpy(), expected, rtol=1e-3)
    about = {"encoder": "vgg16", "weights_sha256": "0" * 64, "weights": "", "corpus": "squares", "skipped": [],
             "manifest_sha256": corpus.manifest_sha256}
    assert stored.encoder_info == about


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(corpus, stop):
    whole = content(store_features(corpus, means())[0])
    (corpus.folder / "features/vgg16.safetensors").unlink()
    with pytest.raises(KeyboardInterrupt):
        store_features(corpus, means(stop))
    part = corpus.folder / "features/vgg16.rows.part"
    with open(part, "ab") as file:
        file.write(b"torn" * 2)  # a batch that was half written: one row and a part of the next
    encoder = means()
    encoder.network.left = 6 - stop  # 21 pictures in batches of 4
    assert content(store_features(corpus, encoder)[0]) == whole and encoder.network.left == 0
    assert names(corpus) == ["vgg16.safetensors"]


def test_of_two_programs_the_second_is_refused(corpus):
    path = corpus.folder / "features/vgg16.safetensors"
    with alone(path), pytest.raises(CorpusError, match="vgg16.safetensors: another process is making it"):
        store_features(corpus, means())
    assert store_features(corpus, means()) == (path, True)


def test_a_feature_that_float16_cannot_hold_is_refused_by_picture(corpus):
    class Large(Means):
        def forward(self, x):
            return super().forward(x) * 1e9
    with pytest.raises(CorpusError, match="images/.*: its feature is infinite or beyond what float16 holds"):
        store_features(corpus, Encoder("vgg16", (3,), "0" * 64, pixels, Large()))
    assert not (corpus.folder / "features/vgg16.safetensors").exists()


def test_what_another_encoder_began_is_not_gone_on_with(corpus):
    with pytest.raises(KeyboardInterrupt):
        store_features(corpus, means(2))
    encoder = means(weights="1" * 64)
    encoder.network.left = 6
    store_features(corpus, encoder)
    assert encoder.network.left == 0
    assert CaptionCorpus(corpus.folder, "vgg16").encoder_info["weights_sha256"] == "1" * 64


def test_a_store_is_left_alone_until_weights_or_pictures_change(corpus):
    assert store_features(corpus, means())[1] and not store_features(corpus, means(0))[1]
    assert store_features(corpus, means(weights="1" * 64))[1]
    (corpus.folder / "features/vgg16.safetensors").write_bytes(b"damaged")
    assert store_features(corpus, means())[1]
    other = CaptionCorpus(make_corpus(corpus.folder.with_name("other"), seed=1))
    (other.folder / "features").mkdir()
    (corpus.folder / "features/vgg16.safetensors").rename(other.folder / "features/vgg16.safetensors")
    assert store_features(other, means())[1]


@pytest.fixture
def broken(tmp_path):
    """A corpus of nine pictures, of which the third and the last do not decode."""
    scenes = []
    for k, p in enumerate(CaptionCorpus(make_corpus(tmp_path / "squares")).pictures[:9]):
        file = tmp_path / f"{k}.png"
        file.write_bytes(p.path.read_bytes()[:200] if k in (2, 8) else p.path.read_bytes())
        scenes.append(Scene(str(k), ("train", "valid", "test")[k // 3], file, file.name, p.raw))
    write_corpus(tmp_path / "broken", scenes, name="broken", title="", licence="", source="", min_count=1)
    return CaptionCorpus(tmp_path / "broken")


def test_a_picture_that_does_not_decode_is_refused_by_name(broken):
    with pytest.raises(UndecodablePicture, match="2.png: the picture '2' does not decode .*--skip-broken"):
        store_features(broken, means())
    assert not (broken.folder / "features/vgg16.safetensors").exists()


def test_or_skipped_and_listed(broken):
    said = []
    assert store_features(broken, means(), skip_broken=True, say=said.append)[1]
    assert said == ["skipped: the picture '2' does not decode", "skipped: the picture '8' does not decode"]
    stored = CaptionCorpus(broken.folder, "vgg16")
    assert stored.skipped == {"2", "8"} and [len(stored.split(s)) for s in ("train", "valid", "test")] == [2, 3, 2]
    np.testing.assert_allclose(stored.feature(stored.split("train")[1]).numpy(),
                               np.asarray(broken.image(broken.pictures[1]), np.float32).mean((0, 1)), rtol=1e-3)
    assert not store_features(broken, means(), skip_broken=True)[1]
    with pytest.raises(UndecodablePicture):  # who does not want them skipped is told so again
        store_features(broken, means())


def test_skipped_pictures_are_remembered_by_a_run_that_goes_on(broken):
    with pytest.raises(KeyboardInterrupt):
        store_features(broken, means(1), skip_broken=True, say=lambda line: None)
    store_features(broken, means(), skip_broken=True, say=lambda line: None)
    assert CaptionCorpus(broken.folder, "vgg16").skipped == {"2", "8"}


def test_a_changed_picture_is_refused_in_any_case(corpus):
    corpus.pictures[5].path.write_bytes(b"changed")
    with pytest.raises(CorpusError, match="train-05.png: SHA-256 differs"):
        store_features(corpus, means(), skip_broken=True)


def test_pixels_stored_are_the_pixels_read(corpus):
    read = CaptionCorpus(corpus.folder, "tiny")
    expected = read.features(read.split("valid"))
    store_features(corpus, load_encoder("tiny"))
    stored = CaptionCorpus(corpus.folder, "tiny")
    assert stored.encoder_info["manifest_sha256"] == corpus.manifest_sha256
    assert torch.equal(stored.features(stored.split("valid")), expected)


def test_a_killed_program_goes_on(corpus, tmp_path):
    """The program itself, killed in the middle, then run again: the store is that of a run in one go."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time\nfrom data_prep import features\nfrom tests.data_prep.test_features import Means, means\n"
        "class Slow(Means):\n    def forward(self, x):\n        time.sleep(0.3)\n        return super().forward(x)\n"
        "def load(*_):\n    encoder = means()\n    object.__setattr__(encoder, 'network', Slow())\n    return encoder\n"
        "features.load_encoder = load\nimport typer\ntyper.run(features.main)\n")
    command = [sys.executable, str(script), "--corpus", str(corpus.folder), "--encoder", "vgg16"]
    env = os.environ | {"PYTHONPATH": str(Path(features.__file__).parents[1])}
    part = corpus.folder / "features/vgg16.rows.part"
    first = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    for _ in range(600):
        if part.exists() and part.stat().st_size >= 2 * 4 * 6:
            break
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert part.exists() and not (corpus.folder / "features/vgg16.safetensors").exists()
    subprocess.run(command, env=env, check=True, capture_output=True)
    resumed = content(corpus.folder / "features/vgg16.safetensors")
    (corpus.folder / "features/vgg16.safetensors").unlink()
    assert content(store_features(corpus, means())[0]) == resumed


def test_the_command_line_reports_in_one_line(corpus):
    app = Typer()
    app.command()(features.main)
    run = CliRunner().invoke
    built = run(app, ["--corpus", str(corpus.folder), "--encoder", "tiny"])
    again = run(app, ["--corpus", str(corpus.folder), "--encoder", "tiny"])
    assert built.exit_code == 0 and "is ready: 21 pictures" in built.stdout and "is up to date" in again.stdout
    for arguments, what in ((["--corpus", "nowhere", "--encoder", "tiny"], "nowhere/corpus.json: no such file"),
                            (["--corpus", str(corpus.folder), "--encoder", "resnet"], "encoder 'resnet': unknown"),
                            (["--corpus", str(corpus.folder), "--encoder", "tiny", "--device", "tpu"], "--device tpu"),
                            (["--corpus", str(corpus.folder), "--encoder", "tiny", "--device", "meta"],
                             "--device meta"),
                            (["--corpus", str(corpus.folder), "--encoder", "tiny", "--device", "cuda:99"],
                             "--device cuda:99: cannot be used here")):
        done = run(app, arguments)
        assert done.exit_code == 1 and done.stderr.startswith("error: ") and what in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.real
@pytest.mark.slow
def test_pictures_of_a_kind_are_near_each_other(tmp_path, real_data):
    """EfficientNet-Lite0 on UCM, which is sorted by 21 kinds of a hundred pictures: the nearest is mostly of a kind.

    One picture in ten is taken, because neighbours in number are often neighbours on the ground.
    """
    archive = real_data / "ucm_captions.tar.gz"
    if not archive.exists():
        pytest.skip(f"{archive} is not there")
    prepare_archive(tmp_path / "ucm", archive)
    corpus = CaptionCorpus(tmp_path / "ucm")
    some = [p for p in corpus.pictures if int(p.id) % 10 == 0]
    encoder = load_encoder("efficientnet_lite0")
    x = nn.functional.normalize(torch.cat([encoder([corpus.image(p)]) for p in some]), dim=1)
    kind = torch.tensor([(int(p.id) - 1) // 100 for p in some])
    alike = x @ x.T
    alike.fill_diagonal_(-1)
    assert (kind[alike.argmax(1)] == kind).float().mean() > 0.6


def test_a_manifest_of_the_store_is_that_of_the_corpus(corpus):
    store_features(corpus, replace(means(), name="tiny", shape=(3,)))
    manifest = hashlib.sha256((corpus.folder / "manifest.csv").read_bytes()).hexdigest()
    assert CaptionCorpus(corpus.folder, "tiny").encoder_info["manifest_sha256"] == manifest
    assert json.loads((corpus.folder / "corpus.json").read_text())["sha256"] != manifest


def test_a_picture_is_skipped_once_even_if_its_row_was_lost(broken, monkeypatch):
    monkeypatch.setitem(features.BATCH, "cpu", 4)
    with pytest.raises(KeyboardInterrupt):
        store_features(broken, means(stop=1), skip_broken=True, say=lambda line: None)
    (broken.folder / "features" / "vgg16.rows.part").write_bytes(b"")      # cut off behind the note, before the rows
    path, _ = store_features(broken, means(), skip_broken=True, say=lambda line: None)
    assert json.loads(content(path)[0]["skipped"]) == ["2", "8"]
