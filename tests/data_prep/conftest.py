"""A small archive in the layout of AN4, for the tests that take it whole and those that spoil it."""

import io
import tarfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from data_prep.an4 import AN4, FOLDERS

WORDS = {"train": ["<s> YES </s>", "GO", "enter  six"], "test": ["O'HARA T W O"]}
SPEAKERS = {"train": ["fann", "fbea", "mcal", "mdan"], "test": ["feve", "mfox"]}
SECONDS = 0.5
# 4 speakers with 3 utterances, 2 with 1: 14 x 0.5 s are 0.1 minutes.
SOURCE = replace(AN4, utterances={"train": 12, "test": 2}, minutes=0.1, held_out=1)


def sphere(samples):
    """NIST SPHERE with the checksum that the published files carry and soundfile does not write."""
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format="NIST", subtype="PCM_16")
    data = file.getvalue()
    checksum = int(samples.view(np.uint16).astype(np.int64).sum()) % 65536
    header = data[:1024].replace(b"end_head\n", b"sample_checksum -i %d\nend_head\n" % checksum)
    return header[:1024] + data[1024:]


def files_of_a_small_archive():
    """Name -> content of every file of a small archive that is as it should be."""
    files = {"an4/LICENSE": b"AN4 licence, to be kept with the audio\n"}
    rng = np.random.default_rng(0)
    for split, speakers in SPEAKERS.items():
        ids, said = [], []
        for speaker in speakers:
            for number, words in enumerate(WORDS[split]):
                name = f"an{number}-{speaker}-b"
                samples = rng.integers(-(2**15), 2**15, int(16_000 * SECONDS)).astype(np.int16)
                files[f"an4/wav/{FOLDERS[split]}/{speaker}/{name}.sph"] = sphere(samples)
                ids.append(f"{FOLDERS[split]}/{speaker}/{name}\n")
                said.append(f"{words} ({name})\n")
        files[f"an4/etc/an4_{split}.fileids"] = "".join(ids).encode()
        files[f"an4/etc/an4_{split}.transcription"] = "".join(reversed(said)).encode()
    return files


def pack(path, files):
    """The files as a .tar.gz; returns its path."""
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(scope="session")
def small_an4():
    """The archive's `files`, the `source` that describes it, and functions to `pack` and make `sphere`."""
    return SimpleNamespace(files=files_of_a_small_archive(), source=SOURCE, pack=pack, sphere=sphere)
