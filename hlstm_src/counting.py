"""What a network costs, counted from its weights.

The rule: a weight of a recurrent or linear layer is one multiply-accumulate (MAC) a step, a weight of a convolution
one for each output position; FLOPs = 2 MACs. Biases and normalisation count as parameters, their additions not as
MACs (a thousandth of the whole here). "nonzero" counts live connections only, as a sparse engine would do the work.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from .masks import ConnectionMasks


@dataclass(frozen=True)
class Counts:
    """MACs and FLOPs per step (or for what `count` was asked); bytes with 4 a value, sparse ones with a bit mask."""
    params: int
    nonzero_params: int
    macs: int
    nonzero_macs: int
    flops: int
    nonzero_flops: int
    bytes_dense: int
    bytes_sparse: int

    def record(self) -> dict[str, int]:
        """The six keys of a run record."""
        return {k: v for k, v in asdict(self).items() if not k.startswith("bytes")}


def count(model: nn.Module, masks: ConnectionMasks | dict[str, Tensor] | None = None, seq_len: int = 1, *,
          include: str = "", weights_only: bool = False, positions: dict[str, int] | None = None) -> Counts:
    """Counts `model` over `seq_len` steps.

    masks: those of training, or name -> bool tensor; unmasked matrices count as dense. include: only parameters whose
    name holds this text. weights_only: matrices without biases and normalisation, as the paper's derived sizes are.
    positions: how often a step uses each weight of a parameter, where that is not once: a convolution's output
    positions. Raises ValueError for a convolution without `positions`, or masks that are not this model's.
    """
    masks = masks.masks if isinstance(masks, ConnectionMasks) else masks or {}
    convolutions, lookups = _weights_of(model, nn.Conv1d, nn.Conv2d), _weights_of(model, nn.Embedding)
    positions, sizes = positions or {}, {name: p.shape for name, p in model.named_parameters()}
    for name, mask in masks.items():
        if sizes.get(name) != mask.shape:
            raise ValueError(f"the mask {name} of shape {tuple(mask.shape)} fits no parameter of this model")
    params = live = macs = live_macs = packed = 0
    for name, p in model.named_parameters():
        if include not in name or (weights_only and p.dim() < 2):
            continue
        n = p.numel()
        k = int(masks[name].sum()) if name in masks else n
        params, live = params + n, live + k
        packed += 4 * k + (-(-n // 8) if name in masks else 0)
        if p.dim() >= 2 and name not in lookups:
            if name in convolutions and name not in positions:
                raise ValueError(f"{name}: say in `positions` at how many output positions a step uses its weights")
            uses = positions.get(name, 1) * seq_len
            macs, live_macs = macs + n * uses, live_macs + k * uses
    return Counts(params, live, macs, live_macs, 2 * macs, 2 * live_macs, 4 * params, packed)


def convolution_positions(model: nn.Module, *inputs: Tensor) -> dict[str, int]:
    """Output positions of each convolution in a forward pass over `inputs` (batch of one): `positions` of `count`."""
    found, hooks, modes = {}, [], {m: m.training for m in model.modules()}
    for name, m in _weights_of(model, nn.Conv1d, nn.Conv2d).items():
        def hook(module, args, out, name=name):
            found[name] = found.get(name, 0) + out[0, 0].numel()
        hooks.append(m.register_forward_hook(hook))
    try:
        with torch.no_grad():
            model.eval()(*inputs)
    finally:
        for m, training in modes.items():
            m.training = training
        for h in hooks:
            h.remove()
    return found


def _weights_of(model: nn.Module, *kinds: type) -> dict[str, nn.Module]:
    """Parameter name of the weight -> module, for the modules of these kinds, `model` itself included."""
    return {f"{name}.weight".lstrip("."): m for name, m in model.named_modules() if isinstance(m, kinds)}
