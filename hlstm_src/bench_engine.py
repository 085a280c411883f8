"""The sparse engine against the quickest dense engines: one sequence at a time, one thread, everything in one process.

Time is given for a step. "Best dense" of a case is the quickest float32 engine that multiplies by all weights.
"""

import logging
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numba import njit
from torch import nn

from .bench import interleaved, threads
from .compact import cells, layouts
from .compact.kernels import OPTIONS, aligned, product
from .growprune import prune
from .lstm import HLSTM, HLSTMCell
from .masks import ConnectionMasks
from .records import LatencyRow

SPARSITIES = (0.8, 0.9, 0.95, 0.975)
STRUCTURES = {"unstructured": None, "balanced": "balanced", "16-row blocks": "block16"}


@dataclass
class Case:
    """A recurrent layer with `steps` steps a call; contestants and the bytes of weights that a step of each reads."""
    name: str
    steps: int
    macs: int                                          # of a dense step
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
        rate = next((r for most, r in sorted(self.bandwidth.items()) if size <= most), min(self.bandwidth.values()))
        return size / seconds / rate, macs / seconds / self.macs


@njit(**OPTIONS)
def _products(matrix, x, y, columns, times):
    for _ in range(times):
        product(matrix, x.ctypes.data, x.shape[1], y.ctypes.data, y.shape[1], columns)


def limits() -> Limits:
    """Measures them with products that do little else: wide ones from each cache, and four columns from the first."""
    def seconds(rows: int, columns: int, ways: int, times: int) -> float:
        matrix = layouts.pack(np.ones((rows, columns), np.float32), kind="dense")
        x, y = aligned((ways, cells.padded(columns))), aligned((ways, rows))
        _products(matrix.packed, x, y, ways, 1)
        return interleaved({"": lambda: _products(matrix.packed, x, y, ways, times)}, 5)[""] / times
    bandwidth = {}
    for rows, columns, times in ((16, 256, 20_000), (512, 256, 400), (2048, 1024, 20), (8192, 4096, 1)):
        bandwidth[4 * rows * columns] = 68 / 16 * rows * columns / seconds(rows, columns, 1, times)
    return Limits(bandwidth, 4 * 16 * 256 / seconds(16, 256, 4, 20_000))


def case(kind: str, size: int, steps: int, two_ways: bool = False, sparsities=SPARSITIES, values: bool = True) -> Case:
    """All contestants on an "lstm" or "hlstm" layer of that width, inputs as wide; with `two_ways` both directions,
    summed, as in DeepSpeech2."""
    torch.manual_seed(0)
    gates = 0 if kind == "lstm" else 1

    def layer(width: int = size) -> HLSTM:
        merge = "sum" if two_ways else "concat"
        return HLSTM(size, width, gate_layers=gates, bidirectional=two_ways, merge=merge).eval()
    whole, x = layer(), torch.randn(steps, 1, size)
    macs = sum(p.numel() for p in whole.parameters() if p.dim() == 2)
    name = f"{'LSTM' if kind == 'lstm' else 'H-LSTM'} {size}{', two directions' if two_ways else ''}, {steps} steps"
    made = Case(name, steps, macs)
    size_of = 4 * macs

    def torch_layer(model: nn.Module):
        def run():
            with torch.no_grad():
                return model(x)
        return run
    made.add("torch, layer", torch_layer(whole), size_of, macs, dense=True)
    if not two_ways:
        made.add("torch, cell by cell", _stepping(whole, x), size_of, macs, dense=True)
    for label, low in (("ONNX Runtime", False), ("ONNX Runtime, int8", True)):
        run = _onnx(whole, x, low)
        if run:
            made.add(label, run, size_of // 4 if low else size_of, macs, dense=not low)
    quantised = _quantised(whole) if gates == 0 and not two_ways else None
    if quantised:
        made.add("torch, int8", torch_layer(quantised), size_of // 4, macs)
    made.add("ours, dense", *_ours(whole, x, {}, kind="dense"), macs, dense=True)
    half = layer(size // 2)
    few = sum(p.numel() for p in half.parameters() if p.dim() == 2)
    made.add("ours, dense, half as wide", *_ours(half, x, {}, kind="dense"), few)
    for label, structure in STRUCTURES.items():
        for sparsity in sparsities:
            masks = ConnectionMasks(whole, "weight_*")
            prune(masks, sparsity, structure=structure)
            alive = {n: m.numpy() for n, m in masks.masks.items()}
            live = masks.count()[0]
            made.add(f"{label} {1 - live / macs:.1%}", *_ours(whole, x, alive), live)
            if structure is None and sparsity == 0.95 and values:
                made.add(f"{label} {sparsity:.1%}, CSR", *_ours(whole, x, alive, kind="csr"), live)
                for held in ("bf16", "int8"):
                    made.add(f"{label} {sparsity:.1%}, {held}", *_ours(whole, x, alive, values=held), live)
    return made


def trained(path: Path, steps: int = 150) -> Case:
    """The first recurrent layer of a trained recogniser, with its own weights and masks."""
    from . import experiments
    model, masks, metadata = experiments.load(path)
    layer, prefix = model.rnns[0].rnn, "rnns.0.rnn."
    x = torch.randn(steps, 1, layer.input_size)
    alive = {n.removeprefix(prefix): m.numpy() for n, m in masks.items() if n.startswith(prefix)}
    macs = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    name = f"trained {metadata.get('experiment')} ({metadata.get('profile')}), layer 1, {steps} steps"
    made = Case(name, steps, macs)

    def run():
        with torch.no_grad():
            return layer(x)
    made.add("torch, layer", run, 4 * macs, macs, dense=True)
    if onnx := _onnx(layer, x, False):
        made.add("ONNX Runtime", onnx, 4 * macs, macs, dense=True)
    made.add("ours, dense", *_ours(layer, x, {}, kind="dense"), macs, dense=True)
    live = int(sum(m.sum() for m in alive.values()))
    for kind in (None, "csr", "block16"):
        made.add(f"its own masks, {kind or 'chosen layouts'}", *_ours(layer, x, alive, kind=kind), live)
    return made


def _ours(layer: HLSTM, x: torch.Tensor, masks: dict, kind: str | None = None, values: str = "fp32"):
    """(a call of the engine over the whole of x (T, 1, I), bytes of weights)."""
    weights = {n: p.detach().numpy().copy() for n, p in layer.named_parameters()}
    suffixes = ("_l0", "_l0_reverse")[:layer.directions]
    made = [cells.lstm(weights, masks, activation=layer.activation, suffix=s, kind=kind, values=values)
            for s in suffixes]
    inputs = x[:, 0].numpy()
    size = sum(m.nbytes for cell in made for m in cell.matrices)
    if len(made) == 2:
        return lambda: cells.both(*made, inputs), size
    return lambda: made[0].run(inputs), size


def _stepping(layer: HLSTM, x: torch.Tensor) -> Callable[[], object]:
    if layer.gate_layers == 0:
        cell = nn.LSTMCell(layer.input_size, layer.hidden_size)
        cell.load_state_dict({n.removesuffix("_l0"): p for n, p in layer.state_dict().items()})
    else:
        cell = HLSTMCell(layer.input_size, layer.hidden_size).eval()
        cell.layer.load_state_dict(layer.state_dict())

    def run():
        with torch.no_grad():
            state = None
            for x_t in x:
                state = cell(x_t, state)
        return state
    return run


def _quantised(layer: HLSTM) -> nn.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = nn.Sequential(layer.to_lstm()).eval()
            return torch.ao.quantization.quantize_dynamic(model, {nn.LSTM}, dtype=torch.qint8)
    except (AttributeError, RuntimeError, NotImplementedError):    # taken out of later versions of torch
        return None


def _onnx(layer: HLSTM, x: torch.Tensor, int8: bool) -> Callable[[], object] | None:
    """A session of ONNX Runtime over the whole sequence: its LSTM operator, or for an H-LSTM a Scan over its step.
    None where the package is missing, or for an H-LSTM in int8 (its quantiser does not look into a Scan)."""
    try:
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError:
        return None
    if layer.gate_layers and int8:
        return None
    with tempfile.TemporaryDirectory() as room:
        path = Path(room) / "layer.onnx"
        _onnx_file(layer, len(x), path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if int8:
            logging.getLogger().setLevel(logging.ERROR)            # it recommends a step that an LSTM has no use for
            quantize_dynamic(path, path.with_name("int8.onnx"), weight_type=QuantType.QInt8)
            path = path.with_name("int8.onnx")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)


def _onnx_file(layer: HLSTM, steps: int, path: Path) -> None:
    from onnx import TensorProto, helper, numpy_helper, save
    I, H, ways = layer.input_size, layer.hidden_size, layer.directions    # noqa: E741 (the paper's letter)
    w = {n: p.detach().numpy() for n, p in layer.named_parameters()}
    suffixes = ("_l0", "_l0_reverse")[:ways]
    nodes, constants = [], []

    def constant(name: str, value, into: list) -> str:
        into.append(numpy_helper.from_array(np.ascontiguousarray(value, np.float32), name))
        return name

    def floats(name: str, *shape) -> object:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    if layer.gate_layers == 0:
        def order(a):                                              # ours: i, f, g, o; theirs: i, o, f, c
            i, f, g, o = np.split(a, 4)
            return np.concatenate([i, o, f, g])
        W, R = (np.stack([order(w[n + s]) for s in suffixes]) for n in ("weight_ih", "weight_hh"))
        B = np.stack([np.concatenate([order(w["bias_ih" + s]), order(w["bias_hh" + s])]) for s in suffixes])
        names = [constant(n, v, constants) for n, v in (("W", W), ("R", R), ("B", B))]
        nodes.append(helper.make_node("LSTM", ["x", *names], ["y"], hidden_size=H,
                                      direction="bidirectional" if ways == 2 else "forward"))
        outputs = [floats("y", steps, ways, 1, H)]
    else:
        outputs = []
        for d, s in enumerate(suffixes):
            body, held = [], []

            def node(kind: str, ins: list, out: str, body=body, **options) -> str:
                body.append(helper.make_node(kind, ins, [out], **options))
                return out
            z = node("Concat", ["x_t", "h"], "z", axis=1)
            W = np.concatenate([w["weight_ih" + s], w["weight_hh" + s]], 1).T
            u = node("Gemm", [z, constant("W", W, held), constant("b", w["bias_ih" + s], held)], "u")
            a = node(layer.activation.capitalize(), [u], "a")
            parts, gates = [f"a_{g}" for g in "ifgo"], {}
            body.append(helper.make_node("Split", [a], parts, axis=1, num_outputs=4))
            Vs, bs = (np.split(w[n + s], 4) for n in ("weight_gate1", "bias_gate1"))
            for g, part, V, b in zip("ifgo", parts, Vs, bs):
                pre = node("Gemm", [part, constant(f"V_{g}", V.T, held), constant(f"b_{g}", b, held)], f"p_{g}")
                gates[g] = node("Tanh" if g == "g" else "Sigmoid", [pre], f"gate_{g}")
            kept, new = node("Mul", [gates["f"], "c"], "kept"), node("Mul", [gates["i"], gates["g"]], "new")
            new_c = node("Add", [kept, new], "c_t")
            node("Mul", [gates["o"], node("Tanh", [new_c], "tc")], "h_t")
            node("Identity", ["h_t"], "y_t")
            graph = helper.make_graph(body, "step", [floats("h", 1, H), floats("c", 1, H), floats("x_t", 1, I)],
                                      [floats("h_t", 1, H), floats("c_t", 1, H), floats("y_t", 1, H)], held)
            zero = constant("zero", np.zeros((1, H)), constants) if d == 0 else "zero"
            nodes.append(helper.make_node("Scan", [zero, zero, "x"], [f"h{d}", f"c{d}", f"y{d}"], num_scan_inputs=1,
                                          body=graph, scan_input_directions=[d], scan_output_directions=[d]))
            outputs.append(floats(f"y{d}", steps, 1, H))
    graph = helper.make_graph(nodes, "layer", [floats("x", steps, 1, I)], outputs, constants)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def engine(quick: bool = False, model: Path | None = None,
           rounds: int = 9) -> tuple[list[Case], list[LatencyRow], Limits]:
    """Runs all cases on one thread: (the cases, rows of microseconds a step, the machine's limits)."""
    if quick:
        made = [case("lstm", 32, 5, sparsities=(0.9,)), case("hlstm", 32, 5, sparsities=(0.9,))]
    else:
        made = [case("lstm", 512, 100), case("hlstm", 512, 100), case("lstm", 800, 200, two_ways=True),
                case("hlstm", 800, 200, two_ways=True, values=False)]
    if model is not None:
        made.append(trained(model))
    rows = []
    with threads(1):
        bounds = limits()
        for c in made:
            for name, seconds in interleaved(c.runs, rounds).items():
                rows.append(LatencyRow(engine=name, threads=1, case=c.name, microseconds=1e6 * seconds / c.steps))
    return made, rows, bounds


def table(made: list[Case], rows: list[LatencyRow], bounds: Limits) -> str:
    """Time a step, how many times faster than the best dense engine, bytes, and shares of the machine's limits."""
    time = {(r.case, r.engine): r.microseconds for r in rows}
    text = []
    for c in made:
        best = min(c.dense, key=lambda e: time[c.name, e])
        text.append(f"{c.name}: best dense is {best}, {time[c.name, best]:.1f} us a step")
        text.append(f"  {'engine':34} {'us':>8} {'faster':>7} {'KB':>9} {'of memory':>10} {'of products':>12}")
        for engine in c.runs:
            us = time[c.name, engine]
            memory, macs = bounds.share(c.bytes[engine], c.live[engine], us / 1e6)
            text.append(f"  {engine:34} {us:8.1f} {time[c.name, best] / us:6.2f}x {c.bytes[engine] / 1e3:9.0f} "
                        f"{memory:10.0%} {macs:12.0%}")
    return "\n".join(text)


def summary(made: list[Case], rows: list[LatencyRow]) -> dict[str, dict[str, float]]:
    """By case: how many times faster than its best dense engine each contestant is."""
    time = {(r.case, r.engine): r.microseconds for r in rows}
    return {c.name: {e: min(time[c.name, d] for d in c.dense) / time[c.name, e] for e in c.runs}
            for c in made}
