"""The recurrence of an H-LSTM layer over a whole sequence, forward and backward, made for speed.

It computes what `unroll` in lstm.py says, for one direction or for both at once. What makes it fast:
- All gates and directions of a step are one product with a block-diagonal matrix (`product`), whose weights the matrix
  library packs once for all steps, not anew at each (library.py).
- What waits for no other step is done for a stretch of steps at once: the projections of x, the gradients of weights
  and x.
- The element-wise work of the gates is one compiled call (gates.py), or a dozen of PyTorch's where numba is missing.
- On a CPU with the instructions for it, even all steps of a stretch are one compiled call (steps.py, products.py), and
  the products of a whole stretch are ours where the library's are slower (large.py).
- Little memory is touched, since fresh memory costs more time than element-wise work: kept for the way back are h,
  gates and hidden layers, from which c and slopes follow; the rest of a stretch lies where that of the last one lay.

Sizes: T steps, B batch, I input, H hidden, G gate width, D directions, N = D*S stacks of hidden layers (S = 4: one for
each gate, S = 1: shared). Everything lies as (T, B, channels): channels of h and c by direction (D*H), of hidden layers
by direction and stack (N*G), of gates by direction and gate in PyTorch's order i, f, g, o (D*4*H).

`scan` is a custom operator, so that `torch.compile` and `torch.export` take it whole instead of unrolling the steps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import AtOnce, as_array, back, product

STRETCH = 256, 1024         # rows (steps * B) of a stretch, at least: in float32 and float64, and in less

ALONE = 0, 1                # part and parts in gates.py; numba takes 0.1 ms over arguments that are left out

aten = torch.ops.aten

# The activations in place; and what they do to a gradient d on its way back, given their outputs a.
IN_PLACE = {"relu": torch.relu_, "leaky_relu": lambda z: F.leaky_relu_(z, 0.01), "tanh": torch.tanh_, "elu": F.elu_}
GRADIENTS = {"relu": lambda d, a, out: aten.threshold_backward.grad_input(d, a, 0, grad_input=out),
             "leaky_relu": lambda d, a, out: aten.leaky_relu_backward.grad_input(d, a, 0.01, True, grad_input=out),
             "tanh": lambda d, a, out: aten.tanh_backward.grad_input(d, a, grad_input=out),
             "elu": lambda d, a, out: aten.elu_backward.grad_input(d, 1, 1, 1, True, a, grad_input=out)}


@torch.library.custom_op("hlstm::scan", mutates_args=())
def scan(x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor], biases: list[Tensor], noise: list[Tensor],
         stacks: int, activation: str, low: torch.dtype, ends: Tensor | None
         ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All steps of an H-LSTM layer, or of an LSTM's.

    x (T, B, D*I). h, c (B, D*H). weights: of x (N*G, I), of h (N*G, H), of the layers behind the first hidden one
    (N*G, G), the last of them (D*4H, G); an LSTM's: (D*4H, I) and (D*4H, H) alone. biases: (N*G) of the hidden layers,
    (D*4H) of the gates; may be empty.
    noise: a dropout factor (T, B, N*G) for each hidden layer, or empty. stacks = N.
    low: the type of products and hidden layers, such as bfloat16 under autocast. States, gates and element-wise work
    keep the type of c, since it sums over many steps.
    ends: the last step of each sequence (B); None: that of all, T - 1.
    Returns h of all steps (T, B, D*H), c at the ends (B, D*H), and for the way back c before each stretch and behind
    the last (stretches + 1, B, D*H; so never of size 1, which `torch.export` would hold fast), the gates (T, B, D*4H)
    and the hidden layers before dropout (layers, T, B, N*G).
    """
    (T, B, _), H = x.shape, weights[1].shape[1]
    D = h.shape[1] // H
    results = hs, cn, starts, gates, hidden = _results(x, h, c, weights, biases, noise, stacks, activation, low, ends)
    ih, hh, *behind = (w.to(low) for w in weights)
    first, *others = (b.to(low) for b in biases) if biases else [None] * len(weights)
    steps = _stretch(T, B, low)
    fused, compiled = _fused(c, low), _compiled(c, low, (hh, *behind), (D, stacks))
    if large := _large(c, low, weights, (D, D, *[stacks] * len(behind))):
        project = large.product(ih, D, first)
    else:
        project = product(ih, D, steps * B, T // steps, first)
    if compiled:
        packed = [compiled.products.pack(w) for w in (hh, behind[0])]
        bias = others[0].float() if biases else c.new_empty(0)
    else:
        recur = product(hh, D, B, T)
        layers = [product(w, stacks, B, T, bias) for w, bias in zip(behind, others)]
    room = c.new_empty(steps, B, D * H)                            # for c of a stretch
    cn.copy_(c)
    for start, before in zip(range(0, T, steps), starts):
        here = slice(start, start + steps)
        projected = project(x[here].to(low).flatten(0, 1)).view(-1, B, len(ih))
        c, cs, hidden_here = before.copy_(c), room[:len(projected)], hidden[:, here]
        if fused:
            fields = _by_row(H, c, gates[here], cs, hs[here])
        if compiled:
            compiled.forward(as_array(projected), h.reshape(-1, H).numpy(), *packed, bias.numpy(),
                             _factors(noise, here, hidden_here), stacks,
                             compiled.gates.ACTIVATIONS.index(activation), as_array(hidden_here[0]), *fields)
            h, c = hs[here][-1], cs[-1]
        for t in () if compiled else range(len(cs)):
            z = recur(h.to(low)), projected[t]
            if not layers:                                         # an LSTM: summed in the type of the gates
                z = z[0].to(c.dtype).add_(z[1])
            elif fused and low == torch.bfloat16:                  # of float32, PyTorch's own tanh is quicker
                fused.hidden(*map(as_array, (*z, a := hidden_here[0, t])), fused.ACTIVATIONS.index(activation), *ALONE)
            else:
                a = IN_PLACE[activation](torch.add(*z, out=hidden_here[0, t]))
            for j, layer in enumerate(layers):
                if j:
                    a = IN_PLACE[activation](hidden_here[j, t].copy_(z))
                z = layer(a * noise[j][start + t] if noise else a)
            if fused:
                fused.forward(as_array(z.view(-1, 4, H)), t, *fields, *ALONE)
            else:
                now = gates[start + t].view(B, D, 4, H)
                _forward(z.view(B, D, 4, H).to(c.dtype), c.view(B, D, H), now, *(s.view(B, D, H) for s in (
                    cs[t], hs[start + t])))
            h, c = hs[start + t], cs[t]
        at, inside = _in_stretch(ends, here, T, cs)
        cn.copy_(torch.where(inside, cs[at], cn))
    starts[-1].copy_(c)
    return results


def _forward(z: Tensor, c: Tensor, gates: Tensor, c_after: Tensor, h: Tensor) -> None:
    """The gates of a step: z (B, D, 4, H) and c before (B, D, H) -> gates (B, D, 4, H), c and h after (B, D, H)."""
    i, f, g, o = gates.unbind(2)
    torch.sigmoid(z, out=gates)
    torch.tanh(z[:, :, 2], out=g)
    torch.mul(f, c, out=c_after).addcmul_(i, g)
    torch.mul(o, c_after.tanh(), out=h)


def _states(start: Tensor, gates: Tensor, cs: Tensor, H: int) -> None:
    """c of a stretch, as `_forward` had it: from c before it (B, D*H) and gates (steps, B, D*4H) -> cs
    (steps, B, D*H)."""
    for now, before, c in zip(gates, (start, *cs), cs):
        i, f, g, _ = now.view(len(c), -1, 4, H).unbind(2)
        torch.mul(f, before.view(i.shape), out=c.view(i.shape)).addcmul_(i, g)


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


def _compiled(c: Tensor, low: torch.dtype, weights: tuple[Tensor, ...], groups: tuple[int, ...]):
    """All steps in one call (steps.py), where the CPU can: gates of one hidden layer."""
    if len(weights) != 2 or not _fused(c, low):
        return None
    from . import steps
    if low == torch.float32 and steps.team.size() == 1 < torch.get_num_threads():          # the library has more
        return None
    return steps if steps.products.available(low) and steps.products.fits(weights, groups) else None


def _large(c: Tensor, low: torch.dtype, weights: list[Tensor], groups: tuple[int, ...]):
    """Our own products of many rows (large.py), where the CPU can and they are quicker than the library's: of matrices
    (R, K) in blocks of rows."""
    if not _fused(c, low):
        return None
    from . import large
    fits = all(len(w) % (32 * n) == 0 for w, n in zip(weights, groups))
    fewer = large.team.size() < torch.get_num_threads()            # than the matrix library's threads
    return large if fits and not fewer and large.products.available(low) and large.WORTH_IT[low] else None


def _by_row(H: int, start: Tensor, gates: Tensor, *states: Tensor) -> list:
    """A stretch as gates.py takes it, each direction of a sequence as a row of its own: c before it (B, D*H), its gates
    (steps, B, D*4H) and states (steps, B, D*H) as (R, H), (steps, R, 4, H) and (steps, R, H)."""
    return [start.view(-1, H).numpy(), gates.view(len(gates), -1, 4, H).numpy(),
            *(s.view(len(s), -1, H).numpy() for s in states)]


def _factors(noise: list[Tensor], here: slice, hidden: Tensor):
    """Dropout factors of the one hidden layer (layers, steps, B, N) in a stretch, as steps.py takes them: (steps, B,
    N), (1, B, N) where a sequence keeps its own, (0, B, N) without dropout."""
    if not noise:
        return as_array(hidden[0, :0])
    own = noise[0][:1] if noise[0].stride(0) == 0 else noise[0][here]
    return as_array(own.to(hidden.dtype).contiguous())


@scan.register_fake
def _results(x, h, c, weights, biases, noise, stacks, activation, low, ends):
    """Room for what `scan` returns."""
    (T, B, _), width = x.shape, h.shape[1]
    sizes = (T, B, width), (B, width), (-(-T // _stretch(T, B, low)) + 1, B, width), (T, B, 4 * width)
    return *map(h.new_empty, sizes), x.new_empty(len(weights) - 2, T, B, len(weights[0]), dtype=low)


def _stretch(T: int, B: int, low: torch.dtype) -> int:
    """Steps in a stretch, as even as can be; the last one may have fewer."""
    stretches = torch.sym_max(1, T * B // STRETCH[low.itemsize < 4])
    return torch.sym_max(1, -(-T // stretches))


def _in_stretch(ends: Tensor | None, here: slice, T: int, cs: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Where in a stretch, of whose c there is cs (steps, B, D*H), each sequence ends: an index of cs, which means
    nothing for those that end elsewhere, and (B, 1) whether they end in it."""
    batch = torch.arange(cs.shape[1], device=cs.device)
    at = (torch.full_like(batch, T - 1) if ends is None else ends) - here.start
    return (at.clamp(0, len(cs) - 1), batch), ((at >= 0) & (at < len(cs)))[:, None]


@torch.library.custom_op("hlstm::scan_backward", mutates_args=())
def scan_backward(dhs: Tensor | None, dcn: Tensor | None, x: Tensor, h: Tensor, weights: list[Tensor],
                  biases: list[Tensor], with_dx: bool, noise: list[Tensor], stacks: int, activation: str,
                  hs: Tensor, starts: Tensor, gates: Tensor, hidden: Tensor, ends: Tensor | None
                  ) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """From the gradients of h of all steps and of c at the ends, or None for none, to those of x (empty if not asked
    for), of the first h and c, of the weights and of the biases."""
    (T, B, _), H, low = x.shape, weights[1].shape[1], hidden.dtype
    D, steps = h.shape[1] // H, _stretch(T, B, low)
    ih, hh, *behind = (w.to(low) for w in weights)
    fused, compiled = _fused(starts, low), _compiled(starts, low, (hh, *behind), (D, stacks))
    if compiled:
        packed = [compiled.products.prepared_back(w, n, B, T) for w, n in ((hh, D), (behind[0], stacks))]
    else:
        recur, layers = back(hh, D, B, T), [back(w, stacks, B, T) for w in behind]
    large = _large(starts, low, weights, (D, D, *[stacks] * len(behind)))
    sums = large.Later() if large else AtOnce()
    unproject = sums.back(ih, D)
    results = dx, dh, dc, dweights, dbiases = _totals(dhs, dcn, x, h, weights, biases, with_dx)
    room = starts.new_empty(steps, B, D * H)                       # for c of a stretch
    ds = [hidden.new_empty(steps, B, len(w)) for w in weights[1:]]          # and gradients: of hidden layers, and gates
    dh, dc = dh.view(B, D, H), dc.view(B, D, H)
    running = [s.view(-1, H).numpy() for s in (dh, dc)] if fused else ()
    for k, c in reversed(list(enumerate(starts[:-1]))):
        here = slice(k * steps, min(T, (k + 1) * steps))
        n, together, hidden_here = here.stop - here.start, gates[here], hidden[:, here]
        cs, done = room[:n], [d[:n] for d in ds]
        dhs_here, dcs = None if dhs is None else dhs[here], None
        if dcn is not None:
            at, inside = _in_stretch(ends, here, T, cs)
            dcs = torch.zeros_like(cs)
            dcs[at] = torch.where(inside, dcn, 0)
        if fused:
            fields = _by_row(H, c, together, cs)
        if compiled:
            given = (cs[:0] if s is None else s.contiguous() for s in (dhs_here, dcs))
            compiled.backward(*(s.view(len(s), B * D, H).numpy() for s in given), *running, *packed,
                              _factors(noise, here, hidden_here), stacks,
                              compiled.gates.ACTIVATIONS.index(activation), as_array(hidden_here[0]), *fields,
                              *map(as_array, done))
        elif fused:
            fused.states(*fields, *ALONE)
        else:
            _states(c, together, cs, H)
        for t in () if compiled else reversed(range(n)):
            for total, more in (dh, dhs_here), (dc, dcs):
                if more is not None:
                    total += more[t].view(B, D, H)
            d = done[-1][t]
            if fused:
                fused.backward(*running, t, *fields, as_array(d.view(-1, 4, H)), *ALONE)
            else:
                _backward(dh, dc, together[t].view(B, D, 4, H), *(s.view(B, D, H) for s in (
                    cs[t], cs[t - 1] if t else c)), d.view(B, D, 4, H))
            for j in reversed(range(len(layers))):
                d = layers[j](d)
                d = GRADIENTS[activation](d * noise[j][here.start + t] if noise else d, hidden_here[j, t], done[j][t])
            dh.copy_(recur(d).view(B, D, H))
        before = hs[here.start - 1:here.stop - 1] if k else torch.cat([h[None], hs[:n - 1]])
        more = here.stop < T                                       # than the first that is summed up
        sums.add_outer(dweights[0], done[0], x[here], D, more)
        sums.add_outer(dweights[1], done[0], before, D, more)
        for j, a in enumerate(hidden_here):
            sums.add_outer(dweights[j + 2], done[j + 1], a * noise[j][here] if noise else a, stacks, more)
        for total, d in zip(dbiases, done):
            sums.add_rows(total, d)
        if with_dx:
            unproject(done[0], dx[here])
        sums.now()
    return results


@scan_backward.register_fake
def _totals(dhs, dcn, x, h, weights, biases, with_dx, *rest):
    """Room for what `scan_backward` returns, zero where it sums up, but for weights; row by row, however those lie."""
    h, c, *db = (torch.zeros_like(s) for s in (h, h, *biases))
    return torch.empty_like(x if with_dx else x[:0]), h, c, [w.new_empty(w.shape) for w in weights], db


def _keep(ctx, inputs, output):
    x, h, _, weights, biases, noise, ctx.stacks, ctx.activation, _, ends = inputs
    hs, _, *kept = output
    ctx.counts = 2, len(weights), len(biases), len(noise)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, h, *weights, *biases, *noise, hs, *kept, ends)


def _gradients(ctx, dhs, dcn, *_):
    kept = iter(ctx.saved_tensors)
    (x, h), weights, biases, noise = ([next(kept) for _ in range(n)] for n in ctx.counts)
    with_dx = ctx.needs_input_grad[0]
    dx, dh, dc, dweights, dbiases = scan_backward(dhs, dcn, x, h, weights, biases, with_dx, noise, ctx.stacks,
                                                  ctx.activation, *kept)
    return dx if with_dx else None, dh, dc, dweights, dbiases, [None] * len(noise), None, None, None, None


scan.register_autograd(_gradients, setup_context=_keep)
