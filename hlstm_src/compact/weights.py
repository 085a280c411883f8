"""What recognisers and captioners share: sizes that are checked before use, and the recurrent layers out of a file."""

import math
from collections.abc import Callable, Mapping

import numpy as np

from ..gates import ACTIVATIONS
from . import cells
from .format import ModelFile

EPSILON = 1e-5                         # of torch's batch normalisation
CELL = {"cell": "lstm", "gate_layers": 1, "activation": "relu", "gate_width": None, "shared_hidden": False,
        "bias": True}


def sizes(file: ModelFile, usual: Mapping, **most: int) -> dict:
    """metadata["model"], checked: sizes are whole numbers from 1 to `most`, the cell is one that there is.

    usual: what the metadata may leave out. `widths` are added: of each stack of hidden layers, in the order of rows.
    """
    m = file.metadata.get("model")
    if not isinstance(m, dict):
        raise file.error("its metadata lack the model's sizes")
    m = CELL | usual | m
    for name, limit in (most | {"hidden": 16_384, "layers": 64, "gate_layers": 16}).items():
        m[name] = whole(file, name, m.get(name), int(name != "gate_layers"), limit)
    if m["cell"] not in ("lstm", "gru", "hlstm") or m["activation"] not in ACTIVATIONS:
        raise file.error(f"cell {m['cell']!r} or activation {m['activation']!r} is unknown")
    width = m["hidden"] if m["gate_width"] is None else m["gate_width"]
    if isinstance(width, list) and len(width) == 4:
        width = dict(zip("fiog", width))
    widths = [width.get(gate) for gate in "ifgo"] if isinstance(width, dict) else [width] * 4
    if not all(type(w) is int and 0 < w <= 16_384 for w in widths) or type(m["shared_hidden"]) is not bool:
        raise file.error(f"gate_width {m['gate_width']!r} or shared_hidden {m['shared_hidden']!r} is wrong")
    return m | {"widths": widths[:1] if m["shared_hidden"] else widths}


def whole(file: ModelFile, name: str, value, least: int, most: int) -> int:
    """The value, if it is a whole number in these bounds."""
    if type(value) is not int or not least <= value <= most:
        raise file.error(f"{name} {value!r} is not a whole number from {least} to {most}")
    return value


def norm(file: ModelFile, name: str, n: int, affine: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Batch normalisation of n numbers as (factor, addend)."""
    file.ignore(f"{name}.num_batches_tracked")
    mean, var = (file.tensor(f"{name}.running_{part}", (n,))[0] for part in ("mean", "var"))
    gain, add = (file.tensor(f"{name}.{part}", (n,))[0] for part in ("weight", "bias")) if affine else (1, 0)
    if (var < 0).any():
        raise file.error(f"{name}.running_var is negative")
    factor = gain / np.sqrt(var + np.float32(EPSILON))
    return factor, add - mean * factor


def cell(file: ModelFile, m: Mapping, prefix: str, suffix: str, size: int, scale=1.0, add: np.ndarray | None = None,
         order: Callable[[np.ndarray], np.ndarray] | None = None, **options) -> cells.Cell:
    """One layer and direction with `size` inputs, from tensors such as {prefix}weight_ih{suffix}.

    scale, add (size): the normalisation before it, to be folded into its input weights; order: puts the columns of
    those into another order; options go to `cells.lstm` or `cells.gru`.
    """
    weights, masks = {}, {}
    for name, shape in shapes(m, size).items():
        if len(shape) == 1 and not m["bias"]:
            continue
        weights[name + suffix], mask = file.tensor(f"{prefix}{name}{suffix}", shape)
        if mask is not None:
            masks[name + suffix] = mask
    ih = "weight_ih" + suffix
    if add is not None:
        bias = "bias_ih" + suffix
        weights[bias] = weights.get(bias, 0) + weights[ih] @ add
    weights[ih] = weights[ih] * scale
    if order is not None:
        weights[ih] = order(weights[ih])
        if ih in masks:
            masks[ih] = order(masks[ih])
    if m["cell"] == "gru":
        return cells.gru(weights, masks, suffix=suffix, **options)
    return cells.lstm(weights, masks, activation=m["activation"], suffix=suffix, **options)


def entries(m: Mapping, size: int) -> int:
    """Weights of one layer and direction with `size` inputs."""
    return sum(map(math.prod, shapes(m, size).values()))


def shapes(m: Mapping, size: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one direction's tensors, as `HLSTM` and torch.nn.GRU have them."""
    H, widths, kind = m["hidden"], m["widths"], m["cell"]
    layers = m["gate_layers"] if kind == "hlstm" else 0
    units = sum(widths)
    first = 3 * H if kind == "gru" else units if layers else 4 * H
    found = {"weight_ih": (first, size), "weight_hh": (first, H), "bias_ih": (first,)}
    if not layers:
        found["bias_hh"] = (first,)
    for j in range(1, layers + 1):
        rows = 4 * H if j == layers else units
        if len(set(widths)) > 1:
            found |= {f"weight_gate{j}_{gate}": (H if j == layers else G, G) for gate, G in zip("ifgo", widths)}
        else:
            found[f"weight_gate{j}"] = rows, widths[0]
        found[f"bias_gate{j}"] = (rows,)
    return found


def named(way: str, made: cells.Cell) -> dict[str, cells.layouts.Layout]:
    """A cell's matrices by readable names."""
    names = "inputs", "hidden", *(f"gate layer {j}" for j in range(1, 17))
    return {f"{way}, {name}": matrix for name, matrix in zip(names, made.matrices)}
