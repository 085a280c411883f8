"""The sparse engine against the quickest dense engines: one sequence at a time, one thread, everything in one process.

Time is given for a step. "Best dense" of a case is the quickest float32 engine that multiplies by all weights.
"""

import copy
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import nn

from .bench import in_columns, interleaved, rows_of, threads
from .compact import cells
from .compact.kernels import LANES, V, aligned
from .compiled import compiled
from .growprune import prune
from .lstm import HLSTM, HLSTMCell
from .masks import ConnectionMasks
from .products import HAS
from .records import LatencyRow

SPARSITIES = (0.8, 0.9, 0.95, 0.975)
BESIDE = 12 if HAS("avx512f") else 5   # sums that a measurement keeps: enough for none to wait, and all in registers
STRUCTURES = {"unstructured": None, "balanced": "balanced", "16-row blocks": "block16"}


@dataclass
class Case:
    """A recurrent layer with `steps` steps a call; contestants and the bytes of weights that a step of each reads."""
    name: str
    steps: int
    macs: int                                          # of a dense step
    threads: int = 1
    dense: list[str] = field(default_factory=list)     # engines that count as dense float32
    runs: dict[str, Callable[[], object]] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    live: dict[str, int] = field(default_factory=dict)

    def add(self, engine: str, run: Callable[[], object], size: int, live: int, dense: bool = False) -> None:
        self.runs[engine], self.bytes[engine], self.live[engine] = run, size, live
        if dense:
            self.dense.append(engine)


@dataclass
class Limits:
    """What one thread can do here: bytes a second from memory of each size, multiply-accumulates a second."""
    bandwidth: dict[int, float]
    macs: float

    def share(self, size: int, macs: int, seconds: float) -> tuple[float, float]:
        """Shares of the two limits that a step reaches which reads so many bytes and does so much."""
        sizes = sorted(self.bandwidth)                             # between two sizes, in proportion to the logarithm
        rate = np.interp(np.log(size), np.log(sizes), [self.bandwidth[n] for n in sizes])
        return size / seconds / rate, macs / seconds / self.macs


@compiled
def _read(a, times):
    """Reads the whole of a (uint64) so many times, and does next to nothing with it."""
    found = np.uint64(0)
    for k in range(times):
        for n in range(len(a)):
            found ^= a[n]
        found += np.uint64(k)                                      # or all rounds but one would be left out
    return found


@intrinsic
def _multiply(typing, times):
    """So many times `BESIDE` multiply-accumulates of 16 values."""
    def emit(context, b, signature, args):
        fma = cgutils.get_or_insert_function(b.module, ir.FunctionType(V, [V] * 3), f"llvm.fma.v{LANES}f32")
        half = ir.Constant(V, [0.5] * LANES)
        sums = [cgutils.alloca_once_value(b, ir.Constant(V, [float(k)] * LANES)) for k in range(BESIDE)]
        with cgutils.for_range(b, args[0]):
            for total in sums:
                b.store(b.call(fma, [b.load(total), half, half]), total)
        total = reduce(b.fadd, [b.load(total) for total in sums])
        return b.extract_element(total, ir.IntType(32)(0))
    return types.float32(types.intp), emit


@compiled
def _multiplied(times):
    return _multiply(times)


def limits() -> Limits:
    """Measures them: reading from each cache and from memory, multiplying in registers."""
    bandwidth = {}
    for size, times in ((1 << 14, 4000), (1 << 19, 100), (1 << 23, 5), (1 << 24, 3), (1 << 27, 1)):
        room = aligned(size // 8, np.uint64)
        room[:] = 1                                                # until written to, all its pages may be one
        bandwidth[size] = size * times / interleaved({"": partial(_read, room, times)}, 5)[""]
    return Limits(bandwidth, BESIDE * LANES * 200_000 / interleaved({"": partial(_multiplied, 200_000)}, 5)[""])


def case(kind: str, size: int, steps: int, two_ways: bool = False, sparsities=SPARSITIES, values: bool = True,
         fed_back: bool = False, n_threads: int = 1) -> Case:
    """All contestants on an "lstm" or "hlstm" layer of that width, inputs as wide.

    two_ways: both directions, summed, as in DeepSpeech2. fed_back: no step's input is known before the step before is
    done, as in a decoder, so that no product can be made for several steps at once. values: also CSR, bf16 and int8.
    n_threads=2: ours take a thread for each direction, the others as they like.
    """
    torch.manual_seed(0)

    def layer(width: int) -> HLSTM:
        return HLSTM(size, width, gate_layers=int(kind == "hlstm"), bidirectional=two_ways, merge="sum").eval()
    whole, half = layer(size), layer(size // 2)
    x = torch.randn(steps, 1, size)
    way = ", two directions" if two_ways else ", fed back" if fed_back else ""
    way += ", two threads" if n_threads == 2 else ""
    made = Case(f"{'LSTM' if kind == 'lstm' else 'H-LSTM'} {size}{way}, {steps} steps", steps, _macs(whole), n_threads)
    how = {"fed_back": fed_back, "n_threads": n_threads}
    _add_dense(made, whole, x, **how)
    made.add("ours, dense, half as wide", *_ours(half, x, {}, kind="dense", **how), _macs(half))
    for label, structure in STRUCTURES.items():
        for sparsity in sparsities:
            pruned = copy.deepcopy(whole)                          # pruning sets weights to zero
            masks = ConnectionMasks(pruned, "weight_*")
            prune(masks, sparsity, structure=structure)
            alive, live = {n: m.numpy() for n, m in masks.masks.items()}, masks.count()[0]
            ours = partial(_ours, pruned, x, alive, **how)
            made.add(f"{label} {1 - live / made.macs:.1%}", *ours(), live)
            if structure is None and sparsity == 0.95 and values:
                made.add(f"{label} {sparsity:.1%}, CSR", *ours(kind="csr"), live)
                for held in ("bf16", "int8"):
                    made.add(f"{label} {sparsity:.1%}, {held}", *ours(values=held), live)
    return made


def trained(path: Path, steps: int = 150) -> Case:
    """The first recurrent layer of a trained recogniser, with its own weights and masks. Raises ValueError for another
    model."""
    from . import experiments
    model, masks, metadata = experiments.load(path)
    if not hasattr(model, "rnns"):
        raise ValueError(f"{path}: no trained recogniser, but a {type(model).__name__}; name the file of a ds2-... run")
    layer, prefix = model.rnns[0].rnn, "rnns.0.rnn."
    torch.manual_seed(0)
    x = torch.randn(steps, 1, layer.input_size)
    alive = {n.removeprefix(prefix): m.numpy() for n, m in masks.items() if n.startswith(prefix)}
    name = f"trained {metadata.get('experiment')} ({metadata.get('profile')}), layer 1, {steps} steps"
    made = Case(name, steps, _macs(layer))
    _add_dense(made, layer, x)
    live = int(sum(m.sum() for m in alive.values()))
    for kind in (None, "csr", "block16"):
        made.add(f"its own masks, {kind or 'chosen layouts'}", *_ours(layer, x, alive, kind=kind), live)
    return made


def _macs(layer: HLSTM) -> int:
    return sum(p.numel() for p in layer.parameters() if p.dim() == 2)


def _add_dense(made: Case, layer: HLSTM, x: torch.Tensor, fed_back: bool = False, n_threads: int = 1) -> None:
    """Dense engines with all the layer's weights: float32 ones, of which the best counts, and int8."""
    inputs = sum(p.numel() for n, p in layer.named_parameters() if n.startswith("weight_ih"))
    macs = made.macs
    size = 4 * (macs - inputs + inputs // (1 if fed_back else len(x)))    # the inputs' weights serve all steps at once
    if not fed_back:
        made.add("torch, layer", _torch_layer(layer, x), size, macs, dense=True)
    if layer.directions == 1:
        made.add("torch, cell by cell", _stepping(layer, x), 4 * macs, macs, dense=True)
    for int8 in (False, True):
        if run := _onnx(layer, x, int8, fed_back, n_threads):
            made.add("ONNX Runtime, int8" if int8 else "ONNX Runtime", run, size // (4 if int8 else 1), macs, not int8)
    if layer.gate_layers == 0 and not fed_back and (run := _quantised(layer, x)):
        made.add("torch, int8", run, size // 4, macs)
    ours = _ours(layer, x, {}, kind="dense", fed_back=fed_back, n_threads=n_threads)
    made.add("ours, dense", *ours, macs, dense=True)


def _ours(layer: HLSTM, x: torch.Tensor, masks: dict, kind: str | None = None, values: str = "fp32",
          fed_back: bool = False, n_threads: int = 1):
    """(a call of the engine over the whole of x (T, 1, I) that returns (T, H), bytes of weights a step reads)."""
    weights = {n: p.detach().numpy().copy() for n, p in layer.named_parameters()}
    suffixes = ("_l0", "_l0_reverse")[:layer.directions]
    made = [cells.lstm(weights, masks, activation=layer.activation, suffix=s, kind=kind, values=values,
                       columns=1 if fed_back else 4) for s in suffixes]
    inputs = x[:, 0].numpy()
    size = sum(m.nbytes for cell in made for m in cell.layers)
    size += sum(cell.inputs.nbytes for cell in made) // (1 if fed_back else len(x))
    if len(made) == 2:
        return partial(cells.both, *made, inputs, ThreadPoolExecutor(1) if n_threads == 2 else None), size
    return (partial(_fed_back, made[0], inputs) if fed_back else lambda: made[0].run(inputs)[0]), size


def _fed_back(cell: cells.Cell, x: np.ndarray) -> np.ndarray:
    T, H = len(x), cell.size
    xs, hs = aligned((T, cells.padded(x.shape[1]))), np.zeros((T, H), np.float32)
    xs[:, :x.shape[1]] = x
    h, c = aligned((1, cells.padded(H))), aligned((1, cells.padded(H)))
    _steps(cell.program, xs, hs, h, c, aligned((1, len(cell.layers), cell.width)))
    return hs


@compiled
def _steps(program, xs, hs, h, c, room):
    for t in range(len(xs)):
        cells.one_step(*program, xs[t:t + 1], h, c, room)
        hs[t] = h[0, :hs.shape[1]]


def _torch_layer(model: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    def run():
        with torch.no_grad():
            return model(x)[0][:, 0]
    return run


def _stepping(layer: HLSTM, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    if layer.gate_layers == 0:
        cell = nn.LSTMCell(layer.input_size, layer.hidden_size)
        cell.load_state_dict({n.removesuffix("_l0"): p for n, p in layer.state_dict().items()})
    else:
        cell = HLSTMCell(layer.input_size, layer.hidden_size, gate_layers=layer.gate_layers,
                         activation=layer.activation).eval()
        cell.layer.load_state_dict(layer.state_dict())

    def run():
        with torch.no_grad():
            state, hs = None, []
            for x_t in x:
                state = cell(x_t, state)
                hs.append(state[0])
            return torch.cat(hs)
    return run


def _quantised(layer: HLSTM, x: torch.Tensor) -> Callable[[], torch.Tensor] | None:
    """torch's own int8 LSTM; None where this version of torch has none."""
    apart = copy.deepcopy(layer)
    apart.merge = "concat"                                         # torch.nn.LSTM does not sum its directions
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = torch.ao.quantization.quantize_dynamic(nn.Sequential(apart.to_lstm()), {nn.LSTM}, torch.qint8)
    except (AttributeError, RuntimeError, NotImplementedError):
        return None
    run = _torch_layer(model, x)
    return lambda: run().unflatten(1, (layer.directions, layer.hidden_size)).sum(1)


def _onnx(layer: HLSTM, x: torch.Tensor, int8: bool, fed_back: bool = False,
          n_threads: int = 1) -> Callable[[], np.ndarray] | None:
    """A session of ONNX Runtime; None where the package is missing."""
    try:
        from . import bench_onnx
    except ImportError:
        return None
    return bench_onnx.runner(bench_onnx.session(bench_onnx.model_of(layer), n_threads, int8), x[:, 0].numpy(), fed_back)


def engine(quick: bool = False, model: Path | None = None, rounds: int = 9,
           n_threads: int = 1) -> tuple[list[Case], list[LatencyRow], Limits]:
    """Runs all cases on one thread, and with n_threads=2 those with two directions on two as well: (the cases, rows of
    microseconds a step, the limits of one thread)."""
    own = [] if model is None else [trained(model)]               # whose faults are to be seen first
    if quick:
        made = [case("lstm", 32, 5, sparsities=(0.9,)), case("hlstm", 32, 5, sparsities=(0.9,), fed_back=True)]
    else:
        made = [case("lstm", 512, 100), case("hlstm", 512, 100), case("lstm", 512, 100, fed_back=True),
                case("hlstm", 512, 100, fed_back=True), case("lstm", 800, 200, two_ways=True),
                case("hlstm", 800, 200, two_ways=True, values=False)]
    if n_threads == 2:
        size, steps = (32, 5) if quick else (800, 200)
        made += [case(kind, size, steps, two_ways=True, values=False, n_threads=2,
                      sparsities=(0.9,) if quick else SPARSITIES) for kind in ("lstm", "hlstm")]
    made, rows = made + own, []
    with threads(1):
        bounds = limits()
    for c in made:
        with threads(c.threads):
            rows += rows_of(interleaved(c.runs, rounds), c.name, c.threads, c.steps)
    return made, rows, bounds


def table(made: list[Case], rows: list[LatencyRow], bounds: Limits) -> str:
    """Time a step, how many times faster than the best dense engine, bytes, and shares of the machine's limits."""
    time = {(r.case, r.engine): r.microseconds for r in rows}
    text = []
    for c in made:
        best = min(c.dense, key=lambda e: time[c.name, e])
        text.append(f"{c.name}: best dense is {best}, {time[c.name, best]:.1f} us a step")
        lines = [["  engine", "us", "faster", "KB", "of memory", "of products"]]
        for engine in c.runs:
            us = time[c.name, engine]
            memory, macs = bounds.share(c.bytes[engine], c.live[engine], us / 1e6)
            lines.append([f"  {engine}", f"{us:.1f}", f"{time[c.name, best] / us:.2f}x", f"{c.bytes[engine] / 1e3:.0f}",
                          f"{memory:.0%}", f"{macs:.0%}"])
        text.append(in_columns(lines))
    return "\n".join(text)
