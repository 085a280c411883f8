"""MSCOCO from a server of our own: digests, resuming, and zip archives that try to do harm."""

import io
import json
import re
import zipfile
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
from PIL import Image
from typer import Typer
from typer.testing import CliRunner

from data_prep import coco
from data_prep.captions import verify_corpus
from data_prep.coco import COCO, prepare
from data_prep.corpus import DataError, sha256_of
from data_prep.fetch import unpack_zip
from hlstm_src.corpora import CaptionCorpus

SPLITS = {"train": "train2014", "restval": "val2014", "val": "val2014", "test": "val2014"}


def files():
    """Name -> bytes of a small MSCOCO: five words so often that they are words, two pictures a split."""
    images, out = [], {}
    for n, (split, folder) in enumerate(SPLITS.items()):
        for k in range(2):
            number = 10 * n + k
            name = f"COCO_{folder}_{number:012d}.jpg"
            said = [{"raw": f"A dog on a sofa, number {number}", "sentid": 100 * number + j} for j in range(5)]
            images.append({"filepath": folder, "filename": name, "cocoid": number, "imgid": number, "split": split,
                           "sentences": said})
            file = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(file, "JPEG")
            out[f"{folder}/{name}"] = file.getvalue()
    return out | {"dataset_coco.json": json.dumps({"dataset": "coco", "images": images}).encode()}


@pytest.fixture
def web(tmp_path):
    """The three archives in a folder, and a source that names them at 127.0.0.1, not yet served."""
    (tmp_path / "web").mkdir()
    for name, start in (("caption_datasets.zip", "dataset"), ("train2014.zip", "train"), ("val2014.zip", "val")):
        with zipfile.ZipFile(tmp_path / "web" / name, "w") as archive:
            for path, data in files().items():
                if path.startswith(start):
                    archive.writestr(path, data)
    return tmp_path / "web"


@pytest.fixture
def source(web, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=web)) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        urls = {name: f"http://127.0.0.1:{server.server_port}/{name}" for name in COCO.urls}
        yield replace(COCO, urls=urls, pictures={"train": 4, "valid": 2, "test": 2})
        server.shutdown()
        thread.join()


def test_a_download_is_trusted_by_its_digests_alone_and_built_from(source, web, tmp_path):
    out, said = tmp_path / "data/coco", []
    with pytest.raises(DataError) as error:
        prepare(out, source=source, say=said.append)
    assert len(said) == 1 and "no SHA-256 of these archives is known" in said[0] and not out.exists()
    digests = [sha256_of(web / name) for name in source.urls]
    assert re.findall(r"pass --sha256 (\w+)$", str(error.value), re.MULTILINE) == digests
    info, new = prepare(out, sha256=[digest.upper() for digest in digests], source=source, say=said.append)
    assert new and len(said) == 1 and verify_corpus(out) == info and info["min_count"] == 5
    assert sorted(p.name for p in out.parent.iterdir()) == sorted(["coco", *source.urls])
    corpus = CaptionCorpus(out)
    assert [p.id for p in corpus.split("train")] == ["0", "1", "10", "11"], "restval is for training"
    assert corpus.split("test")[0].path.name == "COCO_val2014_000000000030.jpg"
    assert set(corpus.vocabulary.words) == {"UNK", "a", "dog", "on", "sofa", "number", "0", "1", "10", "11"}


def test_a_digest_that_is_not_right_stops_before_anything_is_unpacked(source, web, tmp_path):
    digests = [sha256_of(web / name) for name in list(source.urls)[:2]]
    with pytest.raises(DataError, match=r"val2014.zip.unlisted: .*which is not a known one"):
        prepare(tmp_path / "data/coco", sha256=digests, source=source)
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == [
        "caption_datasets.zip", "train2014.zip", "val2014.zip.unlisted"]


def test_files_on_disk_give_the_same_corpus(source, web, tmp_path):
    prepare(tmp_path / "one/coco", sha256=[sha256_of(web / name) for name in source.urls], source=source)
    for path, data in files().items():
        (tmp_path / "disk" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "disk" / path).write_bytes(data)
    on_disk = prepare(tmp_path / "two/coco", tmp_path / "disk/dataset_coco.json", tmp_path / "disk", source=source)
    assert on_disk[0] == verify_corpus(tmp_path / "one/coco")


def test_another_number_of_pictures_is_refused(web, tmp_path):
    for name in COCO.urls:
        unpack_zip(web / name, tmp_path / "disk")
    with pytest.raises(DataError, match="dataset_coco.json: key 'images' has .*'train': 4.*, not .*113287"):
        prepare(tmp_path / "coco", tmp_path / "disk/dataset_coco.json", tmp_path / "disk")


@pytest.mark.parametrize("options, what", [
    (dict(sha256=["12"]), "--sha256 12: is not 64"),
    (dict(captions="a.json"), "give both --captions and --images"),
])
def test_wrong_options_are_refused_before_a_download(options, what, tmp_path, monkeypatch):
    monkeypatch.setattr(coco, "download", lambda *_, **__: pytest.fail("downloaded"))
    with pytest.raises(DataError, match=what):
        prepare(tmp_path / "coco", **options)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="is no corpus called coco"):
        prepare(tmp_path)


def test_the_command_line_says_each_error_in_a_line(source, tmp_path, monkeypatch):
    app = Typer()
    app.command()(coco.main)
    monkeypatch.setattr(coco, "prepare", partial(prepare, source=source))
    done = CliRunner().invoke(app, ["--out", str(tmp_path / "data/coco")])
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.exit_code == 1 and len(lines) == 3 and all("pass --sha256" in line for line in lines)
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini/corpus.json").write_text('{"name": "mini"}')
    done = CliRunner().invoke(app, ["--out", str(tmp_path / "mini"), "--check"])
    assert done.exit_code == 1 and "mini: is the corpus mini; name the folder of coco with --out" in done.stderr


def put(archive, name, data=b"data", **about):
    """One member of a zip archive, with fields of its header changed."""
    info = zipfile.ZipInfo(name)
    for key, value in about.items():
        setattr(info, key, value)
    archive.writestr(info, data)


@pytest.mark.parametrize("name, about, what", [
    ("../out.jpg", {}, "leads out of the folder"),
    ("a/../../out.jpg", {}, "leads out of the folder"),
    ("/etc/out.jpg", {}, "absolute path"),
    ("C:/out.jpg", {}, "absolute path"),
    ("link", {"external_attr": 0o120777 << 16}, "is a link"),
])
def test_members_that_would_do_harm_are_refused_before_any_is_written(name, about, what, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        put(archive, "good.jpg")
        put(archive, name, **about)
    with pytest.raises(DataError, match=f"a.zip: member .* {what}"):
        unpack_zip(tmp_path / "a.zip", tmp_path / "in")
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.parametrize("names, what", [
    (("a", "./a"), "member './a' is there twice"), (("a/b", "a//b"), "member 'a//b' is there twice"),
    ((".", "a"), "is a file without a name"), (("a", "a/b"), "member 'a/b': a file and a folder of one name"),
    (("a" * 300,), "too long")])
def test_names_that_cannot_stand_beside_each_other_are_refused(names, what, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in names:
            put(archive, name)
    with pytest.raises(DataError, match=f"a.zip: .*{what}"):
        unpack_zip(tmp_path / "a.zip", tmp_path / "in")


def test_a_name_that_ends_in_part_is_a_name_like_others(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        put(archive, "a.part", b"one")
        put(archive, "a", b"two")
    unpack_zip(tmp_path / "a.zip", tmp_path / "in")
    assert {p.name: p.read_bytes() for p in (tmp_path / "in").iterdir()} == {"a.part": b"one", "a": b"two"}


def test_zips_that_are_damaged_too_large_or_hold_a_file_twice_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        put(archive, "a.jpg", b"x" * 1000)
    with pytest.raises(DataError, match="goes past the limit of 999 bytes"):
        unpack_zip(tmp_path / "a.zip", tmp_path / "in", max_bytes=999)
    with pytest.raises(DataError, match="goes past the limit"):
        unpack_zip(tmp_path / "a.zip", tmp_path / "in", max_members=0)
    data = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "b.zip").write_bytes(data.replace(b"xxxx", b"xxxy"))
    (tmp_path / "c.zip").write_bytes(data[:-30])
    for name in ("b.zip", "c.zip"):
        with pytest.raises(DataError, match=f"{name}: truncated or damaged"):
            unpack_zip(tmp_path / name, tmp_path / "in")
    assert not (tmp_path / "in/a.jpg").exists()
    with pytest.raises(DataError, match="none.zip: no such file"):
        unpack_zip(tmp_path / "none.zip", tmp_path / "in")
    with zipfile.ZipFile(tmp_path / "e.zip", "w") as archive:
        put(archive, "é.jpg")
    (tmp_path / "e.zip").write_bytes((tmp_path / "e.zip").read_bytes().replace("é".encode(), b"\xc3\xc3"))
    with pytest.raises(DataError, match="e.zip: truncated or damaged"):
        unpack_zip(tmp_path / "e.zip", tmp_path / "in")
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        put(archive, "a.jpg")
        with pytest.warns(UserWarning):
            put(archive, "a.jpg")
    with pytest.raises(DataError, match="'a.jpg' is there twice"):
        unpack_zip(tmp_path / "d.zip", tmp_path / "in")


def test_unpacking_goes_on_where_it_was_stopped(web, tmp_path):
    unpack_zip(web / "val2014.zip", tmp_path / "in")
    done, cut, gone = sorted((tmp_path / "in/val2014").iterdir())[:3]
    stamp = done.stat().st_mtime_ns
    data = cut.read_bytes()
    cut.write_bytes(data[:100])
    gone.unlink()
    unpack_zip(web / "val2014.zip", tmp_path / "in")
    assert done.stat().st_mtime_ns == stamp and cut.read_bytes() == data and gone.exists()
    assert not list((tmp_path / "in").rglob("*.part"))
