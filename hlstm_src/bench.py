"""Timings that mean something on a busy machine: all contestants take turns in one process, and ratios are reported.

A noisy neighbour slows all contestants of a round, so the ratio of two medians is steadier than either. It does not
slow them alike: who waits for memory suffers more than who works in the near cache. Quote what a quiet machine gave.
"""

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from . import records
from .files import replacing
from .growprune import Gradients
from .library import has_bfloat16
from .lstm import HLSTM, step
from .masks import ConnectionMasks
from .records import LatencyRow

SHAPES = [(150, 16, 512), (17, 64, 512), (150, 16, 800), (150, 16, 256)]       # T, B, H of speech and captions


def interleaved(cases: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """Median seconds of each case over `rounds`, in each of which all cases run once; one more round warms up.

    Every other round goes backwards, so that no case always follows the same one. Raises ValueError for no rounds.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: at least 1 is needed")
    seconds = {name: [] for name in cases}
    for r in range(rounds + 1):
        for name in list(cases)[::(-1) ** r]:
            start = time.perf_counter()
            cases[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


@contextmanager
def threads(n: int):
    """PyTorch computes with `n` threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rows_of(seconds: dict[str, float], case: str, n_threads: int, times: float = 1) -> list[LatencyRow]:
    """What `interleaved` found out, as rows of a record: one for each engine, which did the case so many times."""
    return [LatencyRow(engine=engine, threads=n_threads, case=case, microseconds=1e6 * s / times)
            for engine, s in seconds.items()]


def in_columns(lines: list[list[str]]) -> str:
    """Rows of cells, the headings first, as text: the first column flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]) for first, *rest in lines)


def ratios(rows: Iterable[LatencyRow], base: str, work: dict[tuple[str, str], float] | None = None) -> str:
    """A table of times as multiples of the engine `base`: a line for each case and number of threads.

    `work[engine, case]`, such as multiply-accumulates, makes it a comparison by unit of work. Raises ValueError if the
    base is missing from a line.
    """
    lines: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        lines.setdefault((row.case, row.threads), {})[row.engine] = row.microseconds
    others = [engine for engine in dict.fromkeys(e for line in lines.values() for e in line) if engine != base]
    text = [["case", "threads", f"{base} ms", *others]]
    for (case, n), line in lines.items():
        if base not in line:
            raise ValueError(f"{case}, {n} threads: no timing of {base!r} to compare with")
        unit = {e: line[e] / (1 if work is None else work[e, case]) for e in line}
        cells = [f"{unit[e] / unit[base]:.2f}" if e in line else "-" for e in others]
        text.append([case, str(n), f"{line[base] / 1000:.2f}", *cells])
    return in_columns(text)


def save(path: str | Path, name: str, rows: Iterable[LatencyRow], **more) -> None:
    """Writes the rows as JSON, all or nothing, with the machine and versions they come from; `more` is added as is."""
    origin = records.provenance("none", "none").model_dump(exclude={"started", "seconds"})    # `ended` is now
    data = {"bench": name, "latency": [row.model_dump() for row in rows], **more, "provenance": origin}
    with replacing(path) as part:
        part.write_text(f"{json.dumps(data, indent=1, allow_nan=False)}\n", encoding="utf-8")


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that tensors on the CPU take at any time while `run` runs, beyond what was there before.

    It counts what PyTorch allocates; the matrix library's own room, such as for packed weights, it does not see.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")                # the profiler would tell when it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0))


def start(code: str, *words: object) -> tuple[float, float]:
    """The quickest of three fresh processes that run Python code with such arguments: (seconds until it ends, peak MB).

    What numba compiles was compiled before, if only in the first of them. The peak is that of the new process's own
    memory, as Linux tells it; `getrusage` would count in that of the process which started it.
    """
    code, found = f"{code}\nprint(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])", []
    for _ in range(3):
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True,
                              check=True)
        found.append((time.perf_counter() - begun, int(done.stdout) / 1000))
    return min(found)


# The layer ------------------------------------------------------------------------------------------------------------

class PerStep(nn.Module):
    """The readable definition under autograd, with the weights of an `HLSTM` of one layer."""

    def __init__(self, layer: HLSTM, step: Callable = step):
        super().__init__()
        self.layer, self.step = layer, step

    def forward(self, x):
        zeros, ways = x.new_zeros(x.shape[1], self.layer.hidden_size), []
        for reverse in (False, True)[:self.layer.directions]:
            h, c, hs, w = zeros, zeros, [], self.layer.weights(0, reverse)
            for x_t in x.flip(0) if reverse else x:
                h, c = self.step(x_t, h, c, w)
                hs.append(h)
            ways.append(torch.stack(hs[::-1] if reverse else hs))
        return torch.cat(ways, dim=2)


def train_step(model: nn.Module, x: torch.Tensor, low: bool = False) -> None:
    """Forward and backward of `model` over x (T, B, I), in bfloat16 autocast if `low`."""
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        y = model(x)
    (y[0] if isinstance(y, tuple) else y).float().sum().backward()


def lows() -> tuple[bool, ...]:
    """Whether to multiply in bfloat16: both answers, where this processor can."""
    return (False, True) if has_bfloat16() else (False,)


def has_compiler() -> bool:
    """Whether there is the C++ compiler that `torch.compile` calls."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def layer(shapes=SHAPES, n_threads: Iterable[int] = (1, 2), rounds: int = 5, compiled: bool = False, only: str = ""):
    """Forward and backward of one H-LSTM layer as wide as its input, one gate layer of that width, and its rivals.

    Returns rows of times, multiply-accumulates by engine and case, and peak bytes by engine and case. `compiled` adds
    `torch.compile` of the readable step, which takes a C++ compiler and some compilation; without one it warns. `only`
    chooses the cases that have this in their names; ValueError if none has.
    """
    if compiled and not has_compiler():
        warnings.warn("no C++ compiler, so no compiled step: install g++, or name another in the variable CXX",
                      stacklevel=2)
        compiled = False
    rows, work, memory = [], {}, {}
    for n, (T, B, H), low, D in itertools.product(n_threads, shapes, lows(), (1, 2)):
        if D == 2 and (T, B, H) != shapes[0]:                      # both directions at one shape only
            continue
        case = f"T{T} B{B} H{H}{' two ways' if D == 2 else ''} {'bf16' if low else 'float32'}"
        if only not in case:
            continue
        x = torch.randn(T, B, H, requires_grad=True)
        ours = HLSTM(H, H, bidirectional=D == 2)
        models = {"nn.LSTM": nn.LSTM(H, H, bidirectional=D == 2), "HLSTM": ours, "per step": PerStep(ours)}
        if compiled:
            torch.compiler.reset()                                 # only so many shapes of a function are compiled
            models["compiled step"] = PerStep(ours, torch.compile(step, dynamic=False))
        runs = {name: partial(train_step, model, x, low) for name, model in models.items()}
        with threads(n):
            rows += rows_of(interleaved(runs, rounds), case, n)
        for name, model in models.items():                         # each entry of a matrix is used once a step
            work[name, case] = T * B * sum(p.numel() for p in model.parameters() if p.dim() == 2)
            if (name, case) not in memory:
                memory[name, case] = peak_bytes(runs[name])
    if not rows:
        raise ValueError(f"no case has {only!r} in its name; they are called such as {case!r}")
    return rows, work, memory


def memory_table(memory: dict[tuple[str, str], int]) -> str:
    """Peak memory in MB, a line for each case."""
    engines, cases = (list(dict.fromkeys(key[k] for key in memory)) for k in (0, 1))
    return in_columns([["case", *engines],
                       *([case, *(f"{memory[e, case] / 1e6:.1f}" for e in engines)] for case in cases)])


# Masks ----------------------------------------------------------------------------------------------------------------

class Training:
    """A training step of an H-LSTM as wide as its input: forward, backward, clipping, AdamW; with masks if asked for,
    and with the gradients of a growth phase."""

    def __init__(self, x: torch.Tensor, masked: bool = False, growing: bool = False, low: bool = False,
                 fused: bool = True):
        self.x, self.low, self.gradients = x, low, Gradients() if growing else None
        self.model = HLSTM(x.shape[2], x.shape[2])
        self.optimiser = torch.optim.AdamW(self.model.parameters(), fused=fused)
        self.masks = ConnectionMasks(self.model, "weight_*", density=0.5) if masked else None
        if masked:
            self.masks.attach(self.optimiser)

    def step(self) -> None:
        self.optimiser.zero_grad()
        train_step(self.model, self.x, self.low)
        self.extra()
        nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.optimiser.step()

    def extra(self) -> None:
        """What masks and growth add to a step."""
        if self.gradients is not None:
            self.gradients.collect(self.masks)
        if self.masks is not None:
            self.masks.mask_gradients_()

    def copies(self) -> tuple[float, float]:
        """Bytes of the masks and of the accumulated gradients, in copies of the masked weights."""
        weights = sum(p.nbytes for p in self.masks.parameters.values())
        sums = self.gradients.sums.values() if self.gradients is not None else ()
        return sum(m.nbytes for m in self.masks.masks.values()) / weights, sum(t.nbytes for t in sums) / weights


def masks(shapes=((17, 64, 512), (150, 16, 256)), n_threads: Iterable[int] = (1, 2), rounds: int = 9):
    """A training step without masks, with them, and with growth; and what these add, timed alone.

    All with the fused AdamW; the first shape also with the plain one, whose square roots are slow at exact zeros.
    Returns rows and the copies of the masked weights that the masks and the accumulated gradients take.
    """
    rows, copies = [], (0.0, 0.0)
    cases = [(shape, low, fused) for shape in shapes for low in lows() for fused in (True, False)
             if fused or shape == shapes[0]]
    for n in n_threads:
        for (T, B, H), low, fused in cases:
            x = torch.randn(T, B, H)
            dense, masked, growing = (Training(x, *options, low=low, fused=fused)
                                      for options in ((), (True,), (True, True)))
            with threads(n):
                seconds = interleaved({"dense": dense.step, "masks": masked.step, "growth": growing.step,
                                       "masks alone": masked.extra, "growth alone": growing.extra}, rounds)
            case = f"T{T} B{B} H{H} {'bf16' if low else 'float32'}{'' if fused else ' plain AdamW'}"
            rows += rows_of(seconds, case, n)
            copies = growing.copies()
    return rows, copies
