"""A layer as ONNX Runtime would run it: what the engine in `compact` has to beat.

A plain LSTM is ONNX's own operator. There is none for an H-LSTM, so a `Scan` repeats one step of it; the inputs' part
of all steps is one product before it. Needs the extra "bench".
"""

import logging
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from .lstm import HLSTM
from .products import HAS

OPSET = 17
ACTIVATIONS = {"relu": "Relu", "leaky_relu": "LeakyRelu", "tanh": "Tanh", "elu": "Elu"}


class Graph:
    """Collects the nodes and constants of an ONNX graph; `ports` are (name, shape) of its inputs and outputs."""

    def __init__(self, name: str):
        self.name, self.nodes, self.constants = name, [], []

    def add(self, kind: str, *inputs: str, outputs: int = 1, **options) -> list[str]:
        """One node -> the names of its outputs."""
        names = [f"{self.name}_{len(self.nodes)}_{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, **options))
        return names

    def constant(self, values) -> str:
        name = f"{self.name}_constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(values, order="C"), name))
        return name

    def linear(self, x: str, weight, bias=None) -> str:
        """x (..., K) times the transpose of weight (R, K), plus bias (R)."""
        y, = self.add("MatMul", x, self.constant(weight.detach().numpy().T))
        return y if bias is None else self.add("Add", y, self.constant(bias.detach().numpy()))[0]

    def made(self, inputs, outputs) -> onnx.GraphProto:
        inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in ports]
                           for ports in (inputs, outputs))
        return helper.make_graph(self.nodes, self.name, inputs, outputs, self.constants)


def model_of(layer: HLSTM) -> onnx.ModelProto:
    """x (T, 1, I), h0 and c0 (D, 1, H) -> y (T, 1, H), the directions summed, and the last h and c (D, 1, H).

    `layer` has one layer; its gates are of one width, each with hidden layers of its own.
    """
    g, D, H = Graph("layer"), layer.directions, layer.hidden_size
    if layer.gate_layers == 0:
        ways = [layer.weights(0, reverse) for reverse in (False, True)[:D]]
        order = np.r_[:H, 3 * H:4 * H, H:3 * H]                    # ONNX has the rows i, o, f, g
        ih, hh, bias = (np.stack([t.detach().numpy()[order] for t in parts])
                        for parts in zip(*((w.ih, w.hh, w.bias) for w in ways)))
        y, h, c = g.add("LSTM", "x", g.constant(ih), g.constant(hh),
                        g.constant(np.concatenate([bias, np.zeros_like(bias)], 1)), "", "h0", "c0", outputs=3,
                        hidden_size=H, direction="bidirectional" if D == 2 else "forward")
        g.add("ReduceSum", y, g.constant(np.array([1])), keepdims=0)
    else:
        ways = [_scan(g, layer, d) for d in range(D)]
        y, h, c = (list(names) for names in zip(*ways))
        h, c = (g.add("Unsqueeze", g.add("Concat", *names, axis=0)[0], g.constant(np.array([1])))[0]
                for names in (h, c))
        g.add("Sum", *y)
    for name, final in zip("yhc", (g.nodes[-1].output[0], h, c)):
        g.nodes.append(helper.make_node("Identity", [final], [name]))
    graph = g.made([("x", ["T", 1, layer.input_size]), ("h0", [D, 1, H]), ("c0", [D, 1, H])],
                   [("y", ["T", 1, H]), ("h", [D, 1, H]), ("c", [D, 1, H])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def _scan(g: Graph, layer: HLSTM, d: int) -> list[str]:
    """One direction of an H-LSTM -> names of its outputs (T, 1, H), its last h and c (1, H)."""
    w, body, H = layer.weights(0, bool(d)), Graph(f"step{d}"), layer.hidden_size
    z, = body.add("Add", "first", body.linear("h", w.hh))
    for blocks, bias in w.gates:
        a, = body.add(ACTIVATIONS[layer.activation], z)
        stacks = body.add("Split", a, body.constant(np.array([b.shape[1] for b in blocks])), outputs=4, axis=1)
        z, = body.add("Concat", *(body.linear(s, b) for s, b in zip(stacks, blocks)), axis=1)
        z = z if bias is None else body.add("Add", z, body.constant(bias.detach().numpy()))[0]
    parts = body.add("Split", z, body.constant(np.array([H] * 4)), outputs=4, axis=1)
    i, f, g_, o = (body.add("Tanh" if k == 2 else "Sigmoid", part)[0] for k, part in enumerate(parts))
    c, = body.add("Add", body.add("Mul", f, "c")[0], body.add("Mul", i, g_)[0])
    h, = body.add("Mul", o, body.add("Tanh", c)[0])
    out, = body.add("Identity", h)
    step = body.made([("h", [1, H]), ("c", [1, H]), ("first", [1, w.ih.shape[0]])],
                     [(h, [1, H]), (c, [1, H]), (out, [1, H])])
    h0, c0 = (g.add("Gather", name, g.constant(np.array(d)), axis=0)[0] for name in ("h0", "c0"))
    h, c, y = g.add("Scan", h0, c0, g.linear("x", w.ih, w.bias), outputs=3, body=step, num_scan_inputs=1,
                    scan_input_directions=[d], scan_output_directions=[d])
    return [y, h, c]


def session(model: onnx.ModelProto, n_threads: int = 1, int8: bool = False) -> onnxruntime.InferenceSession:
    """A session that computes on so many threads; int8: after ONNX Runtime's dynamic quantisation of all products."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = n_threads, 1
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        if int8:
            file, root = Path(folder) / "int8.onnx", logging.getLogger()
            before = root.level
            root.setLevel(logging.ERROR)                           # it advises to preprocess: that changes nothing
            try:
                quantize_dynamic(model, file, weight_type=QuantType.QInt8, reduce_range=_saturates(),
                                 extra_options={"EnableSubgraph": True})
            finally:
                root.setLevel(before)
            model = onnx.load(file)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _saturates() -> bool:
    """Whether 8-bit products are summed in 16 bits here, as on x86 without VNNI: then weights must keep to 7 bits."""
    return platform.machine() == "x86_64" and not (HAS("avx512vnni") or HAS("avxvnni"))


def runner(made: onnxruntime.InferenceSession, x: np.ndarray, fed_back: bool = False) -> Callable[[], np.ndarray]:
    """A function that runs x (T, I) from a zero state, in one call or, `fed_back`, one call a step -> (T, H)."""
    x, zeros = x[:, None], np.zeros(made.get_inputs()[1].shape, np.float32)

    def whole():
        return made.run(["y"], {"x": x, "h0": zeros, "c0": zeros})[0][:, 0]

    def stepwise():
        h, c, ys = zeros, zeros, []
        for t in range(len(x)):
            y, h, c = made.run(None, {"x": x[t:t + 1], "h0": h, "c0": c})
            ys.append(y[0, 0])
        return np.stack(ys)
    return stepwise if fed_back else whole
