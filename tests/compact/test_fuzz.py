"""Model files that are damaged or hostile: refused in one line that names the file, or read; and nothing else.

The files are small recognisers and captioners of random weights. What is read must also run, since indices from the
file end up as addresses in the kernels.
"""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from hlstm_src import load_compact
from hlstm_src.audio import ALPHABET
from hlstm_src.compact.captioner import Captioner
from hlstm_src.compact.format import FORMAT, ModelFile, ModelFileError, from_gaps, gaps, write
from hlstm_src.deepspeech2 import DeepSpeech2
from hlstm_src.neuraltalk import NeuralTalk

MEGABYTE = 1 << 20
WAVE = np.random.default_rng(0).normal(0, 0.1, 2000).astype(np.float32)
FEATURES = np.random.default_rng(0).normal(0, 1, (2, 5)).astype(np.float32)
RECOGNISER = DeepSpeech2, {"labels": len(ALPHABET), "hidden": 6, "channels": 2}, {
    "kind": "recogniser", "alphabet": ALPHABET, "scores": {"wer": 1.5}}
CAPTIONER = NeuralTalk, {"words": 7, "features": 5, "hidden": 6, "embedding": 4, "encoder": None}, {
    "kind": "captioner", "vocabulary": ["UNK", "a", "cat", "and", "dog", "sit"], "longest": 9, "encoder": "vgg16"}
TINY = NeuralTalk, CAPTIONER[1] | {"encoder": "tiny"}, CAPTIONER[2] | {"encoder": "tiny"}
MODELS = {
    "lstm": (RECOGNISER, {"cell": "lstm", "layers": 2}, "fp32"),
    "gru": (RECOGNISER, {"cell": "gru", "layers": 1}, "int8"),
    "hlstm": (RECOGNISER, {"cell": "hlstm", "layers": 2, "gate_layers": 2}, "fp16"),
    "uneven": (RECOGNISER, {"cell": "hlstm", "layers": 1, "gate_width": {"f": 3, "i": 4, "o": 5, "g": 6}}, "fp16"),
    "captioner": (CAPTIONER, {"cell": "hlstm", "layers": 1}, "fp16"),
    "captioner tiny": (TINY, {"cell": "gru", "layers": 2}, "int8"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model of each kind; half its recurrent matrices have masks, one of them nearly empty."""
    folder, rng = tmp_path_factory.mktemp("models"), np.random.default_rng(0)
    for name, ((make, usual, about), options, values) in MODELS.items():
        sizes = usual | options
        torch.manual_seed(0)
        tensors = {k: v.numpy() for k, v in make(**sizes).state_dict().items() if "num_batches" not in k}
        masks = {k: rng.random(v.shape) < (0.02 if "hh" in k else 0.4) for k, v in tensors.items()
                 if k.startswith(("rnns.0.rnn.weight", "rnn.weight")) or make is NeuralTalk and k == "output.weight"}
        write(folder / f"{name}.safetensors", tensors, masks, about | {"model": sizes}, values)
        if make is NeuralTalk:                                     # compiled here, so that no test measures numba
            load_compact(folder / f"{name}.safetensors").caption(FEATURES)
    return folder


def numbers(model) -> np.ndarray:
    """What the model says of some input, before it becomes text."""
    if isinstance(model, Captioner):
        return model.step(np.zeros(2, int), np.arange(2), model.start(FEATURES))[0]
    return model.log_probs(WAVE)


def parts(path) -> tuple[dict, dict]:
    """Tensors and metadata of a file."""
    data = path.read_bytes()
    header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
    return load(data), json.loads(header["__metadata__"]["json"])


def put(path, tensors, metadata) -> None:
    path.write_bytes(save(tensors, metadata={"json": json.dumps(metadata)}))


def refused(path) -> str:
    """The error of a file that cannot be used, a line that begins with its name and says what to do."""
    with pytest.raises(ModelFileError) as caught:
        load_compact(path)
    return told(path, caught.value)


def told(path, error: ModelFileError) -> str:
    text = str(error)
    assert text.startswith(f"{path}: ") and text.isprintable() and len(text) < 1000, text
    assert any(told in text for told in ("no such file", "name a file", "restore", "update")), text
    return text


def read_or_refused(path) -> None:
    """The file is refused, or becomes a model that writes letters or words of its own; neither takes much memory."""
    tracemalloc.start()
    try:
        with np.errstate(all="ignore"):                            # weights may be absurd, as long as they are numbers
            model = load_compact(path)
            if isinstance(model, Captioner):
                said, pixels = model.caption(FEATURES), np.ones((3, 64, 64)) * (model.encoder == "tiny")
                said += [model.caption(pixels)] if pixels.any() else []
                assert len(said) >= 2 and set(" ".join(said).split()) <= set(" ".join(model.vocabulary).split())
            else:
                assert set(model.transcribe(WAVE)) <= set(ALPHABET)
    except ModelFileError as error:
        told(path, error)
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert most < 32 * MEGABYTE


# Whole files ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MODELS)
def test_the_files_that_are_spoilt_here_are_good(folder, name):
    path = folder / f"{name}.safetensors"
    assert np.isfinite(numbers(load_compact(path))).all()
    tensors, metadata = parts(path)
    again = folder / "again"
    put(again, tensors, metadata)
    np.testing.assert_array_equal(numbers(load_compact(again)), numbers(load_compact(path)))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3000), max_size=40), st.integers(0, 700))
def test_gaps_say_what_the_mask_says(places, behind):
    mask = np.zeros(max(places, default=0) + 1 + behind, bool)
    mask[places] = True
    np.testing.assert_array_equal(from_gaps(gaps(mask), mask.size), np.flatnonzero(mask))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 4) | st.integers(250, 255), max_size=8), st.integers(0, 1500))
def test_gaps_that_are_read_are_those_that_would_be_written(coded, size):
    """So nothing that was changed in them goes unseen, and no place lies outside of the matrix."""
    coded = np.array(coded, np.uint8)
    try:
        places = from_gaps(coded, size)
    except ValueError:
        return
    mask = np.zeros(size, bool)
    mask[places] = True
    np.testing.assert_array_equal(gaps(mask), coded)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["fp32", "fp16", "int8"]), st.integers(1, 40), st.integers(1, 60), st.floats(0, 1),
       st.integers(0, 99))
def test_a_file_gives_what_was_written(folder, values, rows, columns, density, seed):
    rng, path = np.random.default_rng(seed), folder / "written"
    tensors = {"sparse": rng.normal(size=(rows, columns)), "dense": rng.normal(size=(rows, columns, 2)),
               "vector": rng.normal(size=columns)}
    mask = rng.random((rows, columns)) < density
    write(path, tensors, {"sparse": mask}, {"some": "text"}, values)
    file = ModelFile(path)
    assert file.metadata == {"format": FORMAT, "some": "text"}
    for name, tensor in tensors.items():
        found, alive = file.tensor(name, tensor.shape)
        tensor = np.where(mask, tensor, 0) if name == "sparse" else tensor
        step = np.abs(tensor).reshape(len(tensor), -1).max(1).reshape(-1, *[1] * (tensor.ndim - 1)) / 127
        exact = {"fp32": 1e-7 * np.abs(tensor), "fp16": 6e-8 + 2 ** -11 * np.abs(tensor), "int8": 0.5001 * step}
        assert (np.abs(found - tensor) <= exact[values if tensor.ndim > 1 else "fp32"]).all()
        assert alive is None if name != "sparse" else (alive == mask).all()
    file.finish()
    stored = set(load(path.read_bytes()))
    smaller = "gaps" if len(gaps(mask)) < -(-mask.size // 8) else "mask"
    assert {f"sparse.{smaller}", "sparse.live"} <= stored and len(stored) == 4 + 2 * (values == "int8")


@pytest.mark.parametrize("values, number", [("fp32", np.nan), ("fp32", np.inf), ("fp16", np.nan), ("fp16", 1e5),
                                            ("int8", np.nan), ("int8", np.inf), ("int8", -np.inf)])
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
def test_what_the_values_cannot_hold_is_not_written(folder, values, number):
    path = folder / "kept"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match="matrix"):
        write(path, {"matrix": np.array([[1, number], [2, 3]])}, {}, {}, values)
    assert path.read_bytes() == b"before" and not list(folder.glob("*.part"))


# Damage -----------------------------------------------------------------------------------------------------

def test_what_is_no_model_file_is_refused(folder):
    path = folder / "other"
    assert "no such file" in refused(folder / "none")
    assert "name a file" in refused(folder)
    for content in (b"", b"{}", b"a letter\n" * 9, bytes(999), b"\xff" * 999, (1 << 62).to_bytes(8, "little") + b"{}"):
        path.write_bytes(content)
        refused(path)
    for text in ("", "{", "null", "[]", "[" * 99_999, '{"format": ' + "9" * 9999 + "}", "NaN", "{}"):
        path.write_bytes(save({"a": np.zeros(1)}, metadata={"json": text}))
        refused(path)
    path.write_bytes(save({"a": np.zeros(1)}))
    refused(path)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_file_cut_short_or_too_long_is_refused(folder, name, data):
    whole, path = (folder / f"{name}.safetensors").read_bytes(), folder / "cut"
    path.write_bytes(whole[:data.draw(st.integers(0, len(whole) - 1))])
    refused(path)
    path.write_bytes(whole + data.draw(st.binary(min_size=1, max_size=99)))
    refused(path)


def test_one_flipped_letter_of_the_alphabet_is_refused(folder):
    """V and ^ are one bit apart, and both can be printed."""
    path = folder / "letter"
    for letter, other in ("V^", "A@", " !"):
        tensors, metadata = parts(folder / "lstm.safetensors")
        put(path, tensors, metadata | {"alphabet": ALPHABET.replace(letter, other)})
        with pytest.raises(ModelFileError, match="spells in another alphabet"):
            load_compact(path)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_flipped_bits_are_refused_or_harmless(folder, name, data):
    content, path = bytearray((folder / f"{name}.safetensors").read_bytes()), folder / "flipped"
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, header - 1) | st.integers(header, len(content) - 1))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    read_or_refused(path)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_header_that_lies_is_refused_or_harmless(folder, name, data):
    content, path = (folder / f"{name}.safetensors").read_bytes(), folder / "lie"
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    tensor = header[data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))]
    number = st.integers(-2, 9) | st.integers(0, 2 ** 64)
    tensor |= data.draw(st.fixed_dictionaries({}, optional={
        "dtype": st.sampled_from(["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "X"]),
        "shape": st.lists(number, max_size=4), "data_offsets": st.lists(number, min_size=2, max_size=2)}))
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    read_or_refused(path)


# Hostile files ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("version, told", [(FORMAT + 1, "newer"), (10 ** 9, "newer"), (0, "format"), (-1, "format"),
                                           (None, "format"), ("2", "format"), (True, "format"), (2.0, "format")])
def test_another_version_is_refused(folder, version, told):
    tensors, metadata = parts(folder / "lstm.safetensors")
    put(folder / "version", tensors, metadata | {"format": version})
    assert told in refused(folder / "version")


@pytest.mark.parametrize("name", MODELS)
def test_each_tensor_is_needed_and_has_to_be_of_its_shape_and_type(folder, name):
    tensors, metadata = parts(folder / f"{name}.safetensors")
    path = folder / "tensor"

    def changed(changes):
        put(path, changes, metadata)
        return refused(path)
    for key, tensor in tensors.items():
        plain = key.removesuffix(".mask").removesuffix(".gaps").removesuffix(".live").removesuffix(".scale")
        assert plain in changed({k: v for k, v in tensors.items() if k != key})
        assert plain in changed(tensors | {key: np.concatenate([tensor, tensor[:1] if len(tensor) else np.zeros(1)])})
        assert plain in changed(tensors | {key: tensor[None]})
        assert plain in changed(tensors | {key: tensor.astype(np.float64)})
        if tensor.dtype.kind == "f" and tensor.size:
            for number in (np.nan, np.inf):
                spoilt = tensor.copy()
                spoilt.flat[-1] = number
                assert plain in changed(tensors | {key: spoilt})
        if key.endswith(".scale"):
            assert plain in changed(tensors | {key: np.full_like(tensor, 3e38)})       # 127 times that is infinite
    assert "extra" in changed(tensors | {"extra\n\x1b[2J": np.zeros(1)})
    norm = "norm.running_var"
    assert norm in changed(tensors | {norm: -tensors[norm] - 1})


@pytest.mark.parametrize("name", MODELS)
def test_sizes_that_contradict_the_tensors_are_refused(folder, name):
    tensors, metadata = parts(folder / f"{name}.safetensors")
    path, model = folder / "sizes", metadata["model"]
    sizes = {"labels", "words", "features", "embedding", "hidden", "channels", "layers"} & set(model)
    for key in sizes:
        for value in (model[key] + 1, model[key] - 1, 0, -1, 10 ** 9, 10 ** 30, str(model[key]), None, True, [1], {},
                      float(model[key]), float("nan")):
            put(path, tensors, metadata | {"model": model | {key: value}})
            refused(path)
    for cell in {"lstm", "gru", "hlstm"} - {model["cell"]} | {"rnn", None, 1}:
        put(path, tensors, metadata | {"model": model | {"cell": cell}})
        refused(path)
    own = metadata.get("alphabet") or metadata["vocabulary"]
    for text in (own[:-1], own + own[:1], own[:0], None, 29, {}, list(own) if isinstance(own, str) else "".join(own),
                 [*own[:-1], 5]):
        put(path, tensors, metadata | {"alphabet" if "alphabet" in metadata else "vocabulary": text})
        refused(path)


@pytest.mark.parametrize("change", [{"longest": 0}, {"longest": 10 ** 6}, {"longest": None}, {"encoder": None},
                                    {"encoder": ""}, {"encoder": "tiny"}, {"kind": "recogniser"}, {"kind": "toy"}])
def test_a_captioner_needs_a_length_and_the_encoder_of_its_model(folder, change):
    tensors, metadata = parts(folder / "captioner.safetensors")
    put(folder / "changed", tensors, metadata | change)
    refused(folder / "changed")


@pytest.mark.parametrize("letter", ["\x1b", "\n", "\ud800", "\u202e"])
def test_nothing_is_written_that_a_terminal_would_obey(folder, letter):
    for name, key in (("lstm", "alphabet"), ("captioner", "vocabulary")):
        tensors, metadata = parts(folder / f"{name}.safetensors")
        spoilt = metadata[key][:-1] + (letter if key == "alphabet" else ["wo" + letter])
        put(folder / "letters", tensors, metadata | {key: spoilt})
        refused(folder / "letters")


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 70) | st.sampled_from([2 ** 31, 2 ** 63, 10 ** 40, 16_384, 8000])
    | st.floats() | st.text(max_size=4)
    | st.sampled_from(["lstm", "gru", "hlstm", "relu", "tanh", "speech", "captions", "tiny", "vgg16"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("fiogx"), inner, max_size=4))


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_metadata_are_refused_or_harmless(folder, name, data):
    tensors, metadata = parts(folder / f"{name}.safetensors")
    keys = [*metadata, "benchmark", "encoder", *(("model", key) for key in (
        *metadata["model"], "gate_layers", "gate_width", "activation", "shared_hidden", "bias", "dropout",
        "stride"))]
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=2)):
        inner, last = (metadata["model"], key[1]) if isinstance(key, tuple) else (metadata, key)
        if not isinstance(inner, dict):
            continue
        if data.draw(st.booleans()) and last in inner:
            del inner[last]
        else:
            inner[last] = data.draw(JUNK)
        if not isinstance(metadata.get("model"), dict):
            break
    put(folder / "metadata", tensors, metadata)
    read_or_refused(folder / "metadata")


@pytest.mark.parametrize("name, sizes", [
    ("lstm", {"hidden": 8000}), ("lstm", {"hidden": 2000, "layers": 64}), ("lstm", {"channels": 1024}),
    ("lstm", {"cell": "gru", "hidden": 9000, "layers": 3}), ("captioner", {"hidden": 8000}),
    ("captioner", {"features": 65_536, "embedding": 4000}), ("captioner tiny", {"cell": "hlstm", "hidden": 6000})])
def test_a_small_file_does_not_become_a_large_model(folder, name, sizes):
    """A megabyte of gaps stands for a quarter of a billion dormant entries, and each layer can have as many."""
    tensors, metadata = parts(folder / f"{name}.safetensors")
    model = metadata["model"] | sizes
    bomb = {}
    with torch.device("meta"):
        for key, like in MODELS[name][0][0](**model).state_dict().items():
            if "num_batches" not in key and like.dim() == 1:
                bomb[key] = np.ones(like.shape, np.float32)
            elif like.dim() > 1:
                bomb |= {f"{key}.gaps": np.full(like.numel() // 255, 255, np.uint8), f"{key}.live": np.zeros(0, "f4")}
    put(folder / "bomb", bomb, metadata | {"model": model})
    tracemalloc.start()
    try:
        refused(folder / "bomb")
        assert tracemalloc.get_traced_memory()[1] < 64 * MEGABYTE
    finally:
        tracemalloc.stop()
        (folder / "bomb").unlink()
