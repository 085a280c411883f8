"""Recurrent cells on packed matrices: a whole sequence, or one step of a small beam, in one compiled call.

LSTM and H-LSTM are one program: products and activations, layer by layer, then the gates. An LSTM has no layer but the
first. Of an H-LSTM's further layers the four gates' matrices are joined into one, block by block on its diagonal, so
that each layer is one product; the layouts do not store what lies beside the blocks.

Weights come as numpy arrays, named and shaped as `hlstm_src.lstm.HLSTM` and torch.nn.GRU store them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..compiled import compiled
from ..gates import ACTIVATIONS
from . import layouts
from .kernels import aligned, aligned_rows, elu_, product, sigmoid_, tanh_
from .layouts import LANES, WINDOW, Layout

STRETCH = 32                           # steps whose input products are made together: they stay in the near cache


def padded(n: int) -> int:
    """Floats of a row in the kernels' buffers: whole registers, and room behind the last window."""
    return -(-n // LANES) * LANES + WINDOW


@dataclass
class Cell:
    """A packed cell of `kind` lstm, hlstm or gru with I inputs and H units.

    inputs, hidden: layouts of W_ih and W_hh; gates: of the further layers, joined; biases: one for each of hidden and
    gates, (R) each. A GRU's biases are those of W_ih and W_hh. Raises ValueError for shapes that do not fit together.
    """
    kind: str
    size: int                              # H
    activation: str
    inputs: Layout
    hidden: Layout
    gates: list[Layout] = field(default_factory=list)
    biases: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self):
        self.layers = [self.hidden, *self.gates]
        self._join()
        self.width = padded(max(layer.shape[0] for layer in self.layers))
        self.biases = [_row(b, self.width) for b in self.biases]
        self.program = (tuple(layer.packed for layer in self.layers), tuple(self.biases), self.inputs.packed,
                         ACTIVATIONS.index(self.activation), self.size)

    def _join(self) -> None:
        """The compiled loops read and write what they are told is there, so the layers must fit one another."""
        rows, gates = [layer.shape[0] for layer in self.layers], 3 if self.kind == "gru" else 4
        columns = [self.size, *rows[:-1]]
        for name, got, wanted in [
                ("W_ih has rows", self.inputs.shape[0], rows[0]),
                *((f"{'W_hh' if k == 0 else f'gate layer {k}'} has columns", layer.shape[1], columns[k])
                  for k, layer in enumerate(self.layers)),
                (f"the last layer, of {gates} gates, has rows", rows[-1], gates * self.size),
                *((f"bias {k} has numbers", len(b), (rows[:1] * 2 if self.kind == "gru" else rows)[k])
                  for k, b in enumerate(self.biases))]:
            if got != wanted:
                raise ValueError(f"a {self.kind} of {self.size} units: {name}: {got}, not {wanted}")

    @property
    def matrices(self) -> list[Layout]:
        return [self.inputs, *self.layers]

    @property
    def nbytes(self) -> int:
        """Bytes that one step reads, biases included."""
        return sum(m.nbytes for m in self.matrices) + sum(b.nbytes for b in self.biases)

    def run(self, x: np.ndarray, h: np.ndarray | None = None, c: np.ndarray | None = None, reverse: bool = False):
        """x (T, I) -> outputs (T, H) and the last h and c, (H) each; `reverse` goes from the end to the start.

        Outputs stand at their own step in both directions. A GRU has no c: it comes back as None. Raises ValueError
        for shapes that do not fit.
        """
        self._fits(x, **{name: s[None] for name, s in (("h", h), ("c", c)) if s is not None})
        H, width = self.size, padded(self.size)
        hs, h, c = aligned((len(x), width)), _row(h, width), None if self.kind == "gru" else _row(c, width)
        all_steps(*self.program, rows_of(x), hs, h, c, reverse)
        return hs[:, :H], h[:H], None if c is None else c[:H]

    def step(self, x: np.ndarray, h: np.ndarray, c: np.ndarray | None = None):
        """One step of k sequences: x (k, I), h and c (k, H) -> new h and c. Raises ValueError for shapes that do not
        fit."""
        self._fits(x, **{name: s for name, s in (("h", h), ("c", c)) if s is not None})
        if not len(x) == len(h) == (len(h) if c is None else len(c)):
            raise ValueError(f"x has {len(x)} rows, h {len(h)}" + ("" if c is None else f", c {len(c)}")
                             + ": one of each for a sequence")
        hs = rows_of(h)
        cs = None if self.kind == "gru" else rows_of(np.zeros_like(h) if c is None else c)
        one_step(*self.program, rows_of(x), hs, cs, aligned((len(x), len(self.biases), self.width)))
        return hs[:, :self.size], None if cs is None else cs[:, :self.size]

    def _fits(self, x: np.ndarray, **states: np.ndarray) -> None:
        """The compiled loops read what they are told is there, so shapes are checked before."""
        if x.ndim != 2 or x.shape[1] != self.inputs.shape[1]:
            raise ValueError(f"x {x.shape}: expected two dimensions, the second {self.inputs.shape[1]} wide")
        for name, s in states.items():
            if s.ndim != 2 or s.shape[1] != self.size:
                raise ValueError(f"{name} {s.shape}: the state is {self.size} wide")


def both(forth: Cell, back: Cell, x: np.ndarray, pool=None) -> np.ndarray:
    """Outputs of two directions summed, x (T, I) -> (T, H); with a `pool` of threads they run side by side."""
    if pool is None:
        return forth.run(x)[0] + back.run(x, reverse=True)[0]
    other = pool.submit(back.run, x, reverse=True)
    return forth.run(x)[0] + other.result()[0]


def lstm(weights: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray] | None = None, *, activation: str = "relu",
         suffix: str = "_l0", values: str = "fp32", kind: str | None = None, columns: int = 4) -> Cell:
    """An LSTM or H-LSTM cell from one layer and direction of an `HLSTM`, say weights["weight_ih" + suffix].

    `kind` forces one layout; columns: steps whose inputs are known together, 1 in a decoder. Raises KeyError for a
    missing weight, ValueError for shapes that do not fit, a mask of no weight or an unknown activation.
    """
    masks = _of_weights(masks, weights)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")

    def packed(name: str, n: int) -> Layout:
        return layouts.pack(weights[name + suffix], masks.get(name + suffix), kind, values, columns=n)
    H, gate_layers, rows = weights["weight_hh" + suffix].shape[1], 0, len(weights["weight_hh" + suffix])
    gates, biases = [], [weights.get("bias_ih" + suffix, np.zeros(len(weights["weight_ih" + suffix])))]
    if "bias_hh" + suffix in weights:
        biases[0] = biases[0] + weights["bias_hh" + suffix]
    while any(f"weight_gate{gate_layers + 1}{gate}{suffix}" in weights for gate in ("", "_i")):
        gate_layers += 1
        name = f"weight_gate{gate_layers}"
        everywhere = {n: np.ones_like(w, bool) for n, w in weights.items()}
        joined, alive, region = (_joined(part, name, suffix, rows)
                                 for part in (weights, everywhere | dict(masks), everywhere))
        gates.append(layouts.pack(joined, alive, kind, values, region))
        rows = len(joined)
        biases.append(weights.get(f"bias_gate{gate_layers}{suffix}", np.zeros(rows)))
    inputs, hidden = packed("weight_ih", columns), packed("weight_hh", 1)
    return Cell("hlstm" if gates else "lstm", H, activation, inputs, hidden, gates, biases)


def gru(weights: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray] | None = None, *, suffix: str = "_l0",
        values: str = "fp32", kind: str | None = None, columns: int = 4) -> Cell:
    """A GRU cell from one layer and direction of a torch.nn.GRU; as `lstm`."""
    masks = _of_weights(masks, weights)
    ih, hh = (layouts.pack(weights[name], masks.get(name), kind, values, columns=n)
              for name, n in (("weight_ih" + suffix, columns), ("weight_hh" + suffix, 1)))
    none = np.zeros(ih.shape[0])
    biases = [weights.get(n + suffix, none) for n in ("bias_ih", "bias_hh")]
    return Cell("gru", hh.shape[1], "tanh", ih, hh, [], biases)


def _of_weights(masks: Mapping[str, np.ndarray] | None, weights: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """The masks, each of which must have a weight of its name: else a matrix would be dense by mistake."""
    if strange := sorted((masks or {}).keys() - weights.keys()):
        raise ValueError(f"masks of {', '.join(strange)}: there are no such weights, but {', '.join(weights)}")
    return masks or {}


def _joined(weights: Mapping[str, np.ndarray], name: str, suffix: str, columns: int) -> np.ndarray:
    """A further layer's matrix over all gates' hidden units: each gate's block under its own columns."""
    if name + suffix in weights:
        whole = weights[name + suffix]
        blocks = np.split(whole, columns // whole.shape[1] if columns % whole.shape[1] == 0 else 1)
    else:
        blocks = [weights[f"{name}_{gate}{suffix}"] for gate in "ifgo"]
    if sum(b.shape[1] for b in blocks) != columns:
        raise ValueError(f"{name}{suffix}: its columns do not add up to the {columns} units before it")
    joined = np.zeros((sum(len(b) for b in blocks), columns), blocks[0].dtype)
    row = column = 0
    for b in blocks:
        joined[row:row + len(b), column:column + b.shape[1]] = b
        row, column = row + len(b), column + b.shape[1]
    return joined


def _row(a: np.ndarray | None, width: int) -> np.ndarray:
    """a (n) with room behind it, (width); None: zeros."""
    row = aligned(width)
    if a is not None:
        row[:len(a)] = a
    return row


def rows_of(x: np.ndarray) -> np.ndarray:
    """x (k, n) as the kernels want it: (k, padded n), aligned."""
    rows = aligned((len(x), padded(x.shape[1])))
    rows[:, :x.shape[1]] = x
    return rows


@compiled
def one_step(layers, biases, inputs, activation, H, x, h, c, room):
    """One step of k sequences, in place: x (k, >= I), h and c (k, >= H), of a GRU c is None; room (k, biases, width) is
    scratch."""
    k = len(x)
    for j in range(k):
        _copy(biases[0], room[j, 0], room.shape[2])
    product(inputs, x.ctypes.data, x.shape[1], room.ctypes.data, room.shape[1] * room.shape[2], k)
    for j in range(k):
        if c is None:                                              # decided when this is compiled
            _gru(layers[0], biases[-1], H, room[j, 0], h[j], room[j, -1])
        else:
            _lstm(layers, biases, activation, H, room[j, 0], h[j], c[j], room[j])


@compiled
def all_steps(layers, biases, inputs, activation, H, x, hs, h, c, reverse):
    """All steps of a sequence, x (T, >= I) -> hs (T, >= H); h and c (>= H) are renewed, of a GRU c is None."""
    T, width = len(x), biases[0].shape[0]
    first, room = aligned_rows(STRETCH, width), aligned_rows(len(biases), width)
    for done in range(0, T, STRETCH):                              # the inputs' part of a stretch of steps at once
        n = min(STRETCH, T - done)
        start = T - done - n if reverse else done
        for t in range(n):
            _copy(biases[0], first[t], width)
        product(inputs, x[start:].ctypes.data, x.shape[1], first.ctypes.data, width, n)
        for s in range(n):
            t = n - 1 - s if reverse else s
            if c is None:
                _gru(layers[0], biases[-1], H, first[t], h, room[0])
            else:
                _lstm(layers, biases, activation, H, first[t], h, c, room)
            _copy(h, hs[start + t], H)


@compiled
def _lstm(layers, biases, activation, H, first, h, c, room):
    """first (R): bias and input's part of the first layer; h and c (H) are renewed; room (layers, width) is scratch."""
    product(layers[0], h.ctypes.data, 0, first.ctypes.data, 0, 1)
    y = first
    for n in range(1, len(layers)):
        _activate(y, activation, layers[n - 1][2])
        after = room[n]
        _copy(biases[n], after, len(after))
        product(layers[n], y.ctypes.data, 0, after.ctypes.data, 0, 1)
        y = after
    i, f, g, o = y[:H], y[H:2 * H], y[2 * H:3 * H], y[3 * H:]     # the order of the rows
    sigmoid_(y, 2 * H)
    tanh_(g, H)
    sigmoid_(o, H)
    for n in range(H):
        c[n] = f[n] * c[n] + i[n] * g[n]
        h[n] = c[n]
    tanh_(h, H)
    for n in range(H):
        h[n] *= o[n]


@compiled
def _copy(x, y, n):
    """The first n of x into y; in a loop, since numba takes ten times as long for a slice."""
    for k in range(n):
        y[k] = x[k]


@compiled
def _activate(y, activation, n):
    """The activation of its place in `ACTIVATIONS`."""
    if activation == 0:
        tanh_(y, n)
    elif activation == 1:
        for j in range(n):
            y[j] = max(y[j], np.float32(0))
    elif activation == 2:
        for j in range(n):
            y[j] = max(y[j], np.float32(0.01) * y[j])
    else:
        elu_(y, n)


@compiled
def _gru(hidden, bias, H, first, h, y):
    """first (3H): bias and input's part; h (H) is renewed; y (width) is scratch. Rows: r, z, n."""
    _copy(bias, y, len(y))
    product(hidden, h.ctypes.data, 0, y.ctypes.data, 0, 1)
    for n in range(2 * H):
        first[n] += y[n]
    sigmoid_(first, 2 * H)
    for n in range(H):
        first[2 * H + n] += first[n] * y[2 * H + n]
    tanh_(first[2 * H:], H)
    for n in range(H):
        h[n] = first[2 * H + n] + first[H + n] * (h[n] - first[2 * H + n])
