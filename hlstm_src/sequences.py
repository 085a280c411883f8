"""Sequences of unequal lengths in one batch: x (T, B, ...), of which each ends at its own step and is padded behind it.

lengths: steps of each sequence (B), on the device of x; None where all have T.
"""

import torch
from torch import Tensor


def flip(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Reverses x (T, B, ...) in time, each sequence within its own length; padding stays where it is."""
    if lengths is None:
        return x.flip(0)
    t = torch.arange(x.shape[0], device=x.device)[:, None]
    index = torch.where(t < lengths, lengths - 1 - t, t)           # (T, B)
    return x.gather(0, index.view(*index.shape, *[1] * (x.dim() - 2)).expand_as(x))


def alive(x: Tensor, lengths: Tensor) -> Tensor:
    """x (T, B, ...) -> (T, B, 1), True within each sequence."""
    return (torch.arange(x.shape[0], device=x.device)[:, None] < lengths)[..., None]


def at_end(s: Tensor, lengths: Tensor | None) -> Tensor:
    """s (T, B, H) -> (B, H) at each sequence's last step."""
    return s[-1] if lengths is None else s[lengths - 1, torch.arange(s.shape[1], device=s.device)]
