"""The element-wise work of a recurrent step, compiled by numba: the gates of all rows in one call, there and back, and
the first hidden layer in another.

A step of an H-LSTM is two or three matrix products and a dozen small operations on some thousand numbers, each of which
takes PyTorch longer to begin than to do. Here they are one function, on rows that stay in the nearest cache. `scan`
uses it for float32 states on the CPU where numba is installed. It says the same as `scan`'s own operations, to 1e-7:
tanh is 1 - 2 / (1 + exp 2x) and elu exp x - 1, which cancel near 0, so of numbers far below 1 that is less than float32
could tell. Loops are short on purpose: LLVM does 16 numbers at once where few arrays meet in one loop.

Sizes: T steps, R rows (batch times directions), H hidden; gates in PyTorch's order i, f, g, o. Several threads can
share the rows: each does those of its `part` of `parts`, `share` says which.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from .compiled import compiled

ONE = np.float32(1)
ACTIVATIONS = "tanh", "relu", "leaky_relu", "elu"


@intrinsic
def bits(typing, value):
    """float32 -> int32 with the same bits, and the other way round."""
    to, of = (types.int32, ir.IntType(32)) if value == types.float32 else (types.float32, ir.FloatType())

    def emit(context, b, signature, args):
        return b.bitcast(args[0], of)
    return to(value), emit


@compiled(inline="always")
def exp(x):
    """exp(x) to 1e-7 of its value for |x| < 87, in operations that LLVM can do for 16 values at once.

    x = n ln 2 + r with |r| <= ln 2 / 2: 2^n by putting n into the exponent's bits, exp(r) by its series.
    """
    x = np.float32(-87) if x < np.float32(-87) else x              # so written, NaN stays NaN
    x = np.float32(87) if x > np.float32(87) else x
    shifted = x * np.float32(1.44269504) + np.float32(12582912)    # 1.5 * 2^23: the low bits are round(x / ln 2)
    n = shifted - np.float32(12582912)
    r = x - n * np.float32(0.693145752) - n * np.float32(1.42860677e-6)          # ln 2 in two parts
    p = np.float32(1 / 5040) * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1)
    p = p * r + np.float32(1)
    return p * bits(np.int32((bits(shifted) << 23) + 1065353216))


def _float32(z):
    """A float32, or the 16 bits of a bfloat16, as float32."""


def _as(value, like):
    """A float32 in the type of an array: float32, or the 16 bits of the nearest bfloat16."""


@overload(_as, inline="always")
def _as_of(value, like):
    if like.dtype == types.uint16:
        def nearest(value, like):                                  # ties go to even
            n = bits(value)
            return np.uint16(np.int32(n + np.int32(32767) + np.int32(np.int32(n >> 16) & 1)) >> 16)
        return nearest
    return lambda value, like: value


@overload(_float32, inline="always")
def _float32_of(z):
    if z == types.uint16:
        return lambda z: bits(np.int32(np.int32(z) << 16))
    return lambda z: z


@compiled(inline="always")
def share(n, part, parts):
    """Of n rows those of a thread's part, which follow each other."""
    return range(n * part // parts, n * (part + 1) // parts)


@compiled
def forward(z, t, start, gates, cs, hs, part, parts):
    """Step t: z (R, 4, H), what goes into the gates' activations -> gates (T, R, 4, H), cs and hs (T, R, H) at t.

    start (R, H): c before the first step. z is float32, or bfloat16 as uint16.
    """
    R, _, H = z.shape
    for r in share(R, part, parts):
        before, c, h, y = start[r] if t == 0 else cs[t - 1, r], cs[t, r], hs[t, r], gates[t, r]
        i, f, g, o = y[0], y[1], y[2], y[3]
        for a in range(4):
            for k in range(H):
                y[a, k] = _float32(z[r, a, k])
        for k in range(H):
            i[k] = ONE / (ONE + exp(-i[k]))
        for k in range(H):
            f[k] = ONE / (ONE + exp(-f[k]))
        for k in range(H):
            g[k] = ONE - np.float32(2) / (ONE + exp(g[k] + g[k]))
        for k in range(H):
            o[k] = ONE / (ONE + exp(-o[k]))
        for k in range(H):
            c[k] = f[k] * before[k]
        for k in range(H):
            c[k] += i[k] * g[k]
        for k in range(H):
            h[k] = ONE - np.float32(2) / (ONE + exp(c[k] + c[k]))
        for k in range(H):
            h[k] *= o[k]


@compiled
def states(start, gates, cs, part, parts):
    """c of all steps, as `forward` had it: from c before (R, H) and gates (T, R, 4, H) -> cs (T, R, H)."""
    T, R, H = cs.shape
    for r in share(R, part, parts):
        for t in range(T):
            before, c, y = start[r] if t == 0 else cs[t - 1, r], cs[t, r], gates[t, r]
            i, f, g = y[0], y[1], y[2]
            for k in range(H):
                c[k] = f[k] * before[k]
            for k in range(H):
                c[k] += i[k] * g[k]


@compiled
def hidden(a, b, out, activation, part, parts):
    """The first hidden layer of a step: the activation of a + b, of its place in `ACTIVATIONS`; all (R, N), float32 or
    bfloat16 as uint16. Summed and bent in float32, rounded once."""
    R, N = out.shape
    z = np.empty(N, np.float32)
    for r in share(R, part, parts):
        x, y, into = a[r], b[r], out[r]
        for k in range(N):
            z[k] = _float32(x[k]) + _float32(y[k])
        if activation == 0:
            for k in range(N):
                z[k] = ONE - np.float32(2) / (ONE + exp(z[k] + z[k]))
        elif activation == 1:
            for k in range(N):
                z[k] = np.float32(0) if z[k] < np.float32(0) else z[k]           # so written, NaN stays NaN
        elif activation == 2:
            for k in range(N):
                z[k] = np.float32(0.01) * z[k] if z[k] < np.float32(0) else z[k]
        else:
            for k in range(N):
                z[k] = exp(z[k]) - ONE if z[k] < np.float32(0) else z[k]
        for k in range(N):
            into[k] = _as(z[k], out)


@compiled
def dropped(a, noise, out, part, parts):
    """Dropout of a step, or its way back: a times its factors, all (R, N); a may have more rows."""
    R, N = out.shape
    for r in share(R, part, parts):
        x, y, into = a[r], noise[r], out[r]
        for k in range(N):
            into[k] = _as(_float32(x[k]) * _float32(y[k]), out)


@compiled
def hidden_backward(d, a, out, activation, part, parts):
    """The way back of `hidden`, from its output a: the gradient d times the activation's slope; all (R, N), d may have
    more rows."""
    R, N = out.shape
    for r in share(R, part, parts):
        x, y, into = d[r], a[r], out[r]
        if activation == 0:
            for k in range(N):
                into[k] = _as(x[k] * (ONE - _float32(y[k]) * _float32(y[k])), out)
        elif activation == 1:
            for k in range(N):
                into[k] = _as(x[k] if _float32(y[k]) > np.float32(0) else np.float32(0), out)
        elif activation == 2:
            for k in range(N):
                into[k] = _as(x[k] if _float32(y[k]) > np.float32(0) else np.float32(0.01) * x[k], out)
        else:
            for k in range(N):
                into[k] = _as(x[k] if _float32(y[k]) > np.float32(0) else x[k] * (_float32(y[k]) + ONE), out)


@compiled
def copied(x, out, part, parts):
    """x (R, N) into out, which may have more or fewer rows; so in loops, since slices cost numba ten times as much."""
    for r in share(min(len(x), len(out)), part, parts):
        row, into = x[r], out[r]
        for k in range(len(into)):
            into[k] = row[k]


@compiled
def added(x, total, part, parts):
    """Adds x to total, both (R, H)."""
    for r in share(len(total), part, parts):
        row, into = x[r], total[r]
        for k in range(len(into)):
            into[k] += row[k]


@compiled
def rounded(x, out, part, parts):
    """x (R, H) in the type of out, which may have more rows."""
    for r in share(x.shape[0], part, parts):
        for k in range(x.shape[1]):
            out[r, k] = _as(x[r, k], out)


@compiled
def backward(dh, dc, t, start, gates, cs, d, part, parts):
    """The way back of `forward` at step t: dh and dc (R, H) -> d (R, 4, H) before the gates' activations, in
    the type of d; dc becomes that of c one step earlier."""
    R, H = dh.shape
    tanh_c = np.empty(H, np.float32)
    for r in share(R, part, parts):
        c, before = cs[t, r], start[r] if t == 0 else cs[t - 1, r]
        y, into, out, dy = gates[t, r], dc[r], dh[r], d[r]
        i, f, g, o = y[0], y[1], y[2], y[3]
        di, df, dg, do = dy[0], dy[1], dy[2], dy[3]
        for k in range(H):
            tanh_c[k] = ONE - np.float32(2) / (ONE + exp(c[k] + c[k]))
        for k in range(H):
            into[k] += out[k] * o[k] * (ONE - tanh_c[k] * tanh_c[k])
        for k in range(H):
            di[k] = _as(into[k] * g[k] * i[k] * (ONE - i[k]), d)
        for k in range(H):
            df[k] = _as(into[k] * before[k] * f[k] * (ONE - f[k]), d)
        for k in range(H):
            dg[k] = _as(into[k] * i[k] * (ONE - g[k] * g[k]), d)
        for k in range(H):
            do[k] = _as(out[k] * tanh_c[k] * o[k] * (ONE - o[k]), d)
        for k in range(H):
            into[k] *= f[k]
