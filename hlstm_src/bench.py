"""Timings that mean something on a busy machine: all contestants take turns in one process, and ratios are reported.

A noisy neighbour slows every contestant of a round alike, so the ratio of two medians is far steadier than either.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from . import records
from .lstm import HLSTM, unroll
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


def rows_of(seconds: dict[str, float], case: str, n_threads: int) -> list[LatencyRow]:
    """What `interleaved` found out, as rows of a record: one for each engine."""
    return [LatencyRow(engine=engine, threads=n_threads, case=case, microseconds=1e6 * s)
            for engine, s in seconds.items()]


def ratios(rows: Iterable[LatencyRow], base: str, work: dict[tuple[str, str], float] | None = None) -> str:
    """A table of times as multiples of the engine `base`: a line for each case and number of threads.

    `work[engine, case]`, such as multiply-accumulates, makes it a comparison by unit of work. Raises ValueError if the
    base is missing from a line.
    """
    lines: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        lines.setdefault((row.case, row.threads), {})[row.engine] = row.microseconds
    engines = list(dict.fromkeys(engine for line in lines.values() for engine in line))
    wide = max([len(case) for case, _ in lines] + [4])
    heads = [f"{base} ms", *(e for e in engines if e != base)]
    text = [f"{'case':{wide}}  threads  " + "  ".join(f"{head:>8}" for head in heads)]
    for (case, n), line in lines.items():
        if base not in line:
            raise ValueError(f"{case}, {n} threads: no timing of {base!r} to compare with")
        cells = [f"{line[base] / 1000:{max(8, len(heads[0]))}.2f}"]
        for engine in heads[1:]:
            if engine in line:
                share = 1.0 if work is None else work[base, case] / work[engine, case]
                cells.append(f"{line[engine] / line[base] * share:{max(8, len(engine))}.2f}")
            else:
                cells.append(f"{'-':>{max(8, len(engine))}}")
        text.append(f"{case:{wide}}  {n:7}  " + "  ".join(cells))
    return "\n".join(text)


def save(path: str | Path, name: str, rows: Iterable[LatencyRow], **more) -> None:
    """Writes the rows as JSON, all or nothing, with the machine and versions they come from; `more` is added as is."""
    origin = records.provenance("none", "none").model_dump()
    data = {"bench": name, "latency": [row.model_dump() for row in rows], **more, "provenance": origin}
    records.write_atomic(path, f"{json.dumps(data, indent=1, allow_nan=False)}\n".encode())


# The layer ------------------------------------------------------------------------------------------------------------

class PerStep(nn.Module):
    """The readable definition, `unroll`, under autograd, with the weights of an `HLSTM` of one layer."""

    def __init__(self, layer: HLSTM):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        zeros = x.new_zeros(x.shape[1], self.layer.hidden_size)
        ways = [unroll(x.flip(0) if d else x, zeros, zeros, self.layer.weights(0, bool(d)))[0]
                for d in range(self.layer.directions)]
        return torch.cat([way.flip(0) if d else way for d, way in enumerate(ways)], dim=2)


def train_step(model: nn.Module, x: torch.Tensor, low: bool = False) -> None:
    """Forward and backward of `model` over x (T, B, I), in bfloat16 autocast if `low`."""
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        y = model(x)
    (y[0] if isinstance(y, tuple) else y).float().sum().backward()


def layer(shapes=SHAPES, n_threads: Iterable[int] = (1, 2), rounds: int = 5):
    """Forward and backward of one layer as wide as its input: rows, and multiply-accumulates by engine and case."""
    rows, work = [], {}
    for n in n_threads:
        for (T, B, H), directions, low in ((s, d, low) for s in shapes for low in (False, True) for d in (1, 2)):
            if directions == 2 and (T, B, H) != shapes[0]:
                continue
            case = f"T{T} B{B} H{H}{' two ways' if directions == 2 else ''} {'bf16' if low else 'float32'}"
            x = torch.randn(T, B, H, requires_grad=True)
            ours = HLSTM(H, H, bidirectional=directions == 2)
            models = {"nn.LSTM": nn.LSTM(H, H, bidirectional=directions == 2), "HLSTM": ours, "per step": PerStep(ours)}
            with threads(n):
                seconds = interleaved({name: partial(train_step, model, x, low) for name, model in models.items()},
                                      rounds)
            rows += rows_of(seconds, case, n)
            for name, model in models.items():                     # each entry of a matrix is used once a step
                work[name, case] = T * B * sum(p.numel() for p in model.parameters() if p.dim() == 2)
    return rows, work
