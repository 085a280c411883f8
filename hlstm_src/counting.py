"""What a network costs, counted from its weights and, for the paper's count, from its data.

The rule. A weight of a recurrent or linear layer is one multiply-accumulate (MAC) a step; a weight of a convolution is
one at each output position; a look-up is none. FLOPs = 2 MACs, as the paper's own figures come out and as all records
count. A sum of products begins at the bias, which therefore adds nothing. Every other addition, product, sigmoid, tanh
or ReLU of one number is an element-wise operation, counted apart in `elementwise`: 9H in an LSTM step, 8H in a GRU's,
one more for each hidden unit of an H-LSTM, 2 for each value that batch normalisation scales and shifts. What stands
between the layers (activations without weights, softmax) is not seen.

"nonzero" counts live connections only, as a sparse engine does the work. "active" leaves out those, too, that start at
a hidden unit of a gate which is exactly zero, as behind a ReLU: a measurement on data (`zero_shares`), and it seems
what the paper counts, whose FLOPs fall further than its weights.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from .lstm import HLSTM
from .masks import ConnectionMasks

CONVOLUTIONS, NORMS = (nn.Conv1d, nn.Conv2d), (nn.BatchNorm1d, nn.BatchNorm2d)
KINDS = (HLSTM, nn.LSTM, nn.LSTMCell, nn.GRU, nn.GRUCell, nn.RNN, nn.RNNCell, nn.Linear, *CONVOLUTIONS, *NORMS,
         nn.Embedding)


@dataclass(frozen=True)
class Counts:
    """Costs of a step, or of as many steps as `count` was asked for, in all and by layer; sizes do not grow with steps.

    activations: numbers that hidden layers, gates, states and outputs take, which is what training keeps for the way
    back (`HLSTM` makes c anew there). mask_bytes: a bit for each connection of the masked matrices.
    """
    kind: str = ""                         # class of the layer; of a whole model, nothing
    params: int = 0
    nonzero_params: int = 0
    macs: int = 0
    nonzero_macs: int = 0
    active_macs: float = 0                 # without `zeros`, the nonzero ones
    elementwise: int = 0
    activations: int = 0
    mask_bytes: int = 0
    layers: dict[str, "Counts"] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        return 2 * self.macs

    @property
    def nonzero_flops(self) -> int:
        return 2 * self.nonzero_macs

    @property
    def active_flops(self) -> float:
        """As the paper counts: of live connections, without those that multiply a zero."""
        return 2 * self.active_macs

    @property
    def bytes_dense(self) -> int:
        """Every parameter in float32."""
        return 4 * self.params

    @property
    def bytes_sparse(self) -> int:
        """Live parameters in float32, and the masks."""
        return 4 * self.nonzero_params + self.mask_bytes

    @property
    def activation_bytes(self) -> int:
        return 4 * self.activations

    def __add__(self, other: "Counts") -> "Counts":
        """The sums of all numbers; kind and layers are those of the first."""
        return replace(self, **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)
                                if f.name not in ("kind", "layers")})

    def record(self) -> dict[str, int]:
        """The six keys of a run record."""
        return {f"{live}{what}": getattr(self, f"{live}{what}")
                for what in ("params", "macs", "flops") for live in ("", "nonzero_")}


def count(model: nn.Module, masks: ConnectionMasks | Mapping[str, Tensor] | None = None,
          seq_len: int | Sequence[int] = 1, *, include: str = "", weights_only: bool = False,
          positions: Mapping[str, int] | None = None, zeros: Mapping[str, Tensor] | None = None) -> Counts:
    """Counts `model` over `seq_len` steps, or over a batch of sequences of these lengths, padding left out.

    masks: those of training, or name -> bool tensor; unmasked matrices count as dense. include: only parameters whose
    name holds this text. weights_only: matrices without biases and normalisation, as the paper's derived sizes are.
    positions: how often a step uses each weight of a parameter, where that is not once (`output_positions`).
    zeros: shares of zero activations (`zero_shares`). Raises ValueError for a convolution without `positions`, a
    module of unknown kind whose parameters `positions` does not name, masks or zeros that are not this model's, an
    `include` that no name holds, or a negative number of steps.
    """
    masks, positions, zeros = getattr(masks, "masks", masks) or {}, positions or {}, zeros or {}
    parameters = dict(model.named_parameters())
    if not any(include in name for name in parameters) and parameters:
        raise ValueError(f"include={include!r}: a text that no name of a parameter holds (it is no pattern)")
    if (lengths := np.asarray(seq_len)).dtype.kind not in "iu" or lengths.min(initial=0) < 0:
        raise ValueError(f"seq_len {seq_len} must be whole numbers, none negative")
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            raise ValueError(f"the mask {name} of shape {tuple(mask.shape)} fits no parameter of this model")
    if strange := zeros.keys() - parameters.keys():
        raise ValueError(f"zeros of {min(strange)}, which is no parameter of this model")
    first = {p: name for name, p in parameters.items()}            # a tied parameter goes by its first name
    steps, layers, counted = int(lengths.sum()), {}, set()
    for path, module in model.named_modules():
        for own, p in module._parameters.items():
            name = f"{path}.{own}".lstrip(".")
            if p is None or include not in name or (weights_only and p.dim() < 2):
                continue
            mask, uses = masks.get(first[p]), steps * _uses(module, name, p, positions)
            n, k = p.numel(), p.numel() if mask is None else int(mask.sum())
            active = _active(p.shape, mask, zeros[name]) if name in zeros else k
            part = Counts(macs=n * uses, nonzero_macs=k * uses, active_macs=active * uses)
            if p not in counted:
                counted.add(p)
                part += Counts(params=n, nonzero_params=k, mask_bytes=0 if mask is None else -(-n // 8))
            layer = re.search(r"_(l\d+)(_reverse)?$", own) if getattr(module, "num_layers", 1) > 1 else None
            place = f"{path}.{layer[1]}".lstrip(".") if layer else path
            if place not in layers:
                values, operations = _beside_products(module, positions.get(f"{path}.weight".lstrip("."), 1))
                layers[place] = Counts(type(module).__name__, activations=steps * values,
                                       elementwise=steps * operations)
            layers[place] += part
    return replace(sum(layers.values(), Counts()), kind="", layers=layers)


def _uses(module: nn.Module, name: str, p: Tensor, positions: Mapping[str, int]) -> int:
    """MACs a step of each entry of a parameter."""
    if name in positions and not isinstance(module, NORMS):
        return positions[name]
    if not isinstance(module, KINDS):
        raise ValueError(f"{name}: a {type(module).__name__} is not known here; say in `positions` how many MACs a "
                         "step each entry of its parameters takes part in, such as 0")
    if p.dim() < 2 or isinstance(module, nn.Embedding):
        return 0
    if isinstance(module, CONVOLUTIONS):
        raise ValueError(f"{name}: say in `positions` at how many output positions a step uses its weights")
    return 1


def _active(shape: torch.Size, mask: Tensor | None, zeros: Tensor) -> float:
    """Live connections, each times the share of steps in which its input is not zero.

    mask: (S*rows, G), of this shape; zeros: (S, G), of each unit in each of the S stacks."""
    live = torch.ones(shape) if mask is None else mask.cpu()
    return float((live.view(len(zeros), -1, zeros.shape[1]).sum(1) * (1 - zeros)).sum())


def _beside_products(module: nn.Module, positions: int) -> tuple[int, int]:
    """(numbers that come out, element-wise operations) of one step of one layer; see the module's docstring."""
    D, H = 2 if getattr(module, "bidirectional", False) else 1, getattr(module, "hidden_size", 0)
    match module:
        case HLSTM():
            hidden = module.gate_layers * sum(module.widths)
            return D * (6 * H + hidden), D * (9 * H + hidden) + (H if D > 1 and module.merge == "sum" else 0)
        case nn.LSTM() | nn.LSTMCell():
            return D * (5 * H + (getattr(module, "proj_size", 0) or H)), D * 9 * H     # four gates, c; h
        case nn.GRU() | nn.GRUCell():
            return D * 4 * H, D * 8 * H                            # three gates, h
        case nn.RNN() | nn.RNNCell():
            return D * H, D * H
        case nn.Linear():
            return module.out_features, 0
        case nn.Embedding():
            return module.embedding_dim, 0
        case nn.Conv1d() | nn.Conv2d():
            return module.out_channels * positions, 0
        case nn.BatchNorm1d() | nn.BatchNorm2d():
            return module.num_features * positions, 2 * module.num_features * positions
    return 0, 0


def output_positions(model: nn.Module, *inputs: Tensor) -> dict[str, int]:
    """Output positions of each convolution and batch normalisation in a forward pass over `inputs` (batch of one):
    `positions` of `count`."""
    found = {}

    def look(path, module, args, kwargs, out):
        name = f"{path}.weight".lstrip(".")
        found[name] = found.get(name, 0) + out.numel() // len(module.weight)
    with _looking(model, CONVOLUTIONS + NORMS, look):
        model(*inputs)
    return found


class _Scans(TorchDispatchMode):
    """Keeps the hidden layers that each `scan` made, (layers, T, B, D*S*G), in the order of the calls."""

    def __init__(self):
        super().__init__()
        self.hidden = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.hlstm.scan.default:
            self.hidden.append(out[4])
        return out


def zero_shares(model: nn.Module, batches: Iterable[tuple]) -> dict[str, Tensor]:
    """How often each hidden unit in the gates of each `HLSTM` is exactly zero while `model` runs over `batches`.

    batches: the arguments of each call of the model. Returns, for the matrix that multiplies these units by its name
    (`weight_gate...`), shares between 0 and 1: (stacks, G). Steps that pad a sequence are left out. Raises ValueError
    where no `HLSTM` with hidden layers ran.
    """
    scans, zeros, frames = _Scans(), {}, {}

    def look(path, module, args, kwargs, out):
        lengths = kwargs.get("lengths", args[2] if len(args) > 2 else None)
        if isinstance(out[0], PackedSequence):
            lengths = pad_packed_sequence(out[0])[1]
        units = len(module.widths) * max(module.widths)            # of one direction; a scan holds one or both
        ways = [way for hidden in scans.hidden for way in hidden.chunk(hidden.shape[3] // units, 3)]
        suffixes = [suffix for k in range(module.num_layers) for suffix in module._suffixes(k)]
        for suffix, hidden in zip(suffixes, ways):
            alive = torch.ones(hidden.shape[1:3], dtype=torch.bool)
            if lengths is not None:
                alive = torch.arange(len(alive))[:, None] < torch.as_tensor(lengths).cpu()
            for j, layer in enumerate(hidden, 1):
                stacks = (layer.cpu()[alive] == 0).sum(0).view(len(module.widths), -1).double()
                found = {"": stacks}
                if module.uneven:                                  # filled up to the widest; a matrix for each gate
                    found = {f"_{gate}": stack[None, :G] for gate, stack, G in zip("ifgo", stacks, module.widths)}
                for gate, stack in found.items():
                    name = f"{path}.weight_gate{j}{gate}{suffix}".lstrip(".")
                    zeros[name] = zeros.get(name, 0) + stack
                    frames[name] = frames.get(name, 0) + int(alive.sum())
        scans.hidden.clear()
    with _looking(model, (HLSTM,), look), scans:
        for inputs in batches:
            model(*inputs)
    if not zeros:
        raise ValueError("no gate with hidden layers ran: the model has none, or there was no batch")
    return {name: zeros[name] / frames[name] for name in zeros}


@contextmanager
def _looking(model: nn.Module, kinds: tuple[type, ...], look: Callable) -> Iterator[None]:
    """Evaluation mode, no gradients, and `look(path, module, args, kwargs, out)` whenever a module of these kinds has
    run; afterwards all is as it was."""
    modes = {m: m.training for m in model.modules()}
    handles = [m.register_forward_hook(partial(look, path), with_kwargs=True) for path, m in model.named_modules()
               if isinstance(m, kinds)]
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for m, training in modes.items():
            m.training = training
        for handle in handles:
            handle.remove()
