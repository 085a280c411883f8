"""The file of a compact model: one safetensors file, read without torch and without trust.

Of each tensor of the model the file holds one of
    NAME                    all its values
    NAME.mask + NAME.live   a bit for each entry (the first in the highest bit of a byte), and the live values in order
    NAME.gaps + NAME.live   a byte for each live entry: how many dormant ones precede it; 255: so many, and no entry yet
                            (so too behind the last, that the bytes account for all entries but fewer than 255)
with float32, float16 or int8 values; int8 comes with NAME.scale, a factor for each row. The header's metadata is one
JSON text under "json": format, kind, model (its sizes), provenance and whatever the kind needs. Format 1, which
training writes, is the same with masks and float16 only; so every model file of this project can be read here.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..errors import UserError
from ..files import missing, replacing

FORMAT = 2


class ModelFileError(UserError):
    """A model file cannot be used; the message names file, what is wrong, and the remedy."""


def write(path: str | Path, tensors: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray], metadata: Mapping,
          values: str = "fp16") -> int:
    """Writes a compact file atomically and returns its size in bytes.

    tensors by name; masks (bool) of those that are sparse; matrices are stored as `values` says (fp32, fp16, int8), the
    rest in float32. Raises ValueError for unknown `values`, or numbers that they cannot hold.
    """
    if values not in ("fp32", "fp16", "int8"):
        raise ValueError(f"values {values!r}: choose fp32, fp16 or int8")
    stored = {}
    for name, tensor in tensors.items():
        kept = np.asarray(tensor, np.float32)
        if name in masks:
            kept = np.where(masks[name], kept, np.float32(0))
        if not np.isfinite(kept).all():
            raise ValueError(f"{name} holds values that are not numbers")
        if kept.ndim >= 2 and values == "int8":
            rows = np.abs(kept).reshape(len(kept), -1).max(1)
            scale = np.where(rows > 1e-30, rows / 127, 1).astype(np.float32)
            stored[f"{name}.scale"] = scale
            kept = np.rint(kept / scale.reshape(-1, *[1] * (kept.ndim - 1))).astype(np.int8)
        elif kept.ndim >= 2 and values == "fp16":
            if np.abs(kept).max(initial=0) >= 65520:               # what rounds to infinity
                raise ValueError(f"{name} holds values that fp16 cannot")
            kept = kept.astype(np.float16)
        if name in masks:
            coded, bits = gaps(masks[name]), np.packbits(masks[name])
            stored |= {f"{name}.gaps": coded} if coded.nbytes < bits.nbytes else {f"{name}.mask": bits}
            stored[f"{name}.live"] = kept[masks[name]]
        else:
            stored[name] = np.ascontiguousarray(kept)
    data = save(stored, metadata={"json": json.dumps({"format": FORMAT, **metadata})})
    with replacing(path) as part:
        part.write_bytes(data)
    return len(data)


def gaps(mask: np.ndarray) -> np.ndarray:
    """Mask -> bytes: see above."""
    places = np.flatnonzero(mask)
    between = np.diff(places, prepend=-1) - 1
    jumps = between // 255
    tail = mask.size - (places[-1] + 1 if len(places) else 0)
    coded = np.full(len(between) + int(jumps.sum()) + tail // 255, 255, np.uint8)
    coded[np.arange(len(between)) + jumps.cumsum()] = between % 255
    return coded


def from_gaps(coded: np.ndarray, size: int) -> np.ndarray:
    """Bytes of `gaps` -> positions of the live entries. Raises ValueError if they do not account for `size`."""
    entry = coded < 255
    ends = np.cumsum(coded.astype(np.int64) + entry)
    if not 0 <= size - (ends[-1] if len(ends) else 0) < 255:
        raise ValueError(f"its gaps do not account for {size} entries")
    return ends[entry] - 1


class ModelFile:
    """An opened model file: `metadata`, and `tensor(name, shape)`. Raises ModelFileError for whatever is wrong."""

    def __init__(self, path: str | Path):
        self.path, self._used = Path(path), set()
        if not self.path.is_file():
            raise ModelFileError(missing(path))
        try:
            self._file = safe_open(self.path, framework="np")
            self.names = set(self._file.keys())
            self.metadata = json.loads((self._file.metadata() or {})["json"])
        except (SafetensorError, KeyError, ValueError, OSError, RecursionError) as error:
            raise self.error(f"damaged or not of this project ({error or type(error).__name__})") from None
        if not isinstance(self.metadata, dict):
            raise self.error("its metadata are no object")
        version = self.metadata.get("format")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise self.error(f"format {version!r} is unknown")
        if version > FORMAT:
            raise ModelFileError(f"{self.path}: format {version} is newer than this program, which knows {FORMAT}; "
                                 "update the program")

    def error(self, what: str) -> ModelFileError:
        what = "".join(c if c.isprintable() else "?" for c in what[:500])
        return ModelFileError(f"{self.path}: {what}; restore the file, or pack the model again")

    def afford(self, entries: int) -> None:
        """Refuses a model of so many entries that a file of this size could hardly mean it."""
        if entries > (1 << 20) + 128 * self.path.stat().st_size:
            raise self.error(f"a model of {entries} weights in {self.path.stat().st_size} bytes")

    def tensor(self, name: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray | None]:
        """(float32 values of that shape, their mask or None). Nothing is allocated before the sizes are checked."""
        size, form = math.prod(shape), next((f for f in (".mask", ".gaps", "") if name + f in self.names), None)
        if form is None:
            raise self.error(f"tensor {name} is missing")
        scale = None
        if name + ".scale" in self.names:
            scale = self._read(name + ".scale", (shape[0],), ("F32",)).reshape(-1, *[1] * (len(shape) - 1))
            if np.abs(scale).max(initial=0) > 1e36:
                raise self.error(f"tensor {name}.scale holds values beyond float32")
        if form == "":
            kinds = ("I8",) if scale is not None else ("F32", "F16")
            whole = self._read(name, shape, kinds).astype(np.float32)
            return (whole if scale is None else whole * scale), None
        coded = self._read(name + form, (-(-size // 8),) if form == ".mask" else None, ("U8",))
        try:
            places = np.flatnonzero(np.unpackbits(coded, count=size)) if form == ".mask" else from_gaps(coded, size)
        except ValueError as error:
            raise self.error(f"tensor {name}: {error}") from None
        live = self._read(name + ".live", (len(places),), ("I8",) if scale is not None else ("F32", "F16"))
        whole, mask = np.zeros(size, np.float32), np.zeros(size, bool)
        whole[places], mask[places] = live, True
        whole = whole.reshape(shape)
        return (whole if scale is None else whole * scale), mask.reshape(shape)

    def _read(self, name: str, shape: tuple[int, ...] | None, kinds: tuple[str, ...]) -> np.ndarray:
        """A stored tensor, once its type and shape are what they must be and its values are numbers."""
        if name not in self.names:
            raise self.error(f"tensor {name} is missing")
        part = self._file.get_slice(name)
        found, kind = tuple(part.get_shape()), part.get_dtype()
        if kind not in kinds or (found != shape if shape is not None else len(found) != 1):
            raise self.error(f"tensor {name} is {kind} {found}, not {' or '.join(kinds)} {shape or '(any)'}")
        values = self._file.get_tensor(name)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise self.error(f"tensor {name} holds values that are not numbers")
        self._used.add(name)
        return values

    def ignore(self, name: str) -> None:
        """Marks a tensor as known, though it is not needed."""
        self._used.add(name)

    def finish(self) -> None:
        """Raises ModelFileError if the file holds tensors that nobody asked for: then it is another model's."""
        rest = sorted(self.names - self._used)
        if rest:
            raise self.error(f"unknown tensors {', '.join(rest[:3])}")
