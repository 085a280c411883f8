"""The LSTM and the hidden-layer LSTM (H-LSTM), once to be read and once to be fast.

The paper (abstract; equations follow from its words): with z = [x_t, h_(t-1)] and H* a stack of hidden layers,
    i, f, o = sigmoid(W H*(z) + b)      g = tanh(W H*(z) + b)      c_t = f c_(t-1) + i g      h_t = o tanh(c_t)
A plain LSTM has an empty stack, H*(z) = z. Sizes: T steps, B batch, I input, H hidden, G gate width, D directions,
S stacks of hidden layers (4: one for each gate; 1: shared). The gates' rows stand in PyTorch's order i, f, g, o.

`step` is the definition, `unroll` repeats it, and `HLSTM` computes the same quickly; the tests hold them together.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

ACTIVATIONS = {"relu": F.relu, "leaky_relu": F.leaky_relu, "tanh": torch.tanh, "elu": F.elu}

# Slopes of the activations, computed from their outputs, so that the inputs need not be kept for the way back.
SLOPES = {"relu": lambda a: (a > 0).to(a.dtype),
          "leaky_relu": lambda a: (a > 0).to(a.dtype).clamp_(min=0.01),
          "tanh": lambda a: 1 - a * a,
          "elu": lambda a: torch.where(a > 0, torch.ones_like(a), a + 1)}


@dataclass
class CellWeights:
    """Weights of one cell: `ih` and `hh` act on x and h; `gates` holds (W, b) of the layers behind them."""
    ih: Tensor                              # (S*G, I), or (4H, I) without hidden layers
    hh: Tensor                              # (S*G, H), or (4H, H)
    bias: Tensor | None = None              # (S*G) or (4H)
    gates: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)   # (S*G, G) ..., last (4H, G)


def step(x: Tensor, h: Tensor, c: Tensor, w: CellWeights, activation: str = "relu", noise=None):
    """One step of an LSTM (no hidden layers in `w.gates`) or an H-LSTM: the definition.

    x (B, I), h and c (B, H) -> new h, c. `noise` holds a dropout factor (B, S*G) for each hidden layer, or None.
    """
    z = F.linear(x, w.ih, w.bias) + F.linear(h, w.hh)
    for j, (weight, bias) in enumerate(w.gates):
        a = ACTIVATIONS[activation](z)
        if noise is not None:
            a = a * noise[j]
        stacks = a.split(weight.shape[1], dim=1)                   # S of them, G wide, each with its own rows
        z = torch.cat([F.linear(s, rows) for s, rows in zip(stacks, weight.chunk(len(stacks)))], dim=1)
        z = z if bias is None else z + bias
    i, f, g, o = z.chunk(4, dim=1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def unroll(x: Tensor, h: Tensor, c: Tensor, w: CellWeights, activation: str = "relu", noise=None):
    """`step` over x (T, B, I): returns all h (T, B, H) and all c (T, B, H). Written to be read, not to be fast."""
    hs, cs = [], []
    for t in range(len(x)):
        h, c = step(x[t], h, c, w, activation, noise)
        hs.append(h)
        cs.append(c)
    return torch.stack(hs), torch.stack(cs)


def flip(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Reverses x (T, B, ...) in time, each sequence within its own length; padding stays where it is."""
    if lengths is None:
        return x.flip(0)
    t = torch.arange(len(x), device=x.device)[:, None]
    index = torch.where(t < lengths, lengths - 1 - t, t)           # (T, B)
    return x.gather(0, index.view(*index.shape, *[1] * (x.dim() - 2)).expand_as(x))


class _Scan(torch.autograd.Function):
    """The recurrence of one H-LSTM layer: all gates and both directions in one batched product a step.

    Forward keeps states and activations. Backward walks the steps once more, with one product a step for each matrix,
    and makes each weight gradient as one large product at the end. Under bfloat16 autocast the products and what is
    kept for the way back are in bfloat16; the states stay in float32, since c sums over many steps.
    N = D*S stacks, D*4 gates.
        inputs (T, N, B, G): projections of x, bias included     h, c (D, B, H)     hh (N, G, H)
        layers: weights (N, G, G) ..., last (D*4, H, G); biases (N, G) ..., last (D*4, H); noise (N, B, G) or none
    """

    @staticmethod
    def forward(ctx, activation, depth, inputs, h, c, hh, *layers):
        weights, biases, noise = layers[:depth], layers[depth:2 * depth], layers[2 * depth:]
        (T, N, B, G), (D, _, H), low = inputs.shape, h.shape, inputs.dtype
        hs, cs = h.new_empty(T + 1, D, B, H), h.new_empty(T + 1, D, B, H)
        gates, now = inputs.new_empty(T, D, 4, B, H), h.new_empty(D, 4, B, H)
        hidden = [inputs.new_empty(T, N, B, G) for _ in weights]
        hs[0], cs[0] = h, c
        hhT, weightsT = hh.mT.contiguous(), [w.mT.contiguous() for w in weights]
        for t in range(T):
            z = torch.baddbmm(inputs[t], _repeat(hs[t].to(low), N), hhT)
            for j in range(depth):
                a = hidden[j][t] = ACTIVATIONS[activation](z)
                a = a * noise[j] if noise else a
                z = torch.baddbmm(biases[j].unsqueeze(1), _repeat(a, len(weights[j])), weightsT[j])
            z = z.view(D, 4, B, H).to(h.dtype)
            torch.sigmoid(z, out=now)
            torch.tanh(z[:, 2], out=now[:, 2])
            gates[t] = now
            i, f, g, o = now.unbind(1)
            torch.addcmul(f * cs[t], i, g, out=cs[t + 1])
            torch.mul(o, cs[t + 1].tanh(), out=hs[t + 1])
        ctx.activation, ctx.depth = activation, depth
        ctx.save_for_backward(hs, cs, gates, hh, *weights, *hidden, *noise)
        return hs[1:], cs[1:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dhs, dcs):
        depth = ctx.depth
        hs, cs, gates, hh, *rest = ctx.saved_tensors
        weights, hidden, noise = rest[:depth], rest[depth:2 * depth], rest[2 * depth:]
        (T, D, _, B, H), N, low = gates.shape, len(hh), hh.dtype
        # What each gate's gradient is a multiple of, for all steps at once: i, f, g follow dc; o follows dh.
        i, f, g, o = gates.unbind(2)
        tanh_c = cs[1:].tanh().to(low)
        slope = gates * (1 - gates)                                # (T, D, 4, B, H)
        slope[:, :, 0] *= g
        slope[:, :, 1] *= cs[:-1]
        slope[:, :, 2] = i * (1 - g * g)
        slope[:, :, 3] *= tanh_c
        through_o = o * (1 - tanh_c * tanh_c)
        slopes = [SLOPES[ctx.activation](a) for a in hidden]
        if noise:                                                  # hidden layers are kept as they are before dropout
            slopes = [s.mul_(n) for s, n in zip(slopes, noise)]
            hidden = [a * n for a, n in zip(hidden, noise)]
        dz, das = torch.empty_like(gates), [torch.empty_like(a) for a in hidden]
        dh, dc = torch.zeros_like(hs[0]), torch.zeros_like(cs[0])
        for t in reversed(range(T)):
            dh += dhs[t]
            dc += dcs[t]
            dc += dh * through_o[t]
            torch.mul(slope[t][:, :3], dc.unsqueeze(1), out=dz[t][:, :3])
            torch.mul(slope[t][:, 3], dh, out=dz[t][:, 3])
            dc *= f[t]
            d = dz[t].view(D * 4, B, H)
            for j in reversed(range(depth)):
                d = _fold(torch.bmm(d, weights[j]), N)
                d = torch.mul(d, slopes[j][t], out=das[j][t])
            dh = _fold(torch.bmm(d, hh), D).to(dh.dtype)
        ds = [*das[1:], dz.view(T, D * 4, B, H)]                   # gradients before each layer behind the first
        dweights = [_outer(d, a) for d, a in zip(ds, hidden)]
        dbiases = [d.sum((0, 2)) for d in ds]
        dhh = _outer(das[0], hs[:-1].to(low))
        return (None, None, das[0], dh, dc, dhh, *dweights, *dbiases, *[None] * len(noise))


def _repeat(x: Tensor, n: int) -> Tensor:
    """(m, B, K) -> (n, B, K): every block of x serves n/m neighbours."""
    return x if len(x) == n else x.repeat_interleave(n // len(x), 0)


def _fold(x: Tensor, n: int) -> Tensor:
    """(m, B, K) -> (n, B, K): the way back of `_repeat`, neighbours summed."""
    return x if len(x) == n else x.view(n, -1, *x.shape[1:]).sum(1)


def _outer(d: Tensor, a: Tensor) -> Tensor:
    """d (T, m, B, K), a (T, n, B, J), n dividing m -> (m, K, J): summed over steps and batch in one product."""
    m, n = d.shape[1], a.shape[1]
    d = d.transpose(0, 1).reshape(n, m // n, -1, d.shape[3])       # (n, m/n, T*B, K)
    a = a.transpose(0, 1).reshape(n, -1, a.shape[3])               # (n, T*B, J)
    return torch.stack([block.mT @ a[k] for k in range(n) for block in d[k]])


class HLSTM(nn.Module):
    """Hidden-layer LSTM (paper: Method), shaped like `torch.nn.LSTM`; `gate_layers=0` is exactly that LSTM.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: as `torch.nn.LSTM`.
        gate_layers: hidden layers inside each gate. gate_width: their width G, `hidden_size` by default.
        activation: relu | leaky_relu | tanh | elu, of the hidden layers. gate_dropout: dropout on them, one
            draw for a whole sequence (Gal and Ghahramani, 2016).
        merge: "concat" or "sum" of the two directions. shared_hidden: one stack of hidden layers for all four gates.

    Weights of layer k, direction suffix "" or "_reverse": `weight_ih_l{k}` (4G, I) and `weight_hh_l{k}` (4G, H) feed
    the first hidden layers, `weight_gate{j}_l{k}` the layers behind them, the last one (4H, G); at `gate_layers=0`
    the names and shapes are those of `torch.nn.LSTM`, whose state dict then loads.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, *, gate_layers: int = 1,
                 gate_width: int | None = None, activation: str = "relu", gate_dropout: float = 0.0,
                 bias: bool = True, batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
                 merge: str = "concat", shared_hidden: bool = False):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        if merge not in ("concat", "sum"):
            raise ValueError(f"merge {merge!r}: choose 'concat' or 'sum'")
        gate_width = hidden_size if gate_width is None else gate_width
        if min(input_size, hidden_size, num_layers, gate_width) < 1 or gate_layers < 0:
            raise ValueError("sizes, num_layers and gate_width must be at least 1, gate_layers at least 0")
        if not (0 <= dropout < 1 and 0 <= gate_dropout < 1):
            raise ValueError("dropout and gate_dropout must lie in [0, 1)")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.gate_layers, self.gate_width, self.shared_hidden = gate_layers, gate_width, shared_hidden
        self.activation, self.gate_dropout, self.dropout = activation, gate_dropout, dropout
        self.bias, self.batch_first, self.bidirectional, self.merge = bias, batch_first, bidirectional, merge
        self.directions = 2 if bidirectional else 1
        self.output_size = hidden_size * (2 if bidirectional and merge == "concat" else 1)
        for k in range(num_layers):
            for suffix in self._suffixes(k):
                for name, shape in self._shapes(input_size if k == 0 else self.output_size).items():
                    self.register_parameter(name + suffix, nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    def _suffixes(self, k: int) -> list[str]:
        return [f"_l{k}", f"_l{k}_reverse"][:self.directions]

    def _shapes(self, input_size: int) -> dict[str, tuple[int, ...]]:
        G, H = self.gate_width, self.hidden_size
        hidden = (1 if self.shared_hidden else 4) * G              # rows of a layer that feeds a hidden layer
        first = hidden if self.gate_layers else 4 * H
        shapes = {"weight_ih": (first, input_size), "weight_hh": (first, H), "bias_ih": (first,)}
        if self.gate_layers == 0:
            shapes["bias_hh"] = (first,)                           # as torch.nn.LSTM has it
        for j in range(1, self.gate_layers + 1):
            rows = 4 * H if j == self.gate_layers else hidden
            shapes |= {f"weight_gate{j}": (rows, G), f"bias_gate{j}": (rows,)}
        return {name: shape for name, shape in shapes.items() if self.bias or not name.startswith("bias")}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(H), as torch.nn.LSTM; layers behind the first: +-1/sqrt(G), plus one on the diagonal.

        So an H-LSTM starts out close to a plain LSTM, each hidden unit handing its sum on to one gate. With random
        weights alone each gate is a mixture of all its hidden units, and learning begins much more slowly.
        """
        for name, p in self.named_parameters():
            behind = name.startswith("weight_gate")
            bound = 1 / math.sqrt(p.shape[1] if behind else self.hidden_size)
            nn.init.uniform_(p, -bound, bound)
            if behind:
                k = torch.arange(max(p.shape))
                p[k % p.shape[0], k % p.shape[1]] += 1             # the diagonal, wrapped: the identity in each gate

    def weights(self, k: int, reverse: bool = False) -> CellWeights:
        """The weights of layer k in one direction, as `step` takes them."""
        def get(name: str):
            return getattr(self, f"{name}_l{k}" + ("_reverse" if reverse else ""), None)
        bias = get("bias_ih")
        if bias is not None and self.gate_layers == 0:
            bias = bias + get("bias_hh")
        gates = [(get(f"weight_gate{j}"), get(f"bias_gate{j}")) for j in range(1, self.gate_layers + 1)]
        return CellWeights(get("weight_ih"), get("weight_hh"), bias, gates)

    def forward(self, input, hx=None, lengths: Tensor | None = None, with_state: bool = True):
        """input (T, B, I), (B, T, I) with `batch_first`, (T, I), or a PackedSequence -> output, (h_n, c_n).

        `hx` = (h_0, c_0), each (num_layers*D, B, H). `lengths` (B) says how long each padded sequence is: outputs
        behind it are zero and the states are those at its end, so that padding changes nothing. `with_state=False`
        returns (output, None), which spares a plain LSTM over padded sequences a slow kernel. Raises ValueError where
        a shape does not fit.
        """
        packed = input if isinstance(input, PackedSequence) else None
        x = packed.data if packed is not None else input
        if x.dim() not in (2, 3) or x.shape[-1] != self.input_size or 0 in x.shape:
            raise ValueError(f"input {tuple(x.shape)}: steps and batch must be 1 or more, the last dimension "
                             f"input_size={self.input_size}")
        if packed is not None:
            x, lengths = pad_packed_sequence(packed)
        elif input.dim() == 2:
            x, hx = input.unsqueeze(1), None if hx is None else tuple(s.unsqueeze(1) for s in hx)
        elif self.batch_first:
            x = input.transpose(0, 1)
        states = self.num_layers * self.directions, x.shape[1], self.hidden_size
        h0, c0 = hx if hx is not None else (self.weight_hh_l0.new_zeros(states),) * 2
        if tuple(h0.shape) != states or tuple(c0.shape) != states:
            raise ValueError(f"h_0 {tuple(h0.shape)} and c_0 {tuple(c0.shape)} must both be {states}")
        if lengths is not None:
            lengths = torch.as_tensor(lengths, device=x.device)
            if (lengths.shape != x.shape[1:2] or lengths.is_floating_point()
                    or not (1 <= lengths.min() and lengths.max() <= len(x))):
                raise ValueError(f"lengths must be {x.shape[1]} whole numbers from 1 to {len(x)}")
            x = x.masked_fill(~_alive(x, lengths), 0)              # whatever stands in the padding, even NaN
        hn, cn = [], []
        for k in range(self.num_layers):
            span = slice(k * self.directions, (k + 1) * self.directions)
            x, h, c = self._layer(k, x, h0[span], c0[span], lengths, with_state)
            hn.append(h)
            cn.append(c)
            if k < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        hn, cn = torch.cat(hn), torch.cat(cn)
        if packed is not None:
            x = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=packed.sorted_indices is None)
        elif input.dim() == 2:
            x, hn, cn = x.squeeze(1), hn.squeeze(1), cn.squeeze(1)
        elif self.batch_first:
            x = x.transpose(0, 1)
        return x, ((hn, cn) if with_state else None)

    def _layer(self, k: int, x: Tensor, h: Tensor, c: Tensor, lengths: Tensor | None, with_state: bool):
        """One layer: x (T, B, I), h and c (D, B, H) -> merged output, h_n and c_n (D, B, H)."""
        xs = [x, flip(x, lengths)] if self.bidirectional else [x]
        weights = [self.weights(k, reverse) for reverse in (False, True)[:self.directions]]
        scan = self._plain if self.gate_layers == 0 else self._hidden
        hs, cn = scan(k, xs, h, c, weights, lengths, with_state)   # hs: per direction (T, B, H); cn (D, B, H)
        if lengths is None:
            hn = torch.stack([s[-1] for s in hs])
        else:
            hn = torch.stack([_at_end(s, lengths) for s in hs])
            hs = [s * _alive(s, lengths) for s in hs]
        if self.bidirectional:
            hs = [hs[0], flip(hs[1], lengths)]
            return (hs[0] + hs[1] if self.merge == "sum" else torch.cat(hs, dim=2)), hn, cn
        return hs[0], hn, cn

    def _hidden(self, k, xs, h, c, weights, lengths, with_state):
        (T, B, _), G = xs[0].shape, self.gate_width
        D, S, depth = self.directions, (1 if self.shared_hidden else 4), self.gate_layers
        inputs = [F.linear(x, w.ih, w.bias).view(T, B, S, G).transpose(1, 2) for x, w in zip(xs, weights)]
        inputs = torch.cat(inputs, dim=1)                          # (T, D*S, B, G)
        dtype = inputs.dtype                                       # bfloat16 under autocast; the products follow

        def stack(tensors, *shape):                                # both directions' blocks in one tensor
            return torch.cat([t.view(-1, *shape) for t in tensors]).to(dtype)
        hh = stack([w.hh for w in weights], G, self.hidden_size)
        rows = [G] * (depth - 1) + [self.hidden_size]
        mats = [stack([w.gates[j][0] for w in weights], rows[j], G) for j in range(depth)]
        biases = [stack([w.gates[j][1] for w in weights], rows[j]) if self.bias
                  else mats[j].new_zeros(mats[j].shape[:2]) for j in range(depth)]
        noise = self.noise((D * S, B, G), inputs) if self.training and self.gate_dropout else []
        hs, cs = _Scan.apply(self.activation, depth, inputs, h, c, hh, *mats, *biases, *noise)
        cn = cs[-1] if lengths is None else torch.stack([_at_end(cs[:, d], lengths) for d in range(D)])
        return [hs[:, d] for d in range(D)], cn

    def noise(self, shape, like: Tensor) -> list[Tensor]:
        """Dropout factors for each hidden layer: 0, or 1 / (1 - gate_dropout)."""
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

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, gate_layers={self.gate_layers}"
        return text + (f", bidirectional, merge={self.merge}" if self.bidirectional else "")


def _alive(x: Tensor, lengths: Tensor) -> Tensor:
    """x (T, B, ...) -> (T, B, 1), True within each sequence."""
    return (torch.arange(len(x), device=x.device)[:, None] < lengths)[..., None]


def _at_end(s: Tensor, lengths: Tensor) -> Tensor:
    """s (T, B, H) -> (B, H) at each sequence's last step."""
    return s[lengths - 1, torch.arange(s.shape[1], device=s.device)]


class HLSTMCell(nn.Module):
    """One H-LSTM cell for stepping, shaped like `torch.nn.LSTMCell`.

    forward(x (B, I), (h, c) each (B, H) or None) -> new (h, c). Options: gate_layers, gate_width, activation,
    gate_dropout (drawn anew each step), bias, shared_hidden, as `HLSTM`; `layer` is the one-layer `HLSTM` with the
    weights. Raises ValueError for another option or a shape that does not fit.
    """

    def __init__(self, input_size: int, hidden_size: int, **options):
        super().__init__()
        unknown = options.keys() & {"num_layers", "batch_first", "dropout", "bidirectional", "merge"}
        if unknown:
            raise ValueError(f"a single cell takes no {', '.join(sorted(unknown))}")
        self.layer = HLSTM(input_size, hidden_size, **options)

    def forward(self, x: Tensor, hx=None) -> tuple[Tensor, Tensor]:
        size, state = self.layer.input_size, (len(x), self.layer.hidden_size)
        h, c = hx if hx is not None else [x.new_zeros(state)] * 2
        if x.shape[1:] != (size,) or not h.shape == c.shape == state:
            raise ValueError(f"x {tuple(x.shape)}, h {tuple(h.shape)}, c {tuple(c.shape)}: expected (B, {size}) "
                             f"and twice (B, {state[1]})")
        noise = None
        if self.training and self.layer.gate_dropout:
            noise = self.layer.noise((len(x), len(self.layer.weight_hh_l0)), x)
        return step(x, h, c, self.layer.weights(0), self.layer.activation, noise)
