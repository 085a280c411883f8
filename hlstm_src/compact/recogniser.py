"""DeepSpeech2 (see hlstm_src/deepspeech2.py) on the engine: sound in, text out.

A convolution is a product too: its kernel is a packed matrix whose places are offsets from a frame, and the frames are
the columns of x. Batch normalisation is folded into what follows or precedes it.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from .. import audio
from ..audio import BINS
from ..compiled import compiled
from ..decoding import beam_search, greedy
from . import cells, layouts
from .cells import STRETCH
from .format import ModelFile
from .kernels import aligned, product
from .layouts import LANES
from .weights import cell, entries, named, norm, sizes


class Convolution:
    """One convolution over frames of (bins, channels), batch normalisation folded in, then clipped to [0, 20]."""

    def __init__(self, kernel: np.ndarray, mask: np.ndarray | None, norm: tuple[np.ndarray, np.ndarray], bins: int,
                 lanes: int, stride: tuple):
        """kernel and mask (out, in, kF, kT); norm: factor and addend for each output; bins and lanes: of a frame of x.

        Of a pruned kernel those places are stored in which any of 16 outputs has a live connection."""
        out, _, kF, self.kT = kernel.shape
        self.stride, self.lanes, self.bins = stride, -(-out // LANES) * LANES, (bins - kF) // stride[0] + 1
        self.step = bins * lanes                                   # floats of a frame of x
        scale, self.add = norm[0], np.pad(norm[1], (0, self.lanes - out)).astype(np.float32)

        def rows(a: np.ndarray) -> np.ndarray:                     # (out, in, kF, kT) -> (out, kT * kF * lanes)
            a = a.transpose(0, 3, 2, 1)
            return np.pad(a, ((0, 0), (0, 0), (0, 0), (0, lanes - a.shape[3]))).reshape(out, -1)
        W = rows(kernel * scale[:, None, None, None])
        matrix = layouts.pack(W, kind="dense") if mask is None else layouts.pack(W, rows(mask), kind="block16")
        place = matrix.arrays["places"]                            # within the joined rows -> offsets between frames
        matrix.arrays["places"] = place // (kF * lanes) * np.uint32(self.step) + place % np.uint32(kF * lanes)
        self.matrix, self.across = matrix, stride[0] * lanes       # floats between two output bins' windows

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """x (T, bins * lanes) -> (T', bins' * lanes'), T' = (T - 1) // stride + 1."""
        half = self.kT // 2
        room = aligned((len(x) + 2 * half) * self.step + layouts.WINDOW)
        room[half * self.step:half * self.step + x.size] = x.reshape(-1)
        y = aligned(((len(x) - 1) // self.stride[1] + 1, self.bins, self.lanes))
        _convolve(self.matrix.packed, room, y, self.add, self.across, self.stride[1] * self.step)
        return y.reshape(len(y), -1)


@compiled
def _convolve(matrix, room, y, add, across, along):
    """y (T', bins, lanes): products with windows of `room`, `across` floats from bin to bin, `along` from step to step;
    all bins in one call, because a call from Python takes longer than a bin of a pruned kernel does."""
    steps, bins, lanes = y.shape
    for start in range(0, steps, STRETCH):
        end = min(start + STRETCH, steps)
        for f in range(bins):
            for t in range(start, end):
                for k in range(lanes):
                    y[t, f, k] = add[k]
            product(matrix, room[start * along + f * across:].ctypes.data, along, y[start, f].ctypes.data, bins * lanes,
                    end - start)
            for t in range(start, end):
                for k in range(lanes):
                    y[t, f, k] = min(max(y[t, f, k], np.float32(0)), np.float32(20))


class Recogniser:
    """A recogniser on the engine; `load_compact` makes it. `metadata` says where it comes from."""

    def __init__(self, file: ModelFile, values: str = "fp32", kind: str | None = None, threads: int = 1):
        self.metadata, m = file.metadata, _sizes(file)
        self.alphabet = file.metadata["alphabet"]
        self.threads, self._pool = threads, (None, None)
        channels, hidden = m["channels"], m["hidden"]

        def dense(name: str, *shape: int) -> np.ndarray:
            return file.tensor(name, shape)[0]
        self.convolutions, bins, lanes, ins = [], BINS, 1, 1
        for k, (kF, kT, sF, sT) in enumerate(audio.convolutions(m["stride"])):
            kernel = file.tensor(f"convolutions.{k}.weight", (channels, ins, kF, kT))
            self.convolutions.append(Convolution(*kernel, norm(file, f"norms.{k}", channels), bins, lanes, (sF, sT)))
            bins, lanes, ins = self.convolutions[-1].bins, self.convolutions[-1].lanes, channels
        self.layers, options = [], {"values": values, "kind": kind}
        for k in range(m["layers"]):
            if k == 0:                                             # its input comes frame by frame, channels innermost
                size, before = bins * channels, {"order": partial(_by_frame, bins=bins, channels=channels, lanes=lanes)}
            else:
                size, before = hidden, dict(zip(("scale", "add"), norm(file, f"rnns.{k}.norm", hidden)))
            ways = [("forth.", "_l0"), ("back.", "_l0")] if m["cell"] == "gru" else [("", "_l0"), ("", "_l0_reverse")]
            self.layers.append([cell(file, m, f"rnns.{k}.rnn.{way}", suffix, size, **before, **options)
                                for way, suffix in ways])
        scale, add = norm(file, "norm", hidden)
        W, b = dense("output.weight", m["labels"], hidden), dense("output.bias", m["labels"])
        self.output = (W * scale).T.copy(), b + W @ add
        file.finish()

    @property
    def pool(self) -> ThreadPoolExecutor | None:
        """The second thread, None where there is but one. A forked process has a new one: threads stay behind."""
        if self.threads > 1 and self._pool[0] != os.getpid():
            self._pool = os.getpid(), ThreadPoolExecutor(1)
        return self._pool[1]

    @property
    def matrices(self) -> dict[str, layouts.Layout]:
        """The recurrent matrices by a readable name."""
        found = {}
        for k, pair in enumerate(self.layers):
            found |= named(f"layer {k} forth", pair[0]) | named(f"layer {k} back", pair[1])
        return found

    def log_probs(self, samples: np.ndarray) -> np.ndarray:
        """samples (N) at 16 kHz -> log probabilities of the labels (T', labels), a row for each 20 or 40 ms."""
        x = audio.spectrogram(np.asarray(samples, np.float32))
        for convolution in self.convolutions:
            x = convolution(x)
        for forth, back in self.layers:
            x = cells.both(forth, back, x, self.pool)
        y = x @ self.output[0] + self.output[1]
        y -= y.max(1, keepdims=True)
        return y - np.log(np.exp(y).sum(1, keepdims=True))

    def transcribe(self, samples, rate: int = audio.SAMPLE_RATE, beam: int = 1) -> str:
        """A sound file's path, or samples (N) or (N, channels) at `rate` -> text; `beam` > 1 searches (`beam_search`).

        Long sound is heard in pieces. Raises AudioError for sound that cannot be read.
        """
        if beam < 1:
            raise ValueError(f"beam={beam} must be at least 1")
        path = isinstance(samples, (str, os.PathLike))
        samples = audio.read(samples) if path else audio.convert(samples, rate)
        texts = []
        for piece in audio.pieces(samples):
            probs = self.log_probs(piece)
            texts.append(greedy(probs, self.alphabet) if beam == 1 else
                         beam_search(probs, beam=beam, alphabet=self.alphabet))
        return " ".join(" ".join(texts).split())


def _sizes(file: ModelFile) -> dict:
    """The model's sizes from the metadata, checked before anything is made of them."""
    letters = file.metadata.get("alphabet")
    if not isinstance(letters, str):
        raise file.error("no recogniser: its metadata lack the alphabet")
    m = sizes(file, {"layers": 5, "hidden": 800, "channels": 32, "stride": 2}, labels=10_000, channels=1024, stride=4)
    if m["stride"] not in (2, 4):
        raise file.error(f"stride {m['stride']} is neither 2 nor 4")
    if m["labels"] != len(letters) or not letters.isprintable():
        raise file.error(f"{m['labels']} labels need as many letters that can be printed, not {len(letters)}")
    if letters != audio.ALPHABET:                                  # one flipped bit makes ^ of V
        raise file.error("spells in another alphabet than the recognisers of this project")
    frame = audio.BINS * m["channels"]                             # more than the first layer's inputs
    layers = sum(entries(m, m["hidden"] if k else frame) for k in range(m["layers"]))
    file.afford(2 * layers + m["labels"] * m["hidden"] + 231 * m["channels"] ** 2)
    return m


def _by_frame(W: np.ndarray, bins: int, channels: int, lanes: int) -> np.ndarray:
    """Columns (channels, bins) -> (bins, lanes), the order in which a convolution leaves them, lanes padded."""
    W = W.reshape(len(W), channels, bins).transpose(0, 2, 1)
    return np.pad(W, ((0, 0), (0, 0), (0, lanes - channels))).reshape(len(W), -1)
