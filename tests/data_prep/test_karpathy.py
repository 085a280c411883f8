"""Caption files of both layouts, whole and with one thing wrong; marked `real`, from the true archives."""

import copy
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_prep import karpathy
from data_prep.captions import verify_corpus
from data_prep.corpus import DataError
from data_prep.karpathy import hashed_split, prepare_archive, prepare_folder
from hlstm_src.corpora import CaptionCorpus

SPLITS = ["train", "train", "restval", "val", "test", "test"]


def png(k):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 20 * k, np.uint8)).save(file, "PNG")
    return file.getvalue()


def karpathy_file():
    """A data set of six pictures with two sentences each; the tokens of the file differ from what was written."""
    images = []
    for k, split in enumerate(SPLITS):
        said = [f"A picture of {k}.", f"It's a Picture, number {k}"]
        sentences = [{"tokens": ["wrong"], "raw": raw, "imgid": k, "sentid": 2 * k + n} for n, raw in enumerate(said)]
        images.append({"filename": f"{k}.png", "split": split, "imgid": k, "sentences": sentences})
    return {"dataset": "six", "images": images}


def coco_file():
    """The same in the layout of MSCOCO, with forty pictures."""
    images = [{"id": 100 + k, "file_name": f"{k}.png"} for k in range(40)]
    said = [{"id": k, "image_id": 139 - k, "caption": f"Picture {k}"} for k in range(40)]
    return {"info": {}, "images": images, "annotations": said}


@pytest.fixture
def place(tmp_path):
    """A function that writes a caption file and pictures into a folder of their own and returns both paths."""
    def put(data, pictures=40, name="six", file="dataset.json"):
        folder = tmp_path / name
        (folder / "images").mkdir(parents=True)
        for k in range(pictures):
            (folder / f"images/{k}.png").write_bytes(png(k % 12))
        (folder / file).write_text(data if isinstance(data, str) else json.dumps(data))
        return folder / file, folder / "images"
    return put


def pack(path, folder):
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, folder.name)
    return path


def files_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_whole_file_becomes_a_corpus(place, tmp_path):
    captions, images = place(karpathy_file())
    info, new = prepare_folder(tmp_path / "out", captions, images)
    corpus = CaptionCorpus(tmp_path / "out")
    assert new and info == verify_corpus(tmp_path / "out") and corpus.name == "six"
    assert {split: total["pictures"] for split, total in info["splits"].items()} == {"train": 3, "valid": 1, "test": 2}
    assert [p.id for p in corpus.split("train")] == ["0", "1", "2"], "restval is for training"
    first = corpus.pictures[0]
    assert first.captions == (("a", "picture", "of", "0"), ("it", "'s", "a", "picture", "number", "0"))
    assert first.raw == ("A picture of 0.", "It's a Picture, number 0") and first.path.read_bytes() == png(0)


def test_archive_and_folder_give_the_same_bytes(place, tmp_path):
    captions, images = place(karpathy_file())
    (captions.parent / "README").write_text("who may use it")
    archive = pack(tmp_path / "six.tar.gz", captions.parent)
    prepare_folder(tmp_path / "one", captions, images)
    assert prepare_archive(tmp_path / "two", archive)[1] and not prepare_archive(tmp_path / "two", archive)[1]
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two") and "README" in files_of(tmp_path / "two")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "six", "six.tar.gz", "two"]


@pytest.mark.parametrize("relative", [True, False])
def test_links_to_pictures_become_pictures(relative, place, tmp_path):
    captions, images = place(karpathy_file())
    (captions.parent / "licenses").mkdir()                         # a folder is no notice
    linked = tmp_path / "linked"
    linked.mkdir()
    for k in range(6):
        (linked / f"{k}.png").symlink_to(f"../six/images/{k}.png" if relative else images / f"{k}.png")
    prepare_folder(tmp_path / "out", captions, linked)
    prepare_folder(tmp_path / "plain", captions, images)
    assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "plain")


def test_pictures_may_lie_in_subfolders_or_flat(place, tmp_path):
    data = karpathy_file()
    for image in data["images"]:
        image["filepath"], image["cocoid"] = "train2014", 500 + image["imgid"]
    captions, images = place(data)
    prepare_folder(tmp_path / "flat", captions, images)
    (images / "train2014").mkdir()
    for k in range(6):
        (images / f"{k}.png").rename(images / f"train2014/{k}.png")
    prepare_folder(tmp_path / "deep", captions, images)
    assert files_of(tmp_path / "flat") == files_of(tmp_path / "deep")
    assert (tmp_path / "deep/images/train2014/0.png").is_file()
    assert CaptionCorpus(tmp_path / "deep").pictures[0].id == "500"


def test_annotations_of_mscoco_get_a_fixed_split(place, tmp_path):
    data = coco_file()
    captions, images = place(data, file="captions_train2014.json")
    info, _ = prepare_folder(tmp_path / "out", captions, images)
    corpus = CaptionCorpus(tmp_path / "out")
    assert corpus.name == "captions_train2014" and len(corpus.pictures) == 40
    for picture in corpus.pictures:
        assert picture.split == hashed_split(picture.path.name)
        assert picture.raw == (f"Picture {139 - int(picture.id)}",)
    shutil.rmtree(captions.parent)
    captions, images = place(data | {"images": data["images"][::-1]}, file="captions_train2014.json")
    prepare_folder(tmp_path / "again", captions, images)
    splits = [{p.id: p.split for p in CaptionCorpus(tmp_path / name).pictures} for name in ("out", "again")]
    assert splits[0] == splits[1], "the order of a file decides nothing"


@given(st.integers(0, 10**6))
def test_of_twenty_pictures_about_one_is_for_validation_and_one_for_the_test(start):
    counts = Counter(hashed_split(f"{start + k}.jpg") for k in range(2000))
    assert set(counts) == {"train", "valid", "test"}
    assert all(50 < counts[split] < 160 for split in ("valid", "test"))


def change(*path, to):
    """A spoiler: the value at `path` in the caption file becomes `to`, or is taken away if that is None."""
    def spoil(data):
        item = data
        for key in path[:-1]:
            item = item[key]
        if to is None:
            del item[path[-1]]
        else:
            item[path[-1]] = to
    return spoil


SPOILT = {
    "another layout": (change("images", to={}), "key 'images' is not a list of pictures .* it holds: dataset, images"),
    "no pictures": (change("images", to=[]), "key 'images' is not a list"),
    "pictures of another kind": (change("images", 0, to="0.png"), "key 'images' is not a list"),
    "no sentences": (change("images", 0, "sentences", to=None), "key 'images' is not a list"),
    "sentences of one missing": (change("images", 2, "sentences", to=None), r"images\[2\].sentences: is missing"),
    "an empty list": (change("images", 2, "sentences", to=[]), r"images\[2\]: the picture '2.png' has no caption"),
    "an empty caption": (change("images", 1, "sentences", 1, "raw", to=" . "),
                         r"images\[1\].sentences\[1\].raw: the caption '.' has no word; .* or pass --skip-empty"),
    "a caption that is no text": (change("images", 1, "sentences", 0, "raw", to=7), r"sentences\[0\].raw: is 7"),
    "a sentence that is no record": (change("images", 1, "sentences", 0, to="A"), r"sentences\[0\].raw: is missing"),
    "an unknown split": (change("images", 3, "split", to="dev"), r"images\[3\].split: 'dev' is none of train, restval"),
    "no split": (change("images", 3, "split", to=None), r"images\[3\].split: is missing"),
    "no file name": (change("images", 3, "filename", to=None), r"images\[3\].filename: is missing"),
    "a picture's id twice": (change("images", 3, "imgid", to=1), r"images\[3\].imgid: the id 1 is that of images\[1\]"),
    "a sentence's id twice": (change("images", 3, "sentences", 0, "sentid", to=1),
                              r"images\[3\].sentences\[0\].sentid: the id 1 is that of images\[0\].sentences\[1\]"),
    "a file twice": (change("images", 3, "filename", to="1.png"), "id '1' stands there twice"),
    "a file elsewhere": (change("images", 3, "filename", to="../3.png"), r"images\[3\]: .*not a plain relative path"),
    "an absolute path": (change("images", 3, "filepath", to="/etc"), r"images\[3\]: .*not a plain relative path"),
    "a picture that is not there": (change("images", 3, "filename", to="x.png"), "x.png: the picture of 'x' is"),
    "the same file, spelled otherwise": (change("images", 3, "filename", to="./1.png"), "'1' stands there twice"),
    "a name that cannot be seen": (change("images", 3, "filename", to="5\r6.png"), r"images\[3\]: .*not a plain"),
    "a number that cannot be seen": (change("images", 3, "cocoid", to="5\r6"),
                                     r"images\[3\].cocoid: '5.r6' is no name"),
    "a number that is none": (change("images", 3, "cocoid", to={"a": 1}), r"images\[3\].cocoid: is \{'a': 1\}"),
    "an empty number": (change("images", 3, "cocoid", to=" "), r"images\[3\].cocoid: ' ' is no name"),
    "a caption without an end": (change("images", 1, "sentences", 0, "raw", to="a dog " * 9999),
                                 r"images\[1\].sentences\[0\].raw: the caption has 59,993 characters, more than"),
    "no test pictures": (change("images", slice(4, 6), to=[]), "no picture in split test"),
}


@pytest.mark.parametrize("what", SPOILT)
@pytest.mark.parametrize("packed", [False, True])
def test_a_spoilt_file_is_refused_and_leaves_nothing(what, packed, place, tmp_path):
    data = karpathy_file()
    SPOILT[what][0](data)
    captions, images = place(data)
    archive = pack(tmp_path / "six.tar.gz", captions.parent)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=SPOILT[what][1]) as error:
        if packed:
            prepare_archive(tmp_path / "out", archive)
        else:
            prepare_folder(tmp_path / "out", captions, images)
    assert (str(archive) if packed else "dataset.json") in str(error.value) or "x.png" in str(error.value)
    assert "\n" not in str(error.value) and sorted(tmp_path.iterdir()) == before


COCO_SPOILT = {
    "an id twice": (change("images", 1, "id", to=100), r"images\[1\].id: the id 100 is that of images\[0\]"),
    "a caption of nothing": (change("annotations", 2, "image_id", to=7), r"annotations\[2\].image_id: no picture has"),
    "an empty caption": (change("annotations", 2, "caption", to=""), r"annotations\[2\].caption: the caption '' has"),
    "a picture without": (change("annotations", slice(0, 1), to=[]), r"images\[39\]: .* has no caption"),
    "no file name": (change("images", 1, "file_name", to=None), r"images\[1\].file_name: is missing"),
}


@pytest.mark.parametrize("what", COCO_SPOILT)
def test_spoilt_annotations_are_refused(what, place, tmp_path):
    data = coco_file()
    COCO_SPOILT[what][0](data)
    with pytest.raises(DataError, match=COCO_SPOILT[what][1]):
        prepare_folder(tmp_path / "out", *place(data))
    assert not (tmp_path / "out").exists()


def test_pictures_may_have_no_id_of_mscoco(place, tmp_path):
    data = karpathy_file()
    for image in data["images"]:
        image["cocoid"] = None
    prepare_folder(tmp_path / "out", *place(data))
    assert {p.id for p in CaptionCorpus(tmp_path / "out").pictures} == set("012345")


def test_empty_captions_are_left_out_where_that_is_wanted(place, tmp_path):
    data = karpathy_file()
    data["images"][1]["sentences"][1]["raw"] = "  "
    info, _ = prepare_folder(tmp_path / "out", *place(data), skip_empty=True)
    assert info["splits"]["train"]["captions"] == 5


@pytest.mark.parametrize("text, what", [
    ("[", "not JSON"), ("[" * 200_000, "not JSON"), ('{"images": [{"sentences": "a cat \\ud83d"}]}', "not JSON"),
    ("[]", "holds: list"), ('{"a": 1}', "holds: a;"), ('{"images": [{}], "annotations": null}', "list 'annotations'"),
    ('{"images": [{}], "annotations": 5}', "list 'annotations'")])
def test_what_is_no_caption_file_is_refused(text, what, place, tmp_path):
    with pytest.raises(DataError, match=f"dataset.json: .*{what}"):
        prepare_folder(tmp_path / "out", *place(text))


def test_an_archive_without_a_caption_file_or_with_two_is_refused(place, tmp_path):
    captions, _ = place(karpathy_file())
    shutil.copy(captions, captions.with_name("dataset_2.json"))
    with pytest.raises(DataError, match="holds 2 files dataset"):
        prepare_archive(tmp_path / "out", pack(tmp_path / "a.tar.gz", captions.parent))
    for file in captions.parent.glob("*.json"):
        file.unlink()
    with pytest.raises(DataError, match="holds 0 files dataset"):
        prepare_archive(tmp_path / "out", pack(tmp_path / "a.tar.gz", captions.parent))


def test_an_archive_that_leads_elsewhere_is_refused(place, tmp_path):
    captions, _ = place(karpathy_file())
    archive = tmp_path / "bad.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(captions, "six/../../dataset.json")
    with pytest.raises(DataError, match="bad.tar.gz: member .* leads out of the folder"):
        prepare_archive(tmp_path / "out", archive)


def test_another_folder_is_left_alone(place, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="is no corpus called six"):
        prepare_folder(tmp_path / "thesis", *place(karpathy_file()))
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]


def test_the_command_line_builds_checks_and_reports(place, tmp_path):
    captions, images = place(karpathy_file())
    def run(*arguments):
        command = [sys.executable, "-m", "data_prep.karpathy", "--out", "out", *map(str, arguments)]
        env = os.environ | {"PYTHONPATH": str(Path(karpathy.__file__).parents[1])}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    built = run("--captions", captions, "--images", images, "--min-count", 3)
    assert built.returncode == 0 and "out is ready" in built.stdout and "at least 3 times" in built.stdout
    assert "is valid" in run("--check").stdout
    (tmp_path / "out/images/3.png").write_bytes(b"")
    for arguments, what in ((["--check"], "3.png: differs"), (["--captions", captions], "give either --archive"),
                            (["--archive", "nowhere.tar.gz"], "nowhere.tar.gz: no such file"),
                            (["--archive", images], f"{images}: a folder; name a file"),
                            (["--archive", captions, "--out", f"{captions}/below"], "where a folder is needed"),
                            (["--captions", captions, "--images", images, "--min-count", 10 ** 6],
                             "no word stands 1,000,000 times"),
                            (["--captions", captions, "--images", "none"], "none: no such folder")):
        done = run(*arguments)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and what in done.stderr
        assert done.stderr.count("\n") == 1


def test_nothing_of_the_users_file_is_changed(place, tmp_path):
    captions, images = place(karpathy_file())
    before = copy.deepcopy(files_of(captions.parent))
    prepare_folder(tmp_path / "out", captions, images)
    shutil.rmtree(tmp_path / "out")
    assert files_of(captions.parent) == before


@pytest.mark.real
@pytest.mark.parametrize("name, sizes, words", [("ucm", (1680, 210, 210), 304), ("flowers", (7053, 479, 657), 1065)])
def test_the_real_archives(name, sizes, words, tmp_path, real_data):
    archive = real_data / f"{name}_captions.tar.gz"
    if not archive.exists():
        pytest.skip(f"{archive} is not there")
    info, new = prepare_archive(tmp_path / name, archive)
    assert new and verify_corpus(tmp_path / name) == info and info["name"] == name and info["words"] == words
    assert tuple(total["pictures"] for total in info["splits"].values()) == sizes
    corpus = CaptionCorpus(tmp_path / name)
    said = [len(p.captions) for p in corpus.pictures]
    assert set(said) == ({5} if name == "ucm" else {1})
    side = 256 if name == "ucm" else 224
    assert {corpus.image(p).size for p in corpus.split("test", limit=5)} == {(side, side)}
    tokens = [corpus.vocabulary.encode(caption) for p in corpus.split("test") for caption in p.captions]
    unknown = sum(k == 1 for ids in tokens for k in ids) / sum(map(len, tokens))
    assert unknown < 0.03 and max(map(len, tokens)) == 16


def six(tmp_path, **changes):
    """A caption file of six pictures (3 to train on, 1, 2), and the folder of the pictures."""
    folder, images = tmp_path / "six", []
    (folder / "images").mkdir(parents=True)
    for k, split in enumerate(["train", "train", "train", "val", "test", "test"]):
        Image.new("RGB", (8, 8), (20 * k, 0, 0)).save(folder / f"images/{k}.png")
        images.append({"filename": f"{k}.png", "split": split, "sentences": [{"raw": f"A picture of {k}"}]} | changes)
    (folder / "dataset.json").write_text(json.dumps({"dataset": "six", "images": images}))
    return folder / "dataset.json", folder / "images"


def test_the_split_of_a_name_is_its_hash():
    for split, rest in (("valid", 0), ("test", 1)):
        name = next(f"{k}.png" for k in range(200) if hashed_split(f"{k}.png") == split)
        assert int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 20 == rest


def test_pictures_are_counted_by_split(tmp_path):
    with pytest.raises(DataError, match="pictures, not"):
        prepare_folder(tmp_path / "out", *six(tmp_path), expected={"train": 2, "valid": 2, "test": 2})


def test_words_that_are_rare_are_left_out_of_the_vocabulary_from_the_count_that_is_asked_for(tmp_path):
    captions, images = six(tmp_path)
    for count in (1, 3):
        assert prepare_folder(tmp_path / f"{count}", captions, images, min_count=count)[0]["min_count"] == count


def test_notices_are_those_of_the_folder_with_the_pictures(tmp_path):
    captions, images = six(tmp_path)
    (captions.parent / "README").write_text("of the captions")
    elsewhere = images.rename(tmp_path / "pictures")
    prepare_folder(tmp_path / "out", captions, elsewhere)
    assert not (tmp_path / "out" / "README").exists()


def test_a_picture_at_its_whole_path_comes_before_one_of_its_name(tmp_path):
    captions, images = six(tmp_path, filepath="val")
    (images / "val").mkdir()
    for k in range(6):
        Image.new("RGB", (8, 8), (0, 20 * k + 5, 0)).save(images / f"val/{k}.png")
    prepare_folder(tmp_path / "out", captions, images)
    for k in range(6):
        (file,) = (tmp_path / "out").rglob(f"{k}.png")
        assert file.read_bytes() == (images / f"val/{k}.png").read_bytes()


def test_a_caption_may_have_as_many_characters_as_are_allowed(tmp_path):
    assert prepare_folder(tmp_path / "out", *six(tmp_path, sentences=[{"raw": "a" * karpathy.LONGEST}]))[1]
