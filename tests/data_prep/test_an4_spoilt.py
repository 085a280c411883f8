"""Archives of AN4 with one thing wrong: a clear error that names the file, and nothing half-written."""

import io
import re
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from data_prep.an4 import prepare
from data_prep.corpus import DataError

LISTS = "an4/etc/an4_"
WAVES = "an4/wav/an4_clstk/"
FIRST = WAVES + "fann/an0-fann-b.sph"


def edit(name, old, new):
    """A spoiler that replaces the one place of `old` in a file; with no `new`, the whole line goes."""

    def spoil(files):
        assert files[name].count(old) == 1
        if new is None:
            files[name] = re.sub(rb"[^\n]*%s[^\n]*\n" % re.escape(old), b"", files[name])
        else:
            files[name] = files[name].replace(old, new)

    return spoil


def drop(name):
    return lambda files: files.pop(name)


def put(name, content):
    """A spoiler that gives a file another content, or makes it from what it holds."""
    return lambda files: files.update({name: content(files[name]) if callable(content) else content})


def both(*spoilers):
    return lambda files: [spoil(files) for spoil in spoilers]


def stereo():
    """SPHERE, but of two channels at 8 kHz."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros((80, 2), np.int16), 8000, format="NIST", subtype="PCM_16")
    return file.getvalue()


def all_women(files):
    """Rename every training speaker m... to f..., in the lists and among the waves."""
    for name in [name for name in files if "test" not in name]:
        content = files.pop(name).replace(b"/m", b"/f").replace(b"-m", b"-f")
        files[name.replace("/m", "/f").replace("-m", "-f")] = content


SPOILT = {
    "a wave is missing": (drop(FIRST), f"{FIRST}: the wave is missing, {LISTS}train.fileids:1 names it"),
    "a wave is no sound": (put(FIRST, b"noise" * 99), f"{FIRST}: corrupt wave"),
    "a wave is empty": (put(FIRST, b""), f"{FIRST}: corrupt wave"),
    "a wave has no samples": (
        put(FIRST, lambda old: old[:1024]),
        f"{FIRST}: corrupt wave, 0 samples where its header says 8000",
    ),
    "a wave is of no length": (
        put(FIRST, lambda old: old[:1024].replace(b"sample_count -i 8000", b"sample_count -i 0   ")),
        f"{FIRST}: a wave without samples",
    ),
    "a wave is cut short": (
        put(FIRST, lambda old: old[:9000]),
        f"{FIRST}: corrupt wave, 3988 samples where its header says 8000",
    ),
    "a wave has a flipped bit": (
        put(FIRST, lambda old: old[:-1] + bytes([old[-1] ^ 1])),
        f"{FIRST}: corrupt wave, its samples do not add up",
    ),
    "a wave is of another kind": (put(FIRST, stereo()), f"{FIRST}: .*8000, 2.* is not SPHERE of 16 bit"),
    "a transcript has no audio": (
        both(edit(LISTS + "train.fileids", b"an2-fbea-b", None), drop(WAVES + "fbea/an2-fbea-b.sph")),
        f"{LISTS}train.transcription:7: transcript of an2-fbea-b, for which no audio",
    ),
    "listed audio has no transcript": (
        edit(LISTS + "train.transcription", b"(an2-fbea-b)", None),
        f"{LISTS}train.fileids:6: utterance an2-fbea-b has no transcript",
    ),
    "a wave is in no list": (
        put(WAVES + "fann/an9-fann-b.sph", b""),
        f"{WAVES}fann/an9-fann-b.sph: audio without a transcript",
    ),
    "a count is off": (
        both(
            edit(LISTS + "train.fileids", b"an2-fbea-b", None),
            edit(LISTS + "train.transcription", b"(an2-fbea-b)", None),
            drop(WAVES + "fbea/an2-fbea-b.sph"),
        ),
        f"{LISTS}train.fileids: lists 11 utterances, not 12",
    ),
    "an id is listed twice": (
        edit(LISTS + "train.fileids", b"fann/an2-fann-b", b"fann/an1-fann-b"),
        f"{LISTS}train.fileids:3: utterance an1-fann-b is listed twice, first at {LISTS}train.fileids:2",
    ),
    "an id has two transcripts": (
        edit(LISTS + "train.transcription", b"(an2-fann-b)", b"(an1-fann-b)"),
        f"{LISTS}train.transcription:11: utterance an1-fann-b has a transcript already, {LISTS}train.transcr",
    ),
    "an id is in both sets": (
        both(
            edit(LISTS + "test.fileids", b"an0-feve-b", b"an0-fann-b"),
            edit(LISTS + "test.transcription", b"an0-feve-b", b"an0-fann-b"),
            put("an4/wav/an4test_clstk/feve/an0-fann-b.sph", b""),
        ),
        f"{LISTS}test.fileids:1: utterance an0-fann-b is in both sets",
    ),
    "a speaker is in both sets": (
        both(
            edit(LISTS + "test.fileids", b"feve/", b"fann/"),
            put("an4/wav/an4test_clstk/fann/an0-feve-b.sph", b""),
        ),
        f"{LISTS}test.fileids:1: speaker fann is in both sets",
    ),
    "a transcript has no id": (
        edit(LISTS + "train.transcription", b"(an2-fbea-b)", b""),
        f"{LISTS}train.transcription:7: bad transcript line, not of the form",
    ),
    "a transcript has a digit": (
        edit(LISTS + "test.transcription", b"O'HARA T W O (an0-feve-b)", b"O'HARA 2 (an0-feve-b)"),
        f'{LISTS}test.transcription:2: bad transcript line, "O\'HARA 2"',
    ),
    "a listed path leads elsewhere": (
        edit(LISTS + "train.fileids", b"an4_clstk/fann/an0-fann-b", b"../etc/an0-fann-b"),
        f"{LISTS}train.fileids:1: '../etc/an0-fann-b' is not an4_clstk/speaker/id",
    ),
    "a list is missing": (drop(LISTS + "test.fileids"), f"{LISTS}test.fileids: is not in the archive"),
    "a list is no text": (put(LISTS + "test.fileids", b"\xff\xfe"), f"{LISTS}test.fileids: is not text"),
    "the voices are all of one kind": (
        all_women,
        f"{LISTS}train.fileids: only 0 speakers whose name begins with m",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_archive_names_the_file_and_leaves_nothing_behind(case, small_an4, tmp_path):
    spoil, why = SPOILT[case]
    files = dict(small_an4.files)
    spoil(files)
    path = small_an4.pack(tmp_path / "an4.tar.gz", files)
    with pytest.raises(DataError, match=f"an4.tar.gz: {why.replace('(', '[(]')}.*fetch it again") as caught:
        prepare(tmp_path / "made" / "an4", path, source=small_an4.source)
    assert "\n" not in str(caught.value) and str(caught.value).count(str(tmp_path)) == 1
    assert list((tmp_path / "made").iterdir()) == []


def test_too_little_speech_is_an_error(small_an4, tmp_path):
    path = small_an4.pack(tmp_path / "an4.tar.gz", small_an4.files)
    with pytest.raises(DataError, match="an4.tar.gz: an4/wav: 0.12 minutes of speech, not 0.2"):
        prepare(tmp_path / "an4", path, source=replace(small_an4.source, minutes=0.2))
    assert not (tmp_path / "an4").exists()
