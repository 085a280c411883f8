"""The recurrence of an H-LSTM layer over a whole sequence, forward and backward, made for speed.

It computes what `unroll` in lstm.py says, for both directions at once. What makes it fast:
- All gates and directions of a step are one product with a block-diagonal matrix (`product`), whose weights the matrix
  library packs once for all steps, not anew at each.
- The way back makes one product a step for each matrix; each weight gradient is one large product over all steps.
- Kept for the way back: states, gates and hidden layers. Slopes are computed from these values.

Sizes: T steps, B batch, I input, H hidden, G gate width, D directions, N = D*S stacks of hidden layers (S = 4: one for
each gate, S = 1: shared). Everything lies as (T, B, channels): channels of h and c by direction (D*H), of hidden layers
by direction and stack (N*G), of gates by direction and gate in PyTorch's order i, f, g, o (D*4*H).

`scan` is a custom operator, so that `torch.compile` and `torch.export` take it whole instead of unrolling the steps.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PACK_FROM = 2 ** 18, 8      # entries of a matrix and products with it from which on packing pays

aten = torch.ops.aten

# The activations in place; and what they do to a gradient d on its way back, given their outputs a.
IN_PLACE = {"relu": torch.relu_, "leaky_relu": lambda z: F.leaky_relu_(z, 0.01), "tanh": torch.tanh_, "elu": F.elu_}
GRADIENTS = {"relu": lambda d, a, out: aten.threshold_backward.grad_input(d, a, 0, grad_input=out),
             "leaky_relu": lambda d, a, out: aten.leaky_relu_backward.grad_input(d, a, 0.01, True, grad_input=out),
             "tanh": lambda d, a, out: aten.tanh_backward.grad_input(d, a, grad_input=out),
             "elu": lambda d, a, out: aten.elu_backward.grad_input(d, 1, 1, 1, True, a, grad_input=out)}


def product(weight: Tensor, groups: int, rows: int, calls: int, bias: Tensor | None = None) -> Callable:
    """A function x (rows, groups*K) -> (rows, R) for weight (R, K) in `groups` blocks of rows: block k of x times the
    transpose of block k, plus bias (R). It expects to be called about `calls` times."""
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
            image = x.view(1, 1, rows, groups * K).permute(0, 3, 1, 2)
            y = torch.ops.mkldnn._convolution_pointwise(image, packed, bias, *how, "none", [], "")
            return y.permute(0, 2, 3, 1).reshape(rows, R)
        return convolve
    if groups == 1:
        return lambda x: F.linear(x, weight, bias)
    blocks = weight.view(groups, -1, K).mT.contiguous()            # (groups, K, R/groups)

    def multiply(x):
        y = torch.bmm(x.view(rows, groups, K).transpose(0, 1), blocks).transpose(0, 1).reshape(rows, R)
        return y if bias is None else y + bias
    return multiply


def _can_pack(weight: Tensor) -> bool:
    """Whether this build and this CPU have packed products for the weight; the operators are not PyTorch's public ones,
    and bfloat16 takes an instruction set that older CPUs lack."""
    ops = ("_reorder_linear_weight", "_linear_pointwise", "_reorder_convolution_weight", "_convolution_pointwise",
           "_is_mkldnn_bf16_supported")
    return (weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
            and all(hasattr(torch.ops.mkldnn, op) for op in ops)
            and (weight.dtype == torch.float32
                 or weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def back(weight: Tensor, groups: int, rows: int, calls: int) -> Callable:
    """The way back of `product`: d (rows, R) -> (rows, groups*K), block by block times the block itself."""
    R, K = weight.shape
    return product(weight.view(groups, R // groups, K).mT.reshape(groups * K, R // groups), groups, rows, calls)


def outer(d: Tensor, a: Tensor, groups: int) -> Tensor:
    """d (T, B, R), a (T, B, groups*K) -> (R, K): the gradient of `product`'s weight, summed over steps and batch."""
    blocks = zip(d.flatten(0, 1).chunk(groups, 1), a.flatten(0, 1).chunk(groups, 1))
    return torch.cat([rows.mT @ columns for rows, columns in blocks])


@torch.library.custom_op("hlstm::scan", mutates_args=())
def scan(inputs: Tensor, h: Tensor, c: Tensor, hh: Tensor, weights: list[Tensor], biases: list[Tensor],
         noise: list[Tensor], stacks: int, activation: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The steps of an H-LSTM layer from the projections of its input on.

    inputs (T, B, N*G): projections of x, bias included. h, c (B, D*H). hh (N*G, H): recurrent weights. weights, biases:
    of the layers behind the first hidden one, (N*G, G) and (N*G), the last (D*4H, G) and (D*4H); biases may be empty.
    noise: a dropout factor (T, B, N*G) for each hidden layer, or empty. stacks = N.
    Returns h and c of all steps, (T, B, D*H), and for the way back the gates (T, B, D*4H) and the hidden layers before
    dropout (layers, T, B, N*G). Under bfloat16 autocast the products and hidden layers are in bfloat16; states, gates
    and element-wise work stay in float32, since c sums over many steps.
    """
    (T, B, _), H, low = inputs.shape, hh.shape[1], inputs.dtype
    D = h.shape[1] // H
    results = _results(inputs, h, c, hh, weights)
    hs, cs, gates, hidden = results[0].unbind(0), *_by_step(*results[1:], B, D, H)
    recur = product(hh, D, B, T)
    layers = [product(w, stacks, B, T, bias) for w, bias in zip(weights, biases or [None] * len(weights))]
    c = c.view(B, D, H)
    for t, (x, now) in enumerate(zip(inputs.unbind(0), gates)):
        z = torch.add(recur(h.to(low)), x, out=hidden[0][t])
        for j, layer in enumerate(layers):
            a = IN_PLACE[activation](z if j == 0 else hidden[j][t].copy_(z))
            z = layer(a * noise[j][t] if noise else a)
        z = z.view(B, D, 4, H).to(c.dtype)
        i, f, g, o = now.unbind(2)
        torch.sigmoid(z, out=now)
        torch.tanh(z[:, :, 2], out=g)
        c = torch.mul(f, c, out=cs[t]).addcmul_(i, g)
        h = hs[t]
        torch.mul(o, c.tanh(), out=h.view(B, D, H))
    return results


@scan.register_fake
def _results(inputs, h, c, hh, weights, *rest):
    """Room for what `scan` returns."""
    T, B, width = inputs.shape
    states = h.new_empty(T, B, h.shape[1]), h.new_empty(T, B, h.shape[1])
    return *states, h.new_empty(T, B, 4 * h.shape[1]), inputs.new_empty(len(weights), T, B, width)


def _by_step(cs, gates, hidden, B, D, H):
    """Lists of what belongs to a step: c (B, D, H), gates (B, D, 4, H), and by layer the hidden layers (B, N*G)."""
    return cs.view(-1, B, D, H).unbind(0), gates.view(-1, B, D, 4, H).unbind(0), [a.unbind(0) for a in hidden]


@torch.library.custom_op("hlstm::scan_backward", mutates_args=())
def scan_backward(dhs: Tensor | None, dcs: Tensor | None, c: Tensor, cs: Tensor, gates: Tensor, hidden: Tensor,
                  hh: Tensor, weights: list[Tensor], noise: list[Tensor], stacks: int, activation: str
                  ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the gradients of h and c of all steps, or None for none, to those of what stands before each activation,
    hidden layers (layers, T, B, N*G) and gates (T, B, D*4H), and of the first h and c (B, D*H)."""
    (T, B, _), H, low = gates.shape, hh.shape[1], hidden.dtype
    D = c.shape[1] // H
    results = torch.empty_like(gates), torch.empty_like(hidden)
    recur, layers = back(hh, D, B, T), [back(w, stacks, B, T) for w in weights]
    dh, dc, before = c.new_zeros(B, D, H), c.new_zeros(B, D, H), c.view(B, D, H)
    cs, gates, hidden = _by_step(cs, gates, hidden, B, D, H)
    _, dgates, dhidden = _by_step(c, *results, B, D, H)
    for t in reversed(range(T)):
        if dhs is not None:
            dh += dhs[t].view(B, D, H)
        if dcs is not None:
            dc += dcs[t].view(B, D, H)
        i, f, g, o = gates[t].unbind(2)
        tanh_c = cs[t].tanh()
        dc.addcmul_(dh * o, 1 - tanh_c * tanh_c)
        d = torch.addcmul(gates[t], gates[t], gates[t], value=-1, out=dgates[t])     # the sigmoids' slopes
        di, df, dg, do = d.unbind(2)
        di *= g
        df *= cs[t - 1] if t else before
        torch.addcmul(i, i * g, g, value=-1, out=dg)               # i (1 - g^2)
        do *= tanh_c.mul_(dh)
        d[:, :, :3] *= dc.unsqueeze(2)
        dc *= f
        d = d.view(B, -1).to(low)
        for j in reversed(range(len(layers))):
            d = layers[j](d)
            d = GRADIENTS[activation](d * noise[j][t] if noise else d, hidden[j][t], dhidden[j][t])
        dh = recur(d).view(B, D, H).to(c.dtype)
    return results[1], results[0].to(low), dh.view(B, -1), dc.view(B, -1)


@scan_backward.register_fake
def _(dhs, dcs, c, cs, gates, hidden, *rest):
    return torch.empty_like(hidden), hidden.new_empty(gates.shape), torch.empty_like(c), torch.empty_like(c)


def _keep(ctx, inputs, output):
    _, h, c, hh, weights, biases, noise, ctx.stacks, ctx.activation = inputs
    hs, cs, gates, hidden = output
    ctx.depth, ctx.biased = len(weights), bool(biases)
    ctx.mark_non_differentiable(gates, hidden)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, c, hh, *output, *weights, *noise)


def _gradients(ctx, dhs, dcs, *_):
    h, c, hh, hs, cs, gates, hidden, *rest = ctx.saved_tensors
    weights, noise = rest[:ctx.depth], rest[ctx.depth:]
    dhidden, dgates, dh, dc = scan_backward(dhs, dcs, c, cs, gates, hidden, hh, weights, noise, ctx.stacks,
                                            ctx.activation)
    ds = [*dhidden[1:], dgates]                                    # behind each of the weights
    dweights = [outer(d, a * noise[j] if noise else a, ctx.stacks) for j, (d, a) in enumerate(zip(ds, hidden))]
    dbiases = [d.sum((0, 1)) for d in ds] if ctx.biased else []
    dhh = outer(dhidden[0], torch.cat([h[None], hs[:-1]]).to(dhidden.dtype), h.shape[1] // hh.shape[1])
    return dhidden[0], dh, dc, dhh, dweights, dbiases, [None] * len(noise), None, None


scan.register_autograd(_gradients, setup_context=_keep)
