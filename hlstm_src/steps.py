"""All steps of a stretch of an H-LSTM, there and back, as one compiled call.

A step multiplies a few rows by some hundred thousand weights and does little else, twice. Called from Python, either
product takes longer to begin than to do. Here both are the compiled ones of products.py, and between them stands the
element-wise work of gates.py. `scan` uses this where processor and sizes allow it; it says the same, to 1e-7 as
gates.py does. Several threads share the rows of all work, or else the columns of products (`shares`), with the same
bits as one; in the latter case they wait for each other (team.py).

Products take P rows, a multiple of 16; those behind the batch mean nothing.

Sizes: T steps, B batch, R rows (B times directions), H hidden, N units of all hidden layers, M = 4H times directions;
gates in PyTorch's order i, f, g, o. Projections, hidden layers and the gradients that become weight gradients are in
the type of products: float32, or bfloat16 as uint16. States, gates and sums are float32.
"""

from . import gates, products, team  # noqa: F401 (`scan` takes products from here)
from .compiled import compiled
from .gates import share
from .products import begin, end, product, shares, whole
from .team import meet
from .vectors import room


def forward(projected, h, recur, behind, bias, noise, stacks, activation, hidden, c, all_gates, cs, hs):
    """A stretch: the steps for which there is something projected (steps, B, N).

    h, c (R, H): before it. recur, behind: packed matrices of h and of the layer behind the hidden one.
    bias (M) of the gates, or empty. noise: dropout factors of the hidden layer (steps, B, N), or (1, B, N) for all
    steps, or empty. Fills in hidden before dropout (steps, B, N), gates (steps, R, 4, H), cs and hs (steps, R, H).
    """
    (_, B, N), (R, H) = projected.shape, h.shape
    P, D = whole(B), R // B
    low, a = room((P, D * H), hidden.dtype), room((0 if P == B and not len(noise) else P, N), hidden.dtype)
    sums, z = room((P, N)), room((P, 4 * D * H))
    team.together(lambda *parts: _forward(projected, h, recur, behind, bias.reshape(-1, 4, H), noise, stacks,
                                          activation, hidden, c, all_gates, cs, hs, low, a, sums, z, *parts))


@compiled
def _forward(projected, h, recur, behind, bias, noise, stacks, activation, hidden, c, all_gates, cs, hs, low, a, sums,
             z, counter, part, parts):
    """One thread's part. low (P, D*H): h as products take it; sums and a (P, N): before and behind the hidden layer's
    activation, a empty where that goes into the gates as it is; z (P, M): what goes into the gates. bias (D, 4, H)."""
    (steps, B, _), (R, H), P, met = projected.shape, h.shape, len(low), 0
    D = R // B
    low_rows, z_rows = low.reshape(P * D, H), z.reshape(P * D, 4, H)
    rows, column, columns = shares(recur, B, part, parts)
    begin(hidden)
    for t in range(steps):
        gates.rounded(h if t == 0 else hs[t - 1], low_rows, part, parts)
        met = meet(counter, columns, met)
        product(low, recur, D, sums, rows, column, columns)
        met = meet(counter, columns, met)
        gates.hidden(sums, projected[t], hidden[t], activation, part, parts)
        if len(noise):
            gates.dropped(hidden[t], noise[t % len(noise)], a[:B], part, parts)
        else:
            gates.copied(hidden[t], a, part, parts)
        met = meet(counter, columns, met)
        product(a if len(a) else hidden[t], behind, stacks, z, rows, column, columns)
        met = meet(counter, columns, met)
        if len(bias):
            for r in share(R, part, parts):
                z_rows[r] += bias[r % D]
        gates.forward(z_rows[:R], t, c, all_gates, cs, hs, part, parts)
    end(hidden)


def backward(dhs, dcs, dh, dc, recur, behind, noise, stacks, activation, hidden, c, all_gates, cs, dhidden, dgates):
    """The way back of `forward`: from hidden, c before the stretch and gates to dhidden (steps, B, N) and dgates
    (steps, B, M). dhs, dcs: (steps, R, H) or empty. dh, dc (R, H): running; in the end those before the stretch.
    recur, behind: by `prepared_back`. cs is filled in again."""
    (_, B, N), (R, H) = dhidden.shape, dh.shape
    P, D = whole(B), R // B
    d, e, before = (room((0 if P == B else P, n), kind) for n, kind in (
        (4 * D * H, hidden.dtype), (N, hidden.dtype), (D * H, dh.dtype)))
    da = room((P, N))
    team.together(lambda *parts: _backward(dhs, dcs, dh, dc, recur, behind, noise, stacks, activation, hidden, c,
                                           all_gates, cs, dhidden, dgates, d, e, da, before, *parts))


@compiled
def _backward(dhs, dcs, dh, dc, recur, behind, noise, stacks, activation, hidden, c, all_gates, cs, dhidden, dgates, d,
              e, da, before, counter, part, parts):
    """One thread's part. d (P, M): gradients before the gates' activations; da and e (P, N): behind and before the
    hidden layer's; before (P, D*H): of h one step earlier. Of these d, e and before are empty where the batch has whole
    P rows: then each is made where it is to lie in the end."""
    (steps, B, _), (R, H), met = dhidden.shape, dh.shape, 0
    D = R // B
    rows, column, columns = shares(recur, B, part, parts)
    begin(hidden)
    gates.states(c, all_gates, cs, part, parts)
    for t in range(steps - 1, -1, -1):
        if len(dhs):
            gates.added(dhs[t], dh, part, parts)
        if len(dcs):
            gates.added(dcs[t], dc, part, parts)
        into = dgates[t]
        gates.backward(dh, dc, t, c, all_gates, cs, into.reshape(R, 4, H), part, parts)
        gates.copied(into.reshape(R, 4 * H), d.reshape(-1, 4 * H), part, parts)      # rows as they were made
        met = meet(counter, columns, met)
        product(d if len(d) else into, behind, stacks, da, rows, column, columns)
        met = meet(counter, columns, met)
        if len(noise):
            gates.dropped(da, noise[t % len(noise)], da[:B], part, parts)
        below = dhidden[t]
        gates.hidden_backward(da, hidden[t], below, activation, part, parts)
        gates.copied(below, e, part, parts)
        met = meet(counter, columns, met)
        product(e if len(e) else below, recur, D, before if len(before) else dh.reshape(B, D * H), rows, column,
                columns)
        met = meet(counter, columns, met)
        gates.copied(before.reshape(-1, H), dh, part, parts)
    end(hidden)
