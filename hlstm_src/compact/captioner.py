"""NeuralTalk (see hlstm_src/neuraltalk.py) on the engine: a picture or its feature in, a sentence out.

The search is that of hlstm_src/search.py, compiled, so that a caption is one call and no step waits for Python.
"""

from pathlib import Path

import numpy as np

from ..compiled import compiled
from ..gates import exp
from ..search import END
from . import layouts, pictures
from .cells import one_step, padded, rows_of
from .format import ModelFile
from .kernels import LANES, SLOTS, aligned, aligned_rows, product
from .weights import cell, entries, named, norm, sizes, whole

TOGETHER = 4                           # columns that the kernels multiply by at once


class Captioner:
    """A captioner on the engine; `load_compact` makes it. `metadata` says where it comes from.

    Sizes: B pictures, D feature, N beginnings of captions, E embedding, H hidden, V words (the mark 0 included).
    """

    def __init__(self, file: ModelFile, values: str = "fp32", kind: str | None = None):
        self.metadata, m = file.metadata, _sizes(file)
        self.vocabulary, self.longest = file.metadata["vocabulary"], file.metadata["longest"]
        V, D, E, H = m["words"], m["features"], m["embedding"], m["hidden"]

        def linear(name: str, rows: int, columns: int, factor=1.0, add=0.0) -> tuple[layouts.Layout, np.ndarray]:
            """A linear layer, the normalisation before it folded in: its matrix and its bias (padded)."""
            (W, mask), (b, _) = file.tensor(f"{name}.weight", (rows, columns)), file.tensor(f"{name}.bias", (rows,))
            bias = b + W @ np.broadcast_to(np.float32(add), columns)
            return layouts.pack(W * factor, mask, kind, values), rows_of(bias[None])[0]
        self.picture = linear("picture", E, D, *norm(file, "norm", D, affine=False))
        self.output = linear("output", V, H)
        self.words = rows_of(file.tensor("words.weight", (V, E))[0])
        self.cells = [cell(file, m, "rnn.", f"_l{k}", H if k else E, values=values, kind=kind, columns=1)
                      for k in range(m["layers"])]
        self.encoder, self.features = file.metadata["encoder"], D
        self.tiny = pictures.Tiny(file, D) if self.encoder == "tiny" else None
        self.tuned = pictures.Tuned(file, self.encoder) if m.get("encoder") and not self.tiny else None
        file.finish()
        self._gru = True if m["cell"] == "gru" else None           # None: the branch of the other cell is not compiled
        self._programs = tuple(made.program for made in self.cells)
        self._picture, self._output = ((matrix.packed, bias) for matrix, bias in (self.picture, self.output))

    @property
    def matrices(self) -> dict[str, layouts.Layout]:
        """All packed matrices by a readable name."""
        found = {"picture": self.picture[0]}
        for k, made in enumerate(self.cells):
            found |= named(f"layer {k}", made)
        return found | {"output": self.output[0]}

    def start(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The decoder's state after the pictures, (B, D): h and c of all layers, (layers, B, padded H) each; a GRU's c
        means nothing. Raises ValueError for features of another shape."""
        if features.ndim != 2 or features.shape[1] != self.features:
            raise ValueError(f"features {features.shape}: expected two dimensions, the second {self.features} wide")
        h, x = self._state(len(features)), aligned((len(features), self.words.shape[1]))
        c = np.zeros_like(h)
        _linear(*self._picture, rows_of(features), x, len(x))
        _read(self._programs, self._gru, x, h, c)
        return h, c

    def step(self, words: np.ndarray, parents: np.ndarray, state) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """Row n goes on from row parents[n] of `state` and reads words[n], both (N): log probabilities of the next
        word (N, V), and the new state. So `search.beam_search` wants it. Raises ValueError for shapes that do not fit,
        IndexError for a word or a row that is not there."""
        h, c = (s.take(parents, axis=1) for s in state)
        words, wanted = self.words[words], (len(self.cells), len(parents), padded(self.cells[0].size))
        if not (words.shape[:-1] == parents.shape and h.shape == c.shape == wanted):        # nobody checks below
            raise ValueError(f"words {words.shape[:-1]}, parents {parents.shape}, h {h.shape}, c {c.shape}: one word a "
                             f"parent, and states {wanted}")
        y = aligned((len(words), self._output[1].size))
        _read(self._programs, self._gru, words, h, c)
        _say(*self._output, h[-1], y, len(self.words), len(words))
        return y[:, :len(self.words)], (h, c)

    def caption(self, picture, beam: int = 2) -> str | list[str]:
        """What is said of a picture: a file's path, a PIL image, or its feature (D); of B features, (B, D), a list.

        A captioner with the encoder `tiny` also takes pixels in [0, 1], (3, 64, 64) or (B, 3, 64, 64). For a path or an
        image the encoder runs, which imports torch unless it is `tiny`. beam: beginnings that the search keeps, 1 is
        greedy. A caption does not depend on its neighbours. Raises ValueError for a beam below 1 or an array that is
        no feature, PictureError for a file that is no picture, UserError for an encoder that is not installed.
        """
        if beam < 1:
            raise ValueError(f"beam={beam} must be at least 1")
        if isinstance(picture, (str, Path)) or hasattr(picture, "convert"):
            image = pictures.read(picture)
            picture = (pictures.pixels(image) if self.tiny else self.tuned(image) if self.tuned else
                       pictures.feature(image, self.encoder))
        features = np.asarray(picture, np.float32)
        if self.tiny and features.shape[-3:] == (3, pictures.SIDE, pictures.SIDE) and features.ndim in (3, 4):
            flat = features.reshape(-1, *features.shape[-3:])
            features = np.stack([self.tiny(x) for x in flat]).reshape(*features.shape[:-3], self.features)
        if features.ndim not in (1, 2) or features.shape[-1] != self.features or not np.isfinite(features).all():
            raise ValueError(f"an array {features.shape} is no feature of a picture: those of {self.encoder} are "
                             f"{self.features} finite numbers")
        said, rows = [], max(beam, TOGETHER)
        for x in features.reshape(-1, self.features):
            ids = _search(*self._picture, *self._output, self._programs, self._gru, self.words, rows_of(x[None]),
                          self._state(rows), self._state(rows), beam, self.longest)
            said.append(" ".join(self.vocabulary[k - 1] for k in ids))
        return said if features.ndim == 2 else said[0]

    def _state(self, rows: int) -> np.ndarray:
        """Zeros for h or c of all layers."""
        return aligned((len(self.cells), rows, padded(self.cells[0].size)))


@compiled(inline="always")
def _linear(matrix, bias, x, y, k):
    """k rows of x through a layer, into those of y."""
    if 1 < k < TOGETHER <= min(len(x), len(y)) and (k == TOGETHER - 1 or matrix[0] == SLOTS):
        k = TOGETHER                                               # quicker than one by one; nobody reads the rest
    for j in range(k):
        y[j] = bias
    product(matrix, x.ctypes.data, x.shape[1], y.ctypes.data, y.shape[1], k)


@compiled(inline="always")
def _read(programs, gru, x, h, c):
    """One step of all layers: x (k, padded E); the first k rows of h and c (layers, >= k, padded H) are renewed."""
    k, width, rows = len(x), programs[0][1][0].size, len(programs[0][1])
    room = aligned_rows(k * rows, width).reshape(k, rows, width)
    for n in range(len(programs)):
        if gru is None:
            one_step(*programs[n], x, h[n], c[n], room)
        else:
            one_step(*programs[n], x, h[n], None, room)
        x = h[n, :k]


@compiled(inline="always")
def _say(output, bias, h, y, V, k):
    """Log probabilities of the next word after k beginnings, h (>= k, padded H): the first V columns of y (>= k, .)."""
    _linear(output, bias, h, y, k)
    sums, even = np.empty(LANES, np.float32), V // LANES * LANES
    for j in range(k):
        row, most = y[j], y[j, 0]
        for n in range(V):
            most = max(most, row[n])
        sums[:] = 0
        for n in range(0, even, LANES):                            # 16 sums side by side: one would be slow, and rough
            for lane in range(LANES):
                sums[lane] += exp(row[n + lane] - most)
        total = np.float32(0)
        for lane in range(LANES):
            total += sums[lane]
        for n in range(even, V):
            total += exp(row[n] - most)
        most += np.log(total)
        for n in range(V):
            row[n] -= most


@compiled
def _search(picture, add, output, bias, programs, gru, words, feature, h, c, beam, longest):
    """`search.beam_search` for one picture: ids of the words said. h, c (layers, >= beam, padded H) are zero.

    All that is written to has TOGETHER rows or more.
    """
    V, E = words.shape
    x, y = aligned_rows(h.shape[1], E), aligned_rows(h.shape[1], bias.size)
    _linear(picture, add, feature, x, 1)
    _read(programs, gru, x[:1], h, c)
    x[0], alive, best, found = words[END], 1, -np.inf, np.zeros(0, np.int64)
    scores, parents, chosen = np.zeros(beam + 1), np.zeros(beam + 1, np.int64), np.zeros(beam + 1, np.int64)
    top, said, before = np.zeros(beam + 1), np.zeros((beam, longest), np.int64), np.zeros((beam, longest), np.int64)
    for t in range(longest):
        _read(programs, gru, x[:alive], h, c)
        _say(output, bias, h[len(programs) - 1], y, V, alive)
        full = 0                                                   # the `beam` best, of equals the earlier first
        for j in range(alive):
            for v in range(V):
                score = scores[j] + y[j, v]
                if full == beam and score <= top[beam - 1]:
                    continue
                full = min(full + 1, beam)
                place = full - 1
                while place > 0 and score > top[place - 1]:
                    top[place], parents[place], chosen[place] = top[place - 1], parents[place - 1], chosen[place - 1]
                    place -= 1
                top[place], parents[place], chosen[place] = score, j, v
        said, before, alive = before, said, 0
        h_before, c_before = h.copy(), c.copy()
        for k in range(full):
            j, word = parents[k], chosen[k]
            if word == END or t == longest - 1:
                if top[k] > best:
                    best, found = top[k], before[j, :t + int(word != END)].copy()
                    found[t:] = word
            else:
                scores[alive], x[alive], said[alive, :t], said[alive, t] = top[k], words[word], before[j, :t], word
                h[:, alive], c[:, alive], alive = h_before[:, j], c_before[:, j], alive + 1
        if alive == 0 or scores[0] <= best:                        # log probabilities only fall
            break
    return found


def _sizes(file: ModelFile) -> dict:
    """The model's sizes from the metadata, checked before anything is made of them."""
    words, encoder = file.metadata.get("vocabulary"), file.metadata.get("encoder")
    if not isinstance(words, list) or not isinstance(encoder, str) or not 0 < len(encoder) < 100:
        raise file.error("no captioner: its metadata lack vocabulary or encoder")
    m = sizes(file, {"layers": 1, "hidden": 512, "embedding": 512}, words=1_000_000, features=65_536, embedding=16_384)
    whole(file, "longest", file.metadata.get("longest"), 1, 1000)
    if m["words"] != len(words) + 1 or not all(isinstance(w, str) and w.isprintable() for w in words):
        raise file.error(f"{m['words']} words, the end mark among them, need as many that can be printed, not "
                         f"{len(words)}")
    if m.get("encoder") not in ((encoder,) if encoder == "tiny" else (encoder, None)):
        raise file.error(f"encoder {encoder!r} and the model's {m.get('encoder')!r} contradict each other")
    layers = sum(entries(m, m["hidden" if k else "embedding"]) for k in range(m["layers"]))
    tiny = 5 * pictures.WIDTHS[-1] if encoder == "tiny" else 0    # of its last layer, for each of the feature's numbers
    file.afford(layers + m["words"] * (m["hidden"] + m["embedding"]) + m["features"] * (m["embedding"] + tiny))
    return m
