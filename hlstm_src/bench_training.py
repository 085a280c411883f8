"""A training step of the recognisers: how long it takes in either precision, and which part of it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from . import experiments
from .bench import in_columns, interleaved, rows_of
from .deepspeech2 import ctc_loss
from .library import has_bfloat16
from .records import LatencyRow
from .tables import Table
from .training import PRECISIONS, Trainer

NAMES = "ds2-lstm5", "ds2-hlstm3", "ds2-hlstm3-gp"
WHOLE = "whole step"


def spread_out(batches: Sequence, count: int) -> list:
    """So many of the batches, evenly spread, none twice."""
    count = min(count, len(batches))
    return [batches[(2 * k + 1) * len(batches) // (2 * count)] for k in range(count)]


def training(names: Sequence[str] = NAMES, profile: str = "laptop", precisions: Sequence[str] = (),
             batches: int = 4, rounds: int = 3) -> tuple[list[LatencyRow], dict[str, int]]:
    """Times the whole training step and each of its parts alone, over batches from short utterances to long ones.

    Returns (microseconds a step, by the engine "NAME PRECISION" and the case, which is a part or "whole step";
    {"batch": utterances in a step, "steps": in an epoch}). A part's time is that of its forward and backward pass on
    its own, so the parts need not add up to the whole. precisions: by default all that this processor has. Raises
    ValueError for what is no recogniser and for a precision that is missing here, CorpusError.
    """
    precisions = precisions or (("fp32", "bf16") if has_bfloat16() else ("fp32",))
    if strange := [each for each in precisions if each not in PRECISIONS]:
        raise ValueError(f"precision {strange[0]!r}: choose one of {', '.join(PRECISIONS)}")
    contestants, sizes = {}, {}
    for name in names:
        if experiments.recipe(name, profile).benchmark != "speech":
            raise ValueError(f"experiment {name!r}: only recognisers are timed, those called ds2-...")
        for precision in precisions:
            made = experiments.trainer(name, profile, precision=precision, progress=False)
            if made.precision != precision:
                raise ValueError(f"{precision}: this processor lacks the instructions; leave --precision out")
            every = made.task.batches(0)
            chosen = sorted(every, key=lambda batch: max(made.task.train[k].seconds for k in batch))
            sizes = {"batch": made.task.batch, "steps": len(every)}
            runs = [parts(made, batch) for batch in spread_out(chosen, batches)]
            for part in runs[0]:
                contestants[f"{name} {precision}", part] = [run[part] for run in runs]
    took = interleaved({key: lambda runs=runs: [run() for run in runs] for key, runs in contestants.items()}, rounds)
    rows = []
    for engine in dict.fromkeys(engine for engine, _ in contestants):
        for part in (part for own, part in contestants if own == engine):
            rows += rows_of({engine: took[engine, part]}, part, torch.get_num_threads(),
                            len(contestants[engine, part]))
    return rows, sizes


def parts(trainer: Trainer, batch: list[int]) -> dict[str, Callable[[], object]]:
    """The step of a trainer over one batch, whole and in parts that can be called in any order."""
    model, task, device = trainer.model, trainer.task, trainer.accelerator.device
    torch.manual_seed(0)
    model.train()
    for group in trainer.optimiser.param_groups:
        group["lr"] = 0.0                                          # every round sees the same weights
    spec, frames, made = task.sounds(batch, device)
    with torch.no_grad(), trainer.accelerator.autocast():
        x, lengths, alive = model.convolve(spec, frames)
        y = model.recur(x, lengths, alive)
    x, y = (t.float().requires_grad_() for t in (x, y))            # what comes between the parts

    def there_and_back(run: Callable[[], Tensor]) -> None:
        with trainer.accelerator.autocast():
            out = run()
        out.float().sum().backward()

    def update() -> None:
        if trainer.masks is not None:
            trainer.masks.mask_gradients_()
        nn.utils.clip_grad_norm_(trainer.parameters, trainer.settings.clip)
        trainer.optimiser.step()
    return {
        WHOLE: lambda: trainer._step([batch], 0.0),
        "sound": lambda: task.sounds(batch, device),
        "convolutions": lambda: there_and_back(lambda: model.convolve(spec, frames)[0]),
        "recurrent layers": lambda: there_and_back(lambda: model.recur(x, lengths, alive)),
        "letters and CTC": lambda: there_and_back(lambda: ctc_loss(model.letters(y, alive), lengths, made.targets,
                                                                   made.target_lengths)),
        "update": update}


def table(rows: Sequence[LatencyRow], sizes: dict[str, int]) -> str:
    """A line for each recogniser and precision: the step, utterances a second, an epoch, shares of the parts."""
    return in_columns(_lines(rows, sizes))


def exhibit(rows: Sequence[LatencyRow], sizes: dict[str, int], caption: str) -> Table:
    """The same for a page."""
    head, *lines = _lines(rows, sizes)
    return Table("tab-training-time", caption, "recogniser", [("", name) for name in head[1:]],
                 [(name, cells) for name, *cells in lines],
                 [f"A step is one batch of {sizes['batch']}. Shares are of the step's time; each part was timed by "
                  "itself, so they need not add up."])


def _lines(rows: Sequence[LatencyRow], sizes: dict[str, int]) -> list[list[str]]:
    cases = list(dict.fromkeys(row.case for row in rows if row.case != WHOLE))
    found = {(row.engine, row.case): row.microseconds / 1e6 for row in rows}
    lines = [["", "s a step", "utterances/s", "min an epoch", *cases]]
    for engine in dict.fromkeys(row.engine for row in rows):
        whole = found[engine, WHOLE]
        lines.append([engine, f"{whole:.3f}", f"{sizes['batch'] / whole:.1f}", f"{whole * sizes['steps'] / 60:.2f}",
                      *(f"{found[engine, case] / whole:.0%}" for case in cases)])
    return lines
