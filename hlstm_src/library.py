"""Products by PyTorch's matrix library, for `scan` (scan.py): there, back, and the gradient of a weight.

A matrix is in blocks of rows, one for each group of columns of x: a block-diagonal matrix whose zeros are left out.
large.py has the same products by our own hand.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PACK_FROM = 2 ** 18, 4      # entries of a matrix and products with it from which on packing pays


def product(weight: Tensor, groups: int, rows: int, calls: int, bias: Tensor | None = None) -> Callable:
    """A function x (rows, groups*K) -> (rows, R) for weight (R, K) in `groups` blocks of rows: block k of x times the
    transpose of block k, plus bias (R). It expects to be called about `calls` times with about so many rows."""
    R, K = weight.shape
    if weight.numel() >= PACK_FROM[0] and calls >= PACK_FROM[1] and _can_pack(weight):
        if groups == 1:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
            return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        # A convolution of 1x1 pixels in groups, over an image of `rows` pixels, is this very product, and it takes
        # packed weights.
        how = [0, 0], [1, 1], [1, 1], groups
        packed = torch.ops.mkldnn._reorder_convolution_weight(
            weight[..., None, None].contiguous(memory_format=torch.channels_last), *how, [1, groups * K, 1, rows])

        def convolve(x):
            image = x.view(1, 1, -1, groups * K).permute(0, 3, 1, 2)
            y = torch.ops.mkldnn._convolution_pointwise(image, packed, bias, *how, "none", [], "")
            return y.permute(0, 2, 3, 1).reshape(-1, R)
        return convolve
    if groups == 1:
        return lambda x: F.linear(x, weight, bias)
    blocks = weight.view(groups, -1, K).mT.contiguous()            # (groups, K, R/groups)

    def multiply(x):
        y = torch.bmm(x.view(-1, groups, K).transpose(0, 1), blocks).transpose(0, 1).reshape(-1, R).contiguous()
        return y if bias is None else y + bias
    return multiply


def has_bfloat16() -> bool:
    """Whether this CPU can multiply in bfloat16: it takes an instruction set that older ones lack, and on these PyTorch
    is slow in it and has no LSTM."""
    return hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported") and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def as_array(s: Tensor) -> np.ndarray:
    """s as an array of the same memory; bfloat16, which NumPy does not know, as its bits."""
    return (s.view(torch.uint16) if s.dtype == torch.bfloat16 else s).numpy()


def _can_pack(weight: Tensor) -> bool:
    """Whether this build and this CPU have packed products for the weight; they are not PyTorch's public ones."""
    ops = "_reorder_linear_weight", "_linear_pointwise", "_reorder_convolution_weight", "_convolution_pointwise"
    return (weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
            and all(hasattr(torch.ops.mkldnn, op) for op in ops)
            and (weight.dtype == torch.float32 or weight.dtype == torch.bfloat16 and has_bfloat16()))


class AtOnce:
    """The products of a way back, as they are asked for; `large.Later` puts them off until `now`."""

    @staticmethod
    def back(weight: Tensor, groups: int) -> Callable:
        """The way back of `product`, of many rows at a time and so without packing: d (T, B, R) -> out
        (T, B, groups*K)."""
        multiply = back(weight, groups, 0, 1)

        def into(d: Tensor, out: Tensor) -> None:
            out.copy_(multiply(d.flatten(0, 1)).view(out.shape))
        return into

    @staticmethod
    def add_outer(total: Tensor, d: Tensor, a: Tensor, groups: int, more: bool) -> None:
        """The gradient of `product`'s weight -> total (R, K), or with `more` added to it: d (T, B, R) by a
        (T, B, groups*K), over T and B."""
        for out, rows, columns in zip(total.chunk(groups),
                                      *(s.flatten(0, 1).chunk(groups, 1) for s in (d, a.to(d.dtype)))):
            if out.dtype == d.dtype:
                out.addmm_(rows.mT, columns, beta=int(more))       # by 0: what was there is not read
            else:
                product = rows.mT @ columns
                out.add_(product) if more else out.copy_(product)

    @staticmethod
    def add_rows(total: Tensor, d: Tensor) -> None:
        """Adds to total (R) the sum of d (T, B, R) over T and B."""
        total += d.sum((0, 1))

    @staticmethod
    def now() -> None:
        pass


def back(weight: Tensor, groups: int, rows: int, calls: int) -> Callable:
    """The way back of `product`: d (rows, R) -> (rows, groups*K), block by block times the block itself."""
    R, K = weight.shape
    return product(weight.view(groups, R // groups, K).mT.reshape(groups * K, R // groups), groups, rows, calls)
