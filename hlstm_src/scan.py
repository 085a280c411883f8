"""The recurrence of an H-LSTM layer over a whole sequence, forward and backward, made for speed.

It computes what `unroll` in lstm.py says, for one direction or for both at once. What makes it fast:
- All gates and directions of a step are one product with a block-diagonal matrix (`product`), whose weights the matrix
  library packs once for all steps, not anew at each.
- What waits for no other step is done for a stretch of steps at once: the projections of x, the gradients of weights
  and x.
- The element-wise work of the gates is one compiled call (gates.py), or a dozen of PyTorch's where numba is missing.
- On a CPU with the instructions for it, even all steps of a stretch are one compiled call (steps.py, products.py).
- Little memory is touched, since fresh memory costs more time than element-wise work: kept for the way back are states,
  gates and hidden layers, from which slopes follow; the rest of a stretch lies where that of the last one lay.

Sizes: T steps, B batch, I input, H hidden, G gate width, D directions, N = D*S stacks of hidden layers (S = 4: one for
each gate, S = 1: shared). Everything lies as (T, B, channels): channels of h and c by direction (D*H), of hidden layers
by direction and stack (N*G), of gates by direction and gate in PyTorch's order i, f, g, o (D*4*H).

`scan` is a custom operator, so that `torch.compile` and `torch.export` take it whole instead of unrolling the steps.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PACK_FROM = 2 ** 18, 4      # entries of a matrix and products with it from which on packing pays
STRETCH = 192, 1024         # rows (steps * B) of a stretch, at least: in float32 and float64, and in less

ALONE = 0, 1                # part and parts in gates.py; numba takes 0.1 ms over arguments that are left out

aten = torch.ops.aten

# The activations in place; and what they do to a gradient d on its way back, given their outputs a.
IN_PLACE = {"relu": torch.relu_, "leaky_relu": lambda z: F.leaky_relu_(z, 0.01), "tanh": torch.tanh_, "elu": F.elu_}
GRADIENTS = {"relu": lambda d, a, out: aten.threshold_backward.grad_input(d, a, 0, grad_input=out),
             "leaky_relu": lambda d, a, out: aten.leaky_relu_backward.grad_input(d, a, 0.01, True, grad_input=out),
             "tanh": lambda d, a, out: aten.tanh_backward.grad_input(d, a, grad_input=out),
             "elu": lambda d, a, out: aten.elu_backward.grad_input(d, 1, 1, 1, True, a, grad_input=out)}


def product(weight: Tensor, groups: int, rows: int, calls: int, bias: Tensor | None = None) -> Callable:
    """A function x (rows, groups*K) -> (rows, R) for weight (R, K) in `groups` blocks of rows: block k of x times the
    transpose of block k, plus bias (R). It expects to be called about `calls` times with about so many rows."""
    R, K = weight.shape
    if weight.numel() >= PACK_FROM[0] and calls >= PACK_FROM[1] and _can_pack(weight):
        if groups == 1:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
            return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        # A convolution of 1x1 pixels in groups, over an image of `rows` pixels, is this very product, and it takes
        # packed weights.
        how = [0, 0], [1, 1], [1, 1], groups
        packed = torch.ops.mkldnn._reorder_convolution_weight(
            weight[..., None, None].contiguous(memory_format=torch.channels_last), *how, [1, groups * K, 1, rows])

        def convolve(x):
            image = x.view(1, 1, -1, groups * K).permute(0, 3, 1, 2)
            y = torch.ops.mkldnn._convolution_pointwise(image, packed, bias, *how, "none", [], "")
            return y.permute(0, 2, 3, 1).reshape(-1, R)
        return convolve
    if groups == 1:
        return lambda x: F.linear(x, weight, bias)
    blocks = weight.view(groups, -1, K).mT.contiguous()            # (groups, K, R/groups)

    def multiply(x):
        y = torch.bmm(x.view(-1, groups, K).transpose(0, 1), blocks).transpose(0, 1).reshape(-1, R)
        return y if bias is None else y + bias
    return multiply


def has_bfloat16() -> bool:
    """Whether this CPU can multiply in bfloat16: it takes an instruction set that older ones lack, and on these PyTorch
    is slow in it and has no LSTM."""
    return hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported") and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _can_pack(weight: Tensor) -> bool:
    """Whether this build and this CPU have packed products for the weight; they are not PyTorch's public ones."""
    ops = "_reorder_linear_weight", "_linear_pointwise", "_reorder_convolution_weight", "_convolution_pointwise"
    return (weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
            and all(hasattr(torch.ops.mkldnn, op) for op in ops)
            and (weight.dtype == torch.float32 or weight.dtype == torch.bfloat16 and has_bfloat16()))


def back(weight: Tensor, groups: int, rows: int, calls: int) -> Callable:
    """The way back of `product`: d (rows, R) -> (rows, groups*K), block by block times the block itself."""
    R, K = weight.shape
    return product(weight.view(groups, R // groups, K).mT.reshape(groups * K, R // groups), groups, rows, calls)


def add_outer(total: Tensor, d: Tensor, a: Tensor, groups: int) -> None:
    """Adds to total (R, K) the gradient of `product`'s weight: d (T, B, R) by a (T, B, groups*K), over T and B."""
    for out, rows, columns in zip(total.chunk(groups), *(s.flatten(0, 1).chunk(groups, 1) for s in (d, a.to(d.dtype)))):
        if out.dtype == d.dtype:
            out.addmm_(rows.mT, columns)
        else:
            out += rows.mT @ columns


@torch.library.custom_op("hlstm::scan", mutates_args=())
def scan(x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor], biases: list[Tensor], noise: list[Tensor],
         stacks: int, activation: str, low: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All steps of an H-LSTM layer.

    x (T, B, D*I). h, c (B, D*H). weights: of x (N*G, I), of h (N*G, H), of the layers behind the first hidden one
    (N*G, G), the last of them (D*4H, G). biases: (N*G) of the hidden layers, (D*4H) of the gates; may be empty.
    noise: a dropout factor (T, B, N*G) for each hidden layer, or empty. stacks = N.
    low: the type of products and hidden layers, such as bfloat16 under autocast. States, gates and element-wise work
    keep the type of c, since it sums over many steps.
    Returns h and c of all steps, (T, B, D*H), and for the way back the gates (T, B, D*4H) and the hidden layers before
    dropout (layers, T, B, N*G).
    """
    (T, B, _), H = x.shape, weights[1].shape[1]
    D = h.shape[1] // H
    results = _results(x, h, c, weights, biases, noise, stacks, activation, low)
    hs, cs, gates, hidden = results[0].unbind(0), *_by_step(*results[1:], B, D, H)
    ih, hh, *behind = (w.to(low) for w in weights)
    first, *others = (b.to(low) for b in biases) if biases else [None] * len(weights)
    steps = _stretch(T, B, low)
    project = product(ih, D, steps * B, T // steps, first)
    if compiled := _compiled(c, low, (hh, *behind), (D, stacks), noise):
        packed = [compiled.products.pack(w) for w in (hh, behind[0])]
        bias = others[0].float() if biases else c.new_empty(0)
        fields = [s.view(T, -1, *shape).numpy() for s, shape in zip(results[2::-1], ((4, H), (H,), (H,)))]
        for t in range(0, T, steps):
            projected = project(x[t:t + steps].to(low).flatten(0, 1)).view(-1, B, len(ih))
            compiled.forward(t, _numpy(projected), h.reshape(-1, H).numpy(), c.reshape(-1, H).numpy(), *packed,
                             bias.numpy(), stacks, compiled.gates.ACTIVATIONS.index(activation), _numpy(results[3][0]),
                             *fields)
        return results
    recur = product(hh, D, B, T)
    layers = [product(w, stacks, B, T, bias) for w, bias in zip(behind, others)]
    fused = _fused(c, low)
    if fused:
        start, together, states, outputs = (s.numpy() for s in (
            c.reshape(-1, H), results[2].view(T, -1, 4, H), results[1].view(T, -1, H), results[0].view(T, -1, H)))
    c = c.view(B, D, H)
    for t, now in enumerate(gates):
        if t % steps == 0:
            projected = project(x[t:t + steps].to(low).flatten(0, 1)).view(-1, B, len(ih)).unbind(0)
        z = recur(h.to(low)), projected[t % steps]
        if fused and low == torch.bfloat16:                        # of float32, PyTorch's own tanh is quicker
            fused.hidden(*map(_numpy, (*z, hidden[0][t])), fused.ACTIVATIONS.index(activation), *ALONE)
        else:
            IN_PLACE[activation](torch.add(*z, out=hidden[0][t]))
        for j, layer in enumerate(layers):
            a = IN_PLACE[activation](hidden[j][t].copy_(z)) if j else hidden[0][t]
            z = layer(a * noise[j][t] if noise else a)
        if fused:
            fused.forward(_numpy(z.view(-1, 4, H)), t, start, together, states, outputs, *ALONE)
        else:
            _forward(z.view(B, D, 4, H).to(c.dtype), c, now, cs[t], hs[t].view(B, D, H))
        c, h = cs[t], hs[t]
    return results


def _forward(z: Tensor, c: Tensor, gates: Tensor, c_after: Tensor, h: Tensor) -> None:
    """The gates of a step: z (B, D, 4, H) and c before (B, D, H) -> gates (B, D, 4, H), c and h after (B, D, H)."""
    i, f, g, o = gates.unbind(2)
    torch.sigmoid(z, out=gates)
    torch.tanh(z[:, :, 2], out=g)
    torch.mul(f, c, out=c_after).addcmul_(i, g)
    torch.mul(o, c_after.tanh(), out=h)


def _backward(dh: Tensor, dc: Tensor, gates: Tensor, c: Tensor, before: Tensor, d: Tensor) -> None:
    """The way back of `_forward`, from c after and before: dh and dc (B, D, H) -> d (B, D, 4, H), that of z; dc becomes
    that of c before."""
    i, f, g, o = gates.unbind(2)
    values, tanh_c = torch.empty_like(gates), c.tanh()             # gradients behind the gates' activations
    di, df, dg, do = values.unbind(2)
    dc += aten.tanh_backward(dh * o, tanh_c)
    torch.mul(dc, g, out=di)
    torch.mul(dc, before, out=df)
    torch.mul(dc, i, out=dg)
    torch.mul(dh, tanh_c, out=do)
    dc *= f
    aten.sigmoid_backward.grad_input(values, gates, grad_input=d)
    aten.tanh_backward.grad_input(dg, g, grad_input=d[:, :, 2])


def _fused(c: Tensor, low: torch.dtype):
    """The compiled element-wise work (gates.py), where it can be had: float32 states on a CPU, and numba."""
    if c.dtype != torch.float32 or c.device.type != "cpu" or low not in (torch.float32, torch.bfloat16):
        return None
    try:
        from . import gates
    except ImportError:
        return None
    return gates


def _compiled(c: Tensor, low: torch.dtype, weights: tuple[Tensor, ...], groups: tuple[int, ...], noise: list[Tensor]):
    """All steps in one call (steps.py), where the CPU can: gates of one hidden layer, without dropout."""
    if len(weights) != 2 or noise or not _fused(c, low):
        return None
    from . import steps
    if low == torch.float32 and steps.team.size() == 1 < torch.get_num_threads():          # the matrix library has more
        return None
    return steps if steps.products.available(low) and steps.products.fits(weights, groups) else None


def _numpy(s: Tensor):
    """s as an array; bfloat16, which NumPy does not know, as its bits."""
    return (s.view(torch.uint16) if s.dtype == torch.bfloat16 else s).numpy()


@scan.register_fake
def _results(x, h, c, weights, biases, noise, stacks, activation, low):
    """Room for what `scan` returns."""
    T, B, _ = x.shape
    hs, cs, gates = (h.new_empty(T, B, width) for width in (h.shape[1], h.shape[1], 4 * h.shape[1]))
    return hs, cs, gates, x.new_empty(len(weights) - 2, T, B, len(weights[0]), dtype=low)


def _stretch(T: int, B: int, low: torch.dtype) -> int:
    """Steps in a stretch."""
    return min(T, -(-STRETCH[low.itemsize < 4] // B))


def _by_step(cs, gates, hidden, B, D, H):
    """Lists of what belongs to a step: c (B, D, H), gates (B, D, 4, H), and by layer the hidden layers (B, N*G)."""
    return cs.view(-1, B, D, H).unbind(0), gates.view(-1, B, D, 4, H).unbind(0), [a.unbind(0) for a in hidden]


@torch.library.custom_op("hlstm::scan_backward", mutates_args=())
def scan_backward(dhs: Tensor | None, dcs: Tensor | None, x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor],
                  biases: list[Tensor], with_dx: bool, hs: Tensor, cs: Tensor, gates: Tensor, hidden: Tensor,
                  noise: list[Tensor], stacks: int, activation: str
                  ) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """From the gradients of h and c of all steps, or None for none, to those of x (empty if not asked for), of the
    first h and c, of the weights and of the biases."""
    (T, B, _), H, low = x.shape, weights[1].shape[1], hidden.dtype
    D = h.shape[1] // H
    ih, hh, *behind = (w.to(low) for w in weights)
    compiled, steps = _compiled(c, low, (hh, *behind), (D, stacks), noise), _stretch(T, B, low)
    if compiled:
        packed = [compiled.products.pack_back(w, n) for w, n in ((hh, D), (behind[0], stacks))]
    else:
        recur, layers = back(hh, D, B, T), [back(w, stacks, B, T) for w in behind]
    unproject = back(ih, D, steps * B, 1)                          # not packed: it would not fit in the memory saved
    results = dx, dh, dc, dweights, dbiases = _totals(dhs, dcs, x, h, c, weights, biases, with_dx)
    ds = [hidden.new_empty(steps, B, len(w)) for w in weights[1:]]          # of a stretch: hidden layers, and gates
    dhidden, dgates = [d.unbind(0) for d in ds[:-1]], ds[-1].view(steps, B, D, 4, H).unbind(0)
    dh, dc = dh.view(B, D, H), dc.view(B, D, H)
    c_at, gates_at, hidden_at = _by_step(cs, gates, hidden, B, D, H)
    fused = _fused(c, low)
    if fused:
        running = [s.view(-1, H).numpy() for s in (dh, dc)]
        first, together, states = (s.numpy() for s in (c.reshape(-1, H), gates.view(T, -1, 4, H), cs.view(T, -1, H)))
    for start in reversed(range(0, T, steps)):
        span = range(start, min(T, start + steps))
        if compiled:
            given = (c.new_empty(0, B * D, H) if s is None else s[start:span.stop].contiguous().view(-1, B * D, H)
                     for s in (dhs, dcs))
            compiled.backward(start, *(s.numpy() for s in given), *running, first, *packed, stacks,
                              compiled.gates.ACTIVATIONS.index(activation), _numpy(hidden[0]), together, states,
                              *(_numpy(d[:len(span)]) for d in ds))
        for t in reversed(() if compiled else span):
            if dhs is not None:
                dh += dhs[t].view(B, D, H)
            if dcs is not None:
                dc += dcs[t].view(B, D, H)
            d = dgates[t - start]
            if fused:
                fused.backward(*running, t, first, together, states, _numpy(d.view(-1, 4, H)), *ALONE)
            else:
                _backward(dh, dc, gates_at[t], c_at[t], c_at[t - 1] if t else c.view(B, D, H), d)
            d = d.view(B, -1)
            for j in reversed(range(len(layers))):
                d = layers[j](d)
                d = GRADIENTS[activation](d * noise[j][t] if noise else d, hidden_at[j][t], dhidden[j][t - start])
            dh.copy_(recur(d).view(B, D, H))
        here, done = slice(start, span.stop), [d[:len(span)] for d in ds]
        add_outer(dweights[0], done[0], x[here], D)
        add_outer(dweights[1], done[0], hs[start - 1:span[-1]] if start else torch.cat([h[None], hs[:span[-1]]]), D)
        for j, a in enumerate(hidden[:, here]):
            add_outer(dweights[j + 2], done[j + 1], a * noise[j][here] if noise else a, stacks)
        for total, d in zip(dbiases, done):
            total += d.sum((0, 1))
        if with_dx:
            dx[here] = unproject(done[0].flatten(0, 1)).view(len(span), B, -1)
    return results


@scan_backward.register_fake
def _totals(dhs, dcs, x, h, c, weights, biases, with_dx, *rest):
    """Room for what `scan_backward` returns, zero where it sums up."""
    h, c, *sums = (torch.zeros_like(s) for s in (h, c, *weights, *biases))
    return torch.empty_like(x if with_dx else x[:0]), h, c, sums[:len(weights)], sums[len(weights):]


def _keep(ctx, inputs, output):
    x, h, c, weights, biases, noise, ctx.stacks, ctx.activation, _ = inputs
    ctx.counts = 3, len(weights), len(biases), len(noise)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, h, c, *weights, *biases, *noise, *output)


def _gradients(ctx, dhs, dcs, *_):
    kept = iter(ctx.saved_tensors)
    (x, h, c), weights, biases, noise = ([next(kept) for _ in range(n)] for n in ctx.counts)
    with_dx = ctx.needs_input_grad[0]
    dx, dh, dc, dweights, dbiases = scan_backward(dhs, dcs, x, h, c, weights, biases, with_dx, *kept, noise, ctx.stacks,
                                                  ctx.activation)
    return dx if with_dx else None, dh, dc, dweights, dbiases, [None] * len(noise), None, None, None


scan.register_autograd(_gradients, setup_context=_keep)


# Sequences of unequal lengths -----------------------------------------------------------------------------------------

def flip(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Reverses x (T, B, ...) in time, each sequence within its own length; padding stays where it is."""
    if lengths is None:
        return x.flip(0)
    t = torch.arange(len(x), device=x.device)[:, None]
    index = torch.where(t < lengths, lengths - 1 - t, t)           # (T, B)
    return x.gather(0, index.view(*index.shape, *[1] * (x.dim() - 2)).expand_as(x))


def alive(x: Tensor, lengths: Tensor) -> Tensor:
    """x (T, B, ...) -> (T, B, 1), True within each sequence."""
    return (torch.arange(len(x), device=x.device)[:, None] < lengths)[..., None]


def at_end(s: Tensor, lengths: Tensor | None) -> Tensor:
    """s (T, B, H) -> (B, H) at each sequence's last step."""
    return s[-1] if lengths is None else s[lengths - 1, torch.arange(s.shape[1], device=s.device)]
