"""Which connections are alive.

`ConnectionMasks` holds one boolean mask for each chosen weight matrix of any module. A dormant connection keeps a
weight, gradient and optimiser moments of exactly zero, so a network with masks is a sparse network stored densely;
when a connection wakes it starts fresh. The file functions at the end store only what lives.
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import missing, replacing
from .lstm import diagonals

WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}           # by the bytes of a number


class ConnectionMasks:
    """Masks over the weight matrices of `module` (parameters of two or more dimensions) whose names match `include`.

    Args:
        module: any module, already on its device; its parameters stay where they are.
        include: one shell pattern or several ("rnn.*weight_*").
        density: share of live connections, in (0, 1]: one number, or one for each pattern, {"*_hh_*": 0.2, "*": 0.5},
            of which the first that matches a name counts. Below 1 the diagonal lives, so that every row and every
            column keeps at least one and no neuron is left unconnected; the others are drawn at random (paper: sparse
            seed). Where a parameter stacks matrices with inputs of their own (`HLSTM.blocks_in`), each has a diagonal.
        generator: torch.Generator for that draw.
        allocation: "uniform": each matrix has its density; "erdos-renyi-kernel": as many connections in all, but
            each matrix as many as its dimensions sum to, times a constant, so that small ones are denser (Evci et
            al., 2020). See `allocate`.
    Raises ValueError where a pattern matches nothing, a density is missing or out of range, the allocation is unknown,
    or a matrix holds no real numbers of 2, 4 or 8 bytes.
    """

    def __init__(self, module: nn.Module, include: str | tuple[str, ...] = "*",
                 density: float | Mapping[str, float] = 1.0, generator: torch.Generator | None = None, *,
                 allocation: str = "uniform"):
        patterns = (include,) if isinstance(include, str) else tuple(include)
        matrices = {name: p for name, p in module.named_parameters() if p.dim() >= 2}       # tied ones by one name
        self.parameters = {name: p for name, p in matrices.items() if any(fnmatch(name, each) for each in patterns)}
        if not self.parameters:
            raise ValueError(f"no weight matrix matches {patterns}; there are: {', '.join(matrices)}"
                             + " (one that goes by several names is listed by the first)")
        for name, p in self.parameters.items():
            if not p.is_floating_point() or p.element_size() not in WHOLE:
                raise ValueError(f"{name} is {p.dtype}: masks are for real numbers of 2, 4 or 8 bytes; leave it out")
        self.module, self.optimisers = module, []
        for pattern in [*patterns, *(density if isinstance(density, Mapping) else ())]:
            if not any(fnmatch(name, pattern) for name in self.parameters):
                raise ValueError(f"pattern {pattern!r} matches none of {', '.join(self.parameters)}")
        self.blocks = blocks_of(module)
        live = allocate({name: p.shape for name, p in self.parameters.items()}, density, allocation, self.blocks)
        self.masks = {name: scattered(p.shape, live[name], generator, self.blocks.get(name, 1)).to(p.device)
                      for name, p in self.parameters.items()}
        self.apply_()

    @torch.no_grad()
    def rescale_(self) -> None:
        """Divides the live weights of each matrix by the root of its density: what a neuron receives then varies as
        much as in the dense network that the initial weights were drawn for. Call once, on a fresh sparse seed."""
        for name, p in self.parameters.items():
            p.div_(self.density(name) ** 0.5)

    def attach(self, optimiser: torch.optim.Optimizer) -> None:
        """From now on `apply_` also clears the optimiser's moments of dormant connections.

        Attach every optimiser that has some of the matrices. One that has a matrix of an earlier one takes its place.
        Raises ValueError for torch.optim.Muon and LBFGS, whose steps mix the entries of a matrix, so that dormant
        weights would move, for an `eps` that is zero in the weights' type, which would make dormant weights 0 / 0, and
        for an optimiser of other parameters.
        """
        inner = getattr(optimiser, "optimizer", optimiser)
        mixing = tuple(getattr(torch.optim, name) for name in ("Muon", "LBFGS") if hasattr(torch.optim, name))
        if isinstance(inner, mixing):
            raise ValueError(f"{type(inner).__name__} mixes the entries of a matrix, and so moves dormant weights; "
                             "choose another optimiser, such as AdamW")
        def own(one) -> set[int]:
            theirs = {id(p) for group in one.param_groups for p in group["params"]}
            return {id(p) for p in self.parameters.values()} & theirs
        if not own(optimiser):
            raise ValueError("the optimiser has none of the masked parameters; make it of this module's")
        for group in optimiser.param_groups:
            eps = None if group.get("fused") else group.get("eps")             # fused ones compute in float32
            for kind in {p.dtype for p in group["params"]}:
                if eps and not torch.tensor(eps, dtype=kind):
                    raise ValueError(f"eps={eps} of {type(inner).__name__} is zero in {kind}, and dormant weights "
                                     "would become 0 / 0; choose a larger one, such as 1e-4")
        self.optimisers = [one for one in self.optimisers if not own(one) & own(optimiser)] + [optimiser]

    def gradient(self, name: str) -> Tensor | None:
        """The gradient of one matrix, None where there is none. Raises ValueError if it is sparse."""
        g = self.parameters[name].grad
        if g is not None and g.layout is not torch.strided:
            raise ValueError(f"{name}: its gradient is sparse, which masks cannot keep; make it with sparse=False")
        return g

    @torch.no_grad()
    def apply_(self, *names: str) -> None:
        """Sets weight, gradient and optimiser moments of every dormant connection (of these matrices) to zero."""
        for name in names or self.masks:
            for tensor in self._tensors(name):
                keep_(tensor, self.masks[name])

    def _tensors(self, name: str) -> list[Tensor]:
        """Weight, gradient and optimiser moments of one matrix, as far as there are any."""
        p = self.parameters[name]
        moments = [t for optimiser in self.optimisers for t in optimiser.state.get(p, {}).values()]
        return [t for t in [p, self.gradient(name), *moments] if isinstance(t, Tensor) and t.shape == p.shape]

    @torch.no_grad()
    def wake_(self, name: str, new: Tensor, first: Tensor | None = None) -> int:
        """Wakes the connections of one matrix where `new` (bool, shaped as it) is True; returns how many.

        Their weights start at zero or at `first` (one value for each, in order); nothing is left of an earlier life,
        and the optimiser begins anew with the matrix. Raises ValueError if `new` has another shape.
        """
        if new.shape != self.masks[name].shape:
            raise ValueError(f"{name} is {tuple(self.masks[name].shape)}, the mask of newcomers {tuple(new.shape)}")
        self.masks[name] |= new
        for tensor in self._tensors(name):
            keep_(tensor, ~new)
        if first is not None:
            self.parameters[name][new] = first.to(self.parameters[name].dtype)
        if new.any():
            self.restart_(name)
        return int(new.sum())

    @torch.no_grad()
    def restart_(self, name: str | None = None) -> None:
        """Lets the optimiser begin anew with one matrix, or with every parameter: it forgets all moments, and Adam's
        count of steps.

        Zero moments under an old count are a trap: Adam would take the young average of squares for a settled one and
        move a woken connection by several times the learning rate, for hundreds of steps.
        """
        for optimiser in self.optimisers:
            state, fused = optimiser.state, any(group.get("fused") for group in optimiser.param_groups)
            for moments in state.values() if name is None else [state.get(self.parameters[name], {})]:
                if fused and moments.get("momentum_buffer") is not None:           # SGD's, of all parameters or none
                    moments["momentum_buffer"].zero_()
                else:
                    moments.clear()

    @torch.no_grad()
    def mask_gradients_(self) -> None:
        """Zeroes the gradients of dormant connections: call after `backward`, before clipping and the step.

        That is all a step needs: with gradient, moments and weight at zero, no optimiser here moves a dormant weight.
        """
        for name, mask in self.masks.items():
            if (g := self.gradient(name)) is not None:
                keep_(g, mask)

    def count(self) -> tuple[int, int]:
        """(live, all) connections."""
        return sum(int(m.sum()) for m in self.masks.values()), sum(m.numel() for m in self.masks.values())

    def density(self, name: str | None = None) -> float:
        """Live share of one matrix, or of all together."""
        if name is not None:
            return int(self.masks[name].sum()) / self.masks[name].numel()
        live, total = self.count()
        return live / total

    def state_dict(self) -> dict[str, Tensor]:
        """Name -> mask, eight connections a byte."""
        return {name: pack_bits(mask) for name, mask in self.masks.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes masks from `state_dict` and applies them. Raises ValueError if names or sizes differ; the shape itself
        is not in the state. The optimiser's moments are the caller's matter: see `restart_`."""
        if state.keys() != self.masks.keys():
            raise ValueError(f"masks for {sorted(state)} do not fit a module with {sorted(self.masks)}")
        found = {}
        for name, mask in self.masks.items():
            try:
                found[name] = unpack_bits(state[name], mask.shape).to(mask.device)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        self.masks = found
        self.apply_()


def blocks_of(module: nn.Module) -> dict[str, int]:
    """Name -> how many matrices with inputs of their own a parameter stacks, as modules with `blocks_in` say."""
    found = {}
    for path, part in module.named_modules():
        if hasattr(part, "blocks_in"):
            own = {name: name for name in part._parameters}
            for name, moved in getattr(part, "parametrizations", {}).items():      # as torch.nn.utils calls them
                own |= {f"parametrizations.{name}.{of}": name for of, _ in moved.named_parameters(recurse=False)}
            found |= {f"{path}.{name}".lstrip("."): part.blocks_in(of) for name, of in own.items()}
    return found


def live_count(shape: torch.Size, density: float, blocks: int = 1) -> int:
    """Live connections of a matrix at that density: round(density * size), but enough to meet each row and column, of
    each of the `blocks` that it stacks."""
    rows, columns = shape[0], int(np.prod(shape[1:]))
    return max(round(density * rows * columns), rows, blocks * columns)


def density_of(name: str, density: float | Mapping[str, float]) -> float | None:
    """One number for all, or that of the first pattern which matches the name; None where none does."""
    if isinstance(density, Mapping):
        return next((d for pattern, d in density.items() if fnmatch(name, pattern)), None)
    return density


def allocate(shapes: Mapping[str, torch.Size], density: float | Mapping[str, float],
             allocation: str = "uniform", blocks: Mapping[str, int] = MappingProxyType({})) -> dict[str, int]:
    """Name -> live connections, for matrices of these shapes (see `ConnectionMasks`).

    "uniform" is `live_count` of each. "erdos-renyi-kernel" shares out the sum of these, exactly, in proportion to
    the sums of the dimensions: not more than a matrix has, not less than meets each row and column.
    """
    densities = {name: density_of(name, density) for name in shapes}
    for name, d in densities.items():
        if d is None or not 0 < d <= 1:
            raise ValueError(f"no density is given for {name}" if d is None else
                             f"density {d} of {name} must lie in (0, 1]")
    live = {name: live_count(shape, densities[name], blocks.get(name, 1)) for name, shape in shapes.items()}
    if allocation == "uniform":
        return live
    if allocation != "erdos-renyi-kernel":
        raise ValueError(f"allocation={allocation!r}: choose 'uniform' or 'erdos-renyi-kernel'")
    share = np.array([sum(shape) for shape in shapes.values()])
    least = np.array([live_count(shape, 0, blocks.get(name, 1)) for name, shape in shapes.items()])
    most = np.array([int(np.prod(shape)) for shape in shapes.values()])
    low, high, total = 0.0, float(most.max()), sum(live.values())
    for _ in range(100):                                           # the constant, by halving
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(middle * share, least, most).sum() <= total else (low, middle)
    wanted = np.clip(low * share, least, most)
    counts = wanted.astype(int)
    for k in np.argsort(counts - wanted, kind="stable")[:total - counts.sum()]:    # largest remainders first
        counts[k] += 1
    return dict(zip(shapes, counts.tolist()))


def scattered(shape: torch.Size, live: int, generator: torch.Generator | None = None, blocks: int = 1) -> Tensor:
    """A boolean mask with so many live entries: the diagonal, which meets each row and column (of each block), and
    others at random."""
    rows, columns = shape[0], int(np.prod(shape[1:]))
    if live == rows * columns:
        return torch.ones(shape, dtype=torch.bool)
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    mask[diagonals(shape, blocks)] = True                          # in every seed: an H-LSTM starts with ones there
    missing = live - int(mask.sum())
    if missing > 0:
        dormant = (~mask).flatten().nonzero().squeeze(1)
        mask.view(-1)[dormant[torch.randperm(len(dormant), generator=generator)[:missing]]] = True
    return mask.view(shape)


def keep_(tensor: Tensor, mask: Tensor) -> None:
    """Sets `tensor` to zero where the boolean `mask` is False.

    The bits of each number times one or zero: so infinity and NaN become zero too, nothing is allocated, and it
    takes a small part of the time of `masked_fill_`, which a random mask slows down.
    """
    tensor.view(WHOLE[tensor.element_size()]).mul_(mask.view(torch.int8))


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state, for its `load_state_dict` later."""
    return {name: t.detach().clone() if isinstance(t, Tensor) else deepcopy(t)
            for name, t in module.state_dict().items()}


def random_scores(like: Tensor, generator: torch.Generator) -> Tensor:
    """Scores in [0, 1), shaped as `like`, drawn on the CPU so that every device gets the same."""
    return torch.rand(like.shape, generator=generator).to(like.device)


def seeded(seed: int, epoch: int) -> torch.Generator:
    """The generator of what an epoch draws: seed and epoch are all of its state, so a resumed run draws the same."""
    return torch.Generator().manual_seed(1_000_003 * int(seed) + epoch)


def pack_bits(mask: Tensor) -> Tensor:
    """Boolean mask -> bytes, first entry in the highest bit."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def unpack_bits(packed: Tensor, shape: torch.Size) -> Tensor:
    """Bytes -> boolean mask of that shape. Raises ValueError if the number of bytes is wrong."""
    size = int(np.prod(shape))
    if packed.dtype != torch.uint8 or packed.numel() != -(-size // 8):
        raise ValueError(f"a mask of shape {tuple(shape)} takes {-(-size // 8)} bytes, not {packed.numel()}")
    return torch.from_numpy(np.unpackbits(packed.cpu().numpy(), count=size)).bool().view(shape)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict) -> None:
    """Writes a safetensors file atomically, with `metadata` as JSON in its header. What shares memory, such as the
    matrix of two tied layers, is written under each of its names. Raises OSError, also where the disk is full."""
    apart, seen = {}, set()
    for name, t in tensors.items():
        t = t.detach().cpu().contiguous()
        apart[name] = t.clone() if t.untyped_storage().data_ptr() in seen else t
        seen.add(t.untyped_storage().data_ptr())
    with replacing(path) as part:
        try:
            save_file(apart, part, metadata={"json": json.dumps(metadata)})
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from None


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Reads what `save_tensors` wrote. Raises FileNotFoundError, or ValueError that names a file which is damaged."""
    if not Path(path).is_file():
        raise FileNotFoundError(missing(path))
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("json", "null"))
            if not isinstance(metadata, dict):
                raise ValueError("without this project's metadata")
            return {name: file.get_tensor(name) for name in file.keys()}, metadata
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged or not of this project ({error}); restore it or run again") from None


def save_model(path: Path, module: nn.Module, masks: ConnectionMasks | None, metadata: dict) -> None:
    """Stores a trained module: matrices in float16, of masked ones a bit mask and the live values; the rest as is.

    Written atomically. Raises ValueError if a matrix holds values that float16 cannot (infinite, or beyond 65504), or
    if there are masks of matrices that the module lacks, such as those of a part of it.
    """
    tensors, shapes = {}, {name: t.shape for name, t in module.state_dict().items() if isinstance(t, Tensor)}
    for name, mask in masks.masks.items() if masks is not None else ():
        if shapes.get(name) != mask.shape:
            raise ValueError(f"{path}: masks of {name}, {tuple(mask.shape)}, which the module lacks; make them of the "
                             "whole module")
    for name, tensor in module.state_dict().items():
        if tensor.dim() >= 2 and tensor.is_floating_point():
            tensor = tensor.half()
            if not tensor.isfinite().all():
                raise ValueError(f"{path}: {name} holds values that float16 cannot; train at a lower learning rate")
        if masks is not None and name in masks.masks:
            tensors[f"{name}.mask"] = pack_bits(masks.masks[name])
            tensors[f"{name}.live"] = tensor[masks.masks[name]]
        else:
            tensors[name] = tensor
    save_tensors(path, tensors, metadata)


def load_model(path: Path, module: nn.Module) -> dict[str, Tensor]:
    """Fills `module` from a file of `save_model` and returns its masks (name -> bool tensor, empty if dense).

    Raises ValueError naming the file and the tensor that does not fit.
    """
    tensors, _ = load_tensors(path)
    state, masks = {}, {}
    for name, like in module.state_dict().items():
        try:
            if f"{name}.mask" in tensors:
                mask = masks[name] = unpack_bits(tensors.pop(f"{name}.mask"), like.shape)
                live = tensors.pop(f"{name}.live")
                if live.numel() != int(mask.sum()):
                    raise ValueError(f"{live.numel()} values for {int(mask.sum())} live connections")
                state[name] = torch.zeros(like.shape, dtype=like.dtype)
                state[name][mask] = live.to(like.dtype)
            else:
                state[name] = tensors.pop(name).to(like.dtype)
            if state[name].shape != like.shape:
                raise ValueError(f"shape {tuple(state[name].shape)} instead of {tuple(like.shape)}")
        except (KeyError, ValueError) as error:
            told = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}: tensor {name}: {told}; the file belongs to another model") from None
    if tensors:
        raise ValueError(f"{path}: unknown tensors {sorted(tensors)[:3]}; the file belongs to another model")
    module.load_state_dict(state)
    return masks
