"""The LSTM and the hidden-layer LSTM (H-LSTM), once to be read and once to be fast.

The paper (abstract; equations follow from its words): with z = [x_t, h_(t-1)] and H* a stack of hidden layers,
    i, f, o = sigmoid(W H*(z) + b)      g = tanh(W H*(z) + b)      c_t = f c_(t-1) + i g      h_t = o tanh(c_t)
A plain LSTM has an empty stack, H*(z) = z. Sizes: T steps, B batch, I input, H hidden, G gate width, D directions,
S stacks of hidden layers (4: one for each gate; 1: shared). The gates' rows stand in PyTorch's order i, f, g, o.

`step` is the definition, `unroll` repeats it, and `HLSTM` computes the same quickly by `scan`; the tests hold them
together.
"""

import math
import operator
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .scan import scan
from .sequences import alive, at_end, flip

ACTIVATIONS = {"relu": F.relu, "leaky_relu": F.leaky_relu, "tanh": torch.tanh, "elu": F.elu}
# Entries of a step's matrices from which on, on a CPU, the directions go one after the other; and of a plain LSTM's
# matrix of h from which on its way back is left to `scan` under bfloat16 autocast.
APART = 2 ** 19


@dataclass
class CellWeights:
    """Weights of one cell: `ih` and `hh` act on x and h; `gates` holds (W, b) of the layers behind them."""
    ih: Tensor                              # (S*G, I), or (4H, I) without hidden layers
    hh: Tensor                              # (S*G, H), or (4H, H)
    bias: Tensor | None = None              # (S*G) or (4H)
    # Of each layer behind the first hidden one: S blocks of rows, one for each stack, and a bias for all of them.
    gates: list[tuple[Sequence[Tensor], Tensor | None]] = field(default_factory=list)    # (G, G) ..., last (4H/S, G)


def step(x: Tensor, h: Tensor, c: Tensor, w: CellWeights, activation: str = "relu", noise=None):
    """One step of an LSTM (no hidden layers in `w.gates`) or an H-LSTM: the definition.

    x (B, I), h and c (B, H) -> new h, c. `noise` holds a dropout factor (B, S*G) for each hidden layer, or None.
    """
    z = F.linear(x, w.ih, w.bias) + F.linear(h, w.hh)
    for j, (blocks, bias) in enumerate(w.gates):
        a = ACTIVATIONS[activation](z)
        if noise is not None:
            a = a * noise[j]
        stacks = a.split([block.shape[1] for block in blocks], dim=1)
        z = torch.cat([F.linear(stack, block) for stack, block in zip(stacks, blocks)], dim=1)
        z = z if bias is None else z + bias
    i, f, g, o = z.chunk(4, dim=1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def unroll(x: Tensor, h: Tensor, c: Tensor, w: CellWeights, activation: str = "relu", noise=None):
    """`step` over x (T, B, I): returns all h (T, B, H) and all c (T, B, H). Written to be read, not to be fast.

    `noise` is as in `step`, the same at all steps, or has a factor (T, B, S*G) for each."""
    hs, cs = [], []
    for t in range(len(x)):
        h, c = step(x[t], h, c, w, activation, noise and [n[t] if n.dim() == 3 else n for n in noise])
        hs.append(h)
        cs.append(c)
    return torch.stack(hs), torch.stack(cs)


class HLSTM(nn.Module):
    """Hidden-layer LSTM (paper: Method), shaped like `torch.nn.LSTM`; `gate_layers=0` is exactly that LSTM.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as
            `torch.nn.LSTM`.
        gate_layers: hidden layers inside each gate. gate_width: their width G, `hidden_size` by default; for a width
            of its own in each gate four numbers in the paper's order f, i, o, g, or {"f": ..., "i": ..., ...}.
        activation: relu | leaky_relu | tanh | elu, of the hidden layers.
        gate_dropout: dropout on the hidden layers in training. gate_dropout_per: "sequence" drops the same units at
            all steps of a sequence (Gal and Ghahramani, 2016), "step" draws anew at each step. Without hidden layers
            there is nothing to drop, and a warning says so.
        merge: "concat" or "sum" of the two directions. shared_hidden: one stack of hidden layers for all four gates.

    Weights of layer k, direction suffix "" or "_reverse": `weight_ih_l{k}` (4G, I) and `weight_hh_l{k}` (4G, H) feed
    the first hidden layers, `weight_gate{j}_l{k}` the layers behind them, the last one (4H, G); at `gate_layers=0`
    the names and shapes are those of `torch.nn.LSTM`, whose state dict then loads. Rows stand in the order of the gates
    i, f, g, o. Gates of unequal widths have matrices of their own, `weight_gate{j}_{gate}_l{k}`.

    With hidden layers a layer can be differentiated once, not twice, and not by `torch.func`; for both there is
    `unroll`.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, *, gate_layers: int = 1,
                 gate_width: int | Sequence[int] | Mapping[str, int] | None = None, activation: str = "relu",
                 gate_dropout: float = 0.0, gate_dropout_per: str = "sequence", bias: bool = True,
                 batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
                 merge: str = "concat", shared_hidden: bool = False, device=None, dtype: torch.dtype | None = None):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        if merge not in ("concat", "sum"):
            raise ValueError(f"merge {merge!r}: choose 'concat' or 'sum'")
        if gate_dropout_per not in ("sequence", "step"):
            raise ValueError(f"gate_dropout_per {gate_dropout_per!r}: choose 'sequence' or 'step'")
        input_size, hidden_size, num_layers, gate_layers = map(
            operator.index, (input_size, hidden_size, num_layers, gate_layers))
        widths = _widths(hidden_size if gate_width is None else gate_width)
        self.uneven = len(set(widths)) > 1
        if self.uneven and shared_hidden:
            raise ValueError(f"gate_width {gate_width}: a stack shared by all gates has one width")
        if min(input_size, hidden_size, num_layers, *widths) < 1 or gate_layers < 0:
            raise ValueError("sizes, num_layers and gate_width must be at least 1, gate_layers at least 0")
        if not (0 <= dropout <= 1 and 0 <= gate_dropout < 1):
            raise ValueError("dropout must lie in [0, 1] and gate_dropout in [0, 1)")
        if gate_dropout and not gate_layers:
            warnings.warn("gate_dropout drops units of hidden layers; with gate_layers=0 there are none", stacklevel=2)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.gate_layers, self.shared_hidden, self.activation = gate_layers, shared_hidden, activation
        self.gate_width = dict(zip("ifgo", widths)) if self.uneven else widths[0]
        self.widths = widths[:1] if shared_hidden else widths      # of each stack, in the order of the rows
        self.gate_dropout, self.gate_dropout_per, self.dropout = gate_dropout, gate_dropout_per, dropout
        self.bias, self.batch_first, self.bidirectional, self.merge = bias, batch_first, bidirectional, merge
        self.directions = 2 if bidirectional else 1
        self.output_size = hidden_size * (2 if bidirectional and merge == "concat" else 1)
        for k in range(num_layers):
            for suffix in self._suffixes(k):
                for name, shape in self._shapes(input_size if k == 0 else self.output_size).items():
                    self.register_parameter(name + suffix, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def _suffixes(self, k: int) -> list[str]:
        return [f"_l{k}", f"_l{k}_reverse"][:self.directions]

    def _shapes(self, input_size: int) -> dict[str, tuple[int, ...]]:
        H, widths = self.hidden_size, self.widths
        hidden = sum(widths)                                       # rows of a layer that feeds a hidden layer
        first = hidden if self.gate_layers else 4 * H
        shapes = {"weight_ih": (first, input_size), "weight_hh": (first, H), "bias_ih": (first,)}
        if self.gate_layers == 0:
            shapes["bias_hh"] = (first,)                           # as torch.nn.LSTM has it
        for j in range(1, self.gate_layers + 1):
            last = j == self.gate_layers
            rows = 4 * H if last else hidden
            if self.uneven:
                shapes |= {f"weight_gate{j}_{gate}": (H if last else G, G) for gate, G in zip("ifgo", widths)}
            else:
                shapes[f"weight_gate{j}"] = rows, widths[0]
            shapes[f"bias_gate{j}"] = (rows,)
        return {name: shape for name, shape in shapes.items() if self.bias or not name.startswith("bias")}

    def blocks_in(self, name: str) -> int:
        """How many matrices with inputs of their own stand above each other in the parameter of that name: a layer
        behind the first hidden one has a block for each stack."""
        return len(self.widths) if name.startswith("weight_gate") and not self.uneven else 1

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(H), as torch.nn.LSTM; layers behind the first: +-1/sqrt(G), plus one on the diagonal of
        each stack's block.

        So an H-LSTM starts out nearer to a plain LSTM: each hidden unit hands its value on to one unit of its gate.
        With random weights alone each gate is a mixture of all its hidden units, and learning begins much more slowly.
        """
        for name, p in self.named_parameters():
            behind = name.startswith("weight_gate")
            bound = 1 / math.sqrt(p.shape[1] if behind else self.hidden_size)
            nn.init.uniform_(p, -bound, bound)
            if behind:
                p[diagonals(p.shape, self.blocks_in(name))] += 1      # the identity in each gate

    def weights(self, k: int, reverse: bool = False, whole: bool = False) -> CellWeights:
        """The weights of layer k in one direction, as `step` takes them; `whole`: equal blocks as one matrix."""
        def get(name: str):
            return getattr(self, f"{name}_l{k}" + ("_reverse" if reverse else ""), None)
        bias = get("bias_ih")
        if bias is not None and self.gate_layers == 0:
            bias = bias + get("bias_hh")
        gates = []
        for j in range(1, self.gate_layers + 1):
            blocks = ([get(f"weight_gate{j}_{gate}") for gate in "ifgo"] if self.uneven
                      else [get(f"weight_gate{j}")] if whole else get(f"weight_gate{j}").chunk(len(self.widths)))
            gates.append((blocks, get(f"bias_gate{j}")))
        return CellWeights(get("weight_ih"), get("weight_hh"), bias, gates)

    def forward(self, input, hx=None, lengths: Tensor | None = None, with_state: bool = True):
        """input (T, B, I), (B, T, I) with `batch_first`, (T, I), or a PackedSequence -> output, (h_n, c_n).

        `hx` = (h_0, c_0), each (num_layers*D, B, H), of the weights' type. `lengths` (B) says how long each padded
        sequence is: outputs behind it are zero and the states are those at its end, so that padding changes nothing.
        `with_state=False` returns (output, None), which spares a plain LSTM over padded sequences a slow kernel. Raises
        ValueError where a shape or type does not fit; outside autocast `input` has the weights' type.
        """
        packed = input if isinstance(input, PackedSequence) else None
        x = packed.data if packed is not None else input
        steps = 1 if self.batch_first and packed is None and x.dim() == 3 else 0       # which dimension
        if x.dim() not in (2, 3) or x.shape[-1] != self.input_size or x.shape[steps] == 0:
            raise ValueError(f"input {tuple(x.shape)}: steps must be 1 or more, the last dimension "
                             f"input_size={self.input_size}")
        wanted = self.weight_hh_l0.dtype
        if x.dtype != wanted and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
            raise ValueError(f"input {x.dtype}: the weights are {wanted}; convert one of them, or use autocast")
        if packed is not None:
            if lengths is not None:
                raise ValueError("a PackedSequence knows its lengths; leave `lengths` out")
            x, lengths = pad_packed_sequence(packed)
        elif input.dim() == 2:
            x, hx = input.unsqueeze(1), None if hx is None else tuple(s.unsqueeze(1) for s in hx)
        elif self.batch_first:
            x = input.transpose(0, 1)
        states = self.num_layers * self.directions, x.shape[1], self.hidden_size
        h0, c0 = self._states(hx, states)
        if x.shape[1] == 0:
            return self._nothing(x, h0, c0, with_state)
        if lengths is not None:
            lengths = torch.as_tensor(lengths, device=x.device)
            # An exported program is made before there are values.
            known = not getattr(torch.compiler, "is_exporting", bool)()
            if (lengths.shape != x.shape[1:2] or lengths.is_floating_point()
                    or known and not (1 <= lengths.min() and lengths.max() <= len(x))):
                raise ValueError(f"lengths must be {x.shape[1]} whole numbers from 1 to {len(x)}")
            lengths = lengths.long()
            x = x.masked_fill(~alive(x, lengths), 0)              # whatever stands in the padding, even NaN
        ends = []
        for k in range(self.num_layers):
            span = slice(k * self.directions, (k + 1) * self.directions)
            x, *end = self._layer(k, x, h0[span], c0[span], lengths, with_state)
            ends.append(end)
            if k < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        hn, cn = (torch.cat(s) for s in zip(*ends))
        if packed is not None:
            x = _packed_like(packed, x, lengths)
        elif input.dim() == 2:
            x, hn, cn = x.squeeze(1), hn.squeeze(1), cn.squeeze(1)
        elif self.batch_first:
            x = x.transpose(0, 1)
        return x, ((hn, cn) if with_state else None)

    def _states(self, hx, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """(h_0, c_0) as the weights' type, zero without `hx`. Raises ValueError if shape or type is another."""
        if hx is None:
            return (self.weight_hh_l0.new_zeros(shape),) * 2
        if not isinstance(hx, (tuple, list)) or len(hx) != 2:
            raise ValueError("hx must be a pair (h_0, c_0)")
        h0, c0 = hx
        if tuple(h0.shape) != shape or tuple(c0.shape) != shape:
            raise ValueError(f"h_0 {tuple(h0.shape)} and c_0 {tuple(c0.shape)} must both be {shape}")
        wanted = self.weight_hh_l0.dtype
        if torch.is_autocast_enabled(h0.device.type) and h0.is_floating_point() and c0.is_floating_point():
            return h0.to(wanted), c0.to(wanted)                    # of a layer before, in less than float32
        if not h0.dtype == c0.dtype == wanted:
            raise ValueError(f"h_0 {h0.dtype} and c_0 {c0.dtype} must both be {wanted}, as the weights are")
        return h0, c0

    def _nothing(self, x: Tensor, h0: Tensor, c0: Tensor, with_state: bool):
        """What comes of an empty batch."""
        # Tied to input and weights, whose gradients are zero then: a process without data learns with the others.
        out = x.new_zeros(len(x), 0, self.output_size) + 0 * sum(p.sum() for p in (x, *self.parameters()))
        return out.transpose(0, 1) if self.batch_first else out, ((h0, c0) if with_state else None)

    def _layer(self, k: int, x: Tensor, h: Tensor, c: Tensor, lengths: Tensor | None, with_state: bool):
        """One layer: x (T, B, I), h and c (D, B, H) -> merged output, h_n and c_n (D, B, H)."""
        xs = [x, flip(x, lengths)] if self.bidirectional else [x]
        weights = [self.weights(k, reverse, whole=True) for reverse in (False, True)[:self.directions]]
        args, plain = (xs, h, c, weights, lengths), self.gate_layers == 0 and not _slow_way_back(x, weights[0])
        hs, cn = self._plain(k, *args, with_state) if plain else self._steps(*args)      # by direction: (T, B, H)
        hn = torch.stack([at_end(s, lengths) for s in hs])
        if lengths is not None:
            hs = [s.masked_fill(~alive(s, lengths), 0) for s in hs]        # even of a state that is NaN
        if self.bidirectional:
            hs = [hs[0], flip(hs[1], lengths)]
            return (hs[0] + hs[1] if self.merge == "sum" else torch.cat(hs, dim=2)), hn, cn
        return hs[0], hn, cn

    def _steps(self, xs, h, c, weights, lengths):
        """A layer by `scan`."""
        weights = [_even(w, self.widths) for w in weights] if self.uneven and self.gate_layers else weights
        probe, units = _probe(xs[0], weights[0]), sum(len(w.ih) for w in weights)
        noise = self.noise((*xs[0].shape[:2], units), probe) if self.training and self.gate_dropout else []
        size = weights[0].hh.numel() + sum(block.numel() for blocks, _ in weights[0].gates for block in blocks)
        if size < APART or probe.device.type != "cpu":
            return self._scan(xs, h, c, weights, noise, lengths, probe.dtype)
        # Large weights of two directions would drive each other out of the cache at every step.
        each = zip(xs, h[:, None], c[:, None], weights, *(n.chunk(len(xs), 2) for n in noise))
        done = [self._scan([x], h, c, [w], own, lengths, probe.dtype) for x, h, c, w, *own in each]
        return [hs for (hs,), _ in done], torch.cat([cn for _, cn in done])

    def _scan(self, xs, h, c, weights, noise, lengths, low):
        """All steps of one direction, or of both at once: lists and first dimensions by direction."""
        D = len(xs)
        if getattr(torch._C, "_are_functorch_transforms_active", bool)():      # jvp would silently give zero
            raise NotImplementedError("transforms of torch.func do not reach into this layer; use unroll, or "
                                      "gate_layers=0")

        def join(tensors, dim=0):                                  # both directions' rows in one tensor
            tensors = list(tensors)
            return torch.cat(tensors, dim) if len(tensors) > 1 else tensors[0]
        layers = list(zip(*(w.gates for w in weights)))            # the same layer of all directions
        mats = [join(getattr(w, name) for w in weights) for name in ("ih", "hh")]
        mats += [join(block for blocks, _ in layer for block in blocks) for layer in layers]
        biases = [join(w.bias for w in weights), *(join(b for _, b in layer) for layer in layers)] if self.bias else []
        x = join(xs, 2)
        h, c = (s.transpose(0, 1).flatten(1).contiguous() for s in (h, c))                      # (B, D*H)
        ends = None if lengths is None else lengths - 1
        hs, cn, *_ = scan(x, h, c, mats, biases, [n.expand(*x.shape[:2], -1) for n in noise], D * len(self.widths),
                          self.activation, low, ends)              # bfloat16 under autocast
        return hs.chunk(D, dim=2) if D > 1 else [hs], torch.stack(cn.chunk(D, dim=1))           # a direction each

    def noise(self, shape, like: Tensor) -> list[Tensor]:
        """Dropout factors for each hidden layer, 0 or 1 / (1 - gate_dropout): of shape (T, B, units), or (1, B, units)
        where a sequence keeps its own."""
        shape = shape if self.gate_dropout_per == "step" else (1, *shape[1:])
        keep = 1 - self.gate_dropout
        return [torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(keep).div_(keep)
                for _ in range(self.gate_layers)]

    def _plain(self, k, xs, h, c, weights, lengths, with_state):
        """An ordinary LSTM: PyTorch's own kernel for each direction."""
        hs, cn = [], []
        for d, x in enumerate(xs):
            names = [name + self._suffixes(k)[d] for name in self._shapes(x.shape[2])]
            flat = [getattr(self, name) for name in names]
            state, options = (h[d:d + 1], c[d:d + 1]), (self.bias, 1, 0.0, self.training, False)
            if lengths is None or not with_state:
                out, _, last = torch.lstm(x, state, flat, *options, False)
            else:  # only the packed kernel, slow on a CPU, stops each sequence at its own end
                p = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
                state = tuple(s[:, p.sorted_indices] for s in state)
                out, _, last = torch.lstm(p.data, p.batch_sizes, state, flat, *options)
                out, _ = pad_packed_sequence(p._replace(data=out), total_length=len(x))
                last = last[:, p.unsorted_indices]
            hs.append(out)
            cn.append(last[0])
        return hs, torch.stack(cn)

    @classmethod
    def from_lstm(cls, lstm: nn.LSTM) -> "HLSTM":
        """A copy of a `torch.nn.LSTM`, its weights included: `gate_layers=0`. ValueError for one with `proj_size`,
        TypeError for another module."""
        if not isinstance(lstm, nn.LSTM):
            raise TypeError(f"{type(lstm).__name__}: only a torch.nn.LSTM is an HLSTM without hidden layers")
        if lstm.proj_size:
            raise ValueError(f"proj_size={lstm.proj_size}: an HLSTM has no projections")
        ours = cls(lstm.input_size, lstm.hidden_size, lstm.num_layers, gate_layers=0, bias=lstm.bias,
                   batch_first=lstm.batch_first, dropout=lstm.dropout, bidirectional=lstm.bidirectional)
        return _like(ours, lstm)

    def to_lstm(self) -> nn.LSTM:
        """A copy as `torch.nn.LSTM`. ValueError if there are hidden layers or directions that are summed."""
        if self.gate_layers or (self.bidirectional and self.merge == "sum"):
            raise ValueError("torch.nn.LSTM knows only gate_layers=0 and merge='concat'")
        theirs = nn.LSTM(self.input_size, self.hidden_size, self.num_layers, bias=self.bias,
                         batch_first=self.batch_first, dropout=self.dropout, bidirectional=self.bidirectional)
        return _like(theirs, self)

    def flatten_parameters(self) -> None:
        """Nothing: for code that calls it on a `torch.nn.LSTM`."""

    def extra_repr(self) -> str:
        told = {"num_layers": 1, "gate_layers": None, "gate_width": self.hidden_size, "activation": "relu",
                "gate_dropout": 0.0, "gate_dropout_per": "sequence", "bias": True, "batch_first": False, "dropout": 0.0,
                "bidirectional": False, "merge": "concat", "shared_hidden": False}
        return ", ".join([f"{self.input_size}, {self.hidden_size}", *(
            f"{name}={getattr(self, name)!r}" for name, usual in told.items() if getattr(self, name) != usual)])


def diagonals(shape: Sequence[int], blocks: int = 1) -> tuple[Tensor, Tensor]:
    """Rows and columns of the diagonals of `blocks` matrices that stand above each other, each wrapped around its
    shorter side, so that it meets each row and column of its block."""
    n, columns = shape[0] // blocks, math.prod(shape[1:])
    k = torch.arange(max(n, columns))
    return (torch.arange(blocks)[:, None] * n + k % n).flatten(), (k % columns).repeat(blocks)


def _probe(x: Tensor, w: CellWeights) -> Tensor:
    """A number of the type that products have, such as bfloat16 under autocast."""
    return F.linear(x[:1, :1], w.ih[:1])


def _slow_way_back(x: Tensor, w: CellWeights) -> bool:
    """Whether PyTorch's own LSTM would take far longer for its way back than `scan` does: it does on a CPU under
    bfloat16 autocast, if the matrix of h is large."""
    large = x.device.type == "cpu" and w.hh.numel() >= APART and torch.is_grad_enabled()
    return large and _probe(x, w).dtype == torch.bfloat16 != w.hh.dtype


def _packed_like(packed: PackedSequence, x: Tensor, lengths: Tensor) -> PackedSequence:
    """x (T, B, N) in the order of `packed`, which among equal lengths is the caller's choice."""
    order = packed.sorted_indices
    if order is not None:
        x, lengths = x[:, order], lengths[order]
    return packed._replace(data=pack_padded_sequence(x, lengths.cpu()).data)


def _widths(gate_width) -> tuple[int, ...]:
    """The option `gate_width` as widths in the order of the rows, i, f, g, o."""
    if isinstance(gate_width, Integral):
        return (int(gate_width),) * 4
    if not isinstance(gate_width, Mapping):
        gate_width = dict(zip("fiog", gate_width)) if len(gate_width) == 4 else {}
    if set(gate_width) != set("fiog"):
        raise ValueError("gate_width must be a number, or four in the order f, i, o, g, or four by these names")
    return tuple(operator.index(gate_width[gate]) for gate in "ifgo")


def _even(w: CellWeights, widths: Sequence[int]) -> CellWeights:
    """The same cell with all gates as wide as the widest: the units added are always zero, and feed nothing."""
    def rows(t):
        return None if t is None else torch.cat([F.pad(part, (0, 0) * (t.dim() - 1) + (0, max(widths) - len(part)))
                                                 for part in t.split(widths)])
    gates = []
    for blocks, bias in w.gates:
        filled = torch.cat([F.pad(block, (0, max(widths) - block.shape[1])) for block in blocks])
        last = len(gates) + 1 == len(w.gates)
        gates.append(([filled], bias) if last else ([rows(filled)], rows(bias)))
    return CellWeights(rows(w.ih), rows(w.hh), rows(w.bias), gates)


def _like(module: nn.Module, other: nn.Module) -> nn.Module:
    """Takes over the weights, their type and device, which of them learn, and the mode of a module with the same
    parameters."""
    module.to(next(other.parameters())).load_state_dict(other.state_dict())
    for name, p in other.named_parameters():
        module.get_parameter(name).requires_grad_(p.requires_grad)
    return module.train(other.training)


class HLSTMCell(nn.Module):
    """One H-LSTM cell for stepping, shaped like `torch.nn.LSTMCell`.

    forward(x (B, I), (h, c) each (B, H) or None) -> new (h, c); or (I) and (H), without a batch. Options: gate_layers,
    gate_width, activation, gate_dropout (drawn anew each step), shared_hidden, device, dtype, as `HLSTM`; `layer` is
    the one-layer `HLSTM` with the weights. Raises ValueError for an option of a whole layer, or a shape that does not
    fit.
    """

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, **options):
        super().__init__()
        unknown = options.keys() & {"num_layers", "batch_first", "dropout", "bidirectional", "merge",
                                    "gate_dropout_per"}
        if unknown:
            raise ValueError(f"a single cell takes no {', '.join(sorted(unknown))}")
        self.layer = HLSTM(input_size, hidden_size, bias=bias, **options)

    def forward(self, x: Tensor, hx=None) -> tuple[Tensor, Tensor]:
        if x.dim() == 1:
            h, c = self(x[None], None if hx is None else tuple(s[None] for s in hx))
            return h[0], c[0]
        size, state = self.layer.input_size, (len(x), self.layer.hidden_size)
        h, c = hx if hx is not None else [x.new_zeros(state)] * 2
        if x.shape[1:] != (size,) or not h.shape == c.shape == state:
            raise ValueError(f"x {tuple(x.shape)}, h {tuple(h.shape)}, c {tuple(c.shape)}: expected (B, {size}) "
                             f"and twice (B, {state[1]})")
        noise = None
        if self.training and self.layer.gate_dropout:
            noise = [n[0] for n in self.layer.noise((1, len(x), sum(self.layer.widths)), x)]
        return step(x, h, c, self.layer.weights(0), self.layer.activation, noise)
