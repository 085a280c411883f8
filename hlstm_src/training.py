"""The training loop: one epoch after another, as a schedule says, with growth and pruning in between.

Randomness is seeded anew at each step from (seed, step), and checkpoints hold everything else, so that a run killed
anywhere and resumed ends with the same bits as one that was left alone.

Started by `accelerate launch` or `torchrun`, several processes share the batches of each epoch. Gradients are averaged
over them before growth sees them, and the first process scores for all, so that masks and weights stay the same bits
everywhere.
"""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn
from tqdm import tqdm

from .errors import UserError
from .growprune import Gradients
from .library import has_bfloat16
from .masks import ConnectionMasks, load_tensors, save_tensors, weights_of
from .schedule import Dense, Event, GrowPruneSchedule

PRECISIONS = "bf16", "fp32"


class TrainingError(UserError):
    """Training cannot go on; the message says why and what to do."""


class Interrupted(UserError):
    """The user stopped the run; a checkpoint is left and the message says how to go on."""
    exit_code = 130


@dataclass(frozen=True)
class Settings:
    """How weights are trained; the same for every cell that is compared."""
    lr: float = 1e-3
    weight_decay: float = 1e-2
    clip: float = 5.0
    warmup: float = 0.1            # share of a stretch in which the learning rate rises
    retrain_lr: float = 0.5        # peak when retraining after pruning, as a share of `lr`
    decay: float | None = None     # instead of the cycle: the rate falls by this factor every `decay_epochs` epochs
    decay_epochs: int = 6
    patience: int | None = None    # dense training ends when so many epochs brought nothing better, and the weights of
                                   # the best epoch come back; None: every epoch is trained and the last one counts
    precision: str = "bf16"        # of the matrix products, where the processor can; "fp32" for none lower
    fused: bool = False            # AdamW in one pass: other rounding, less time, above all with masks: at exact zeros
                                   # the square roots of the plain one are slow
    accumulate: int = 1            # batches whose mean gradient makes one step: as one batch, if they are equal parts

    def __post_init__(self):
        if self.accumulate < 1 or self.decay_epochs < 1:
            raise ValueError(f"accumulate {self.accumulate} and decay_epochs {self.decay_epochs} must be at least 1")


def accelerator(precision: str = "fp32") -> Accelerator:
    """Device and precision, chosen by accelerate: a GPU where there is one, and single precision on a processor that
    lacks the instructions for bfloat16. Raises ValueError for another precision than bf16 and fp32."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}: choose one of {', '.join(PRECISIONS)}")
    able = torch.cuda.is_bf16_supported() if torch.cuda.is_available() else has_bfloat16()
    wanted = "bf16" if precision == "bf16" and able else "no"
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != wanted:
        AcceleratorState._reset_state()                            # one process may train at several precisions
    return Accelerator(mixed_precision=wanted)


def learning_rate(peak: float, position: float, warmup: float) -> float:
    """One cycle over a stretch, position in [0, 1]: a linear rise to `peak`, then a cosine down to a hundredth."""
    if position < warmup:
        return peak * (0.04 + 0.96 * position / warmup)
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * (position - warmup) / (1 - warmup))) / 2)


class Trainer:
    """Trains `model` on `task` (see tasks.py) through `schedule` (see schedule.py).

    After `train()`: `history` (one row an epoch), `phases` (one row for each growth, pruning or restoring),
    `seconds`. With `checkpoint`, a file is kept there after each epoch and on Ctrl-C, and found again by the next
    call; `key` ties it to a recipe, and a checkpoint of another key, schedule, seed, masks, precision or number of
    processes, or of other settings or shapes, is set aside.
    `after_epoch(trainer)` is called at the end of each epoch, when the schedule has grown or pruned, for those who look
    on. Raises ValueError for masks of another module, none for a schedule that prunes, patience with one, a floor below
    which scores of this task are good, or processes that know nothing of each other.
    """

    def __init__(self, model: nn.Module, task, schedule: Dense | GrowPruneSchedule, settings: Settings, *,
                 masks: ConnectionMasks | None = None, seed: int = 0, checkpoint: Path | None = None, key: str = "",
                 name: str = "training", progress: bool = True, after_epoch: Callable[["Trainer"], None] | None = None):
        if masks is None and type(schedule) is not Dense:
            raise ValueError(f"{type(schedule).__name__} grows or prunes, and so takes masks")
        if masks is not None and masks.module is not model:
            raise ValueError("masks must be those of the whole model, such as ConnectionMasks(model, 'rnn.*'): who "
                             "stores or restores the model must find them by its names")
        floor = getattr(schedule, "tolerance", None) is not None or getattr(schedule, "final_epochs", 0)
        if floor and schedule.lower_is_better != getattr(task, "lower_is_better", schedule.lower_is_better):
            raise ValueError(f"lower_is_better={schedule.lower_is_better}: of the task's {task.metric} it is not so")
        if strange := [name for name, t in model.state_dict().items() if not isinstance(t, Tensor)]:
            raise ValueError(f"the model's state holds {', '.join(strange)}, which no checkpoint can: only tensors")
        self.task, self.schedule, self.settings, self.masks, self.seed = task, schedule, settings, masks, int(seed)
        self.checkpoint, self.key, self.name, self.progress = checkpoint and Path(checkpoint), key, name, progress
        self.after_epoch = after_epoch
        self.accelerator, self.model = accelerator(settings.precision), model
        self.precision = "bf16" if self.accelerator.mixed_precision == "bf16" else "fp32"      # what it came to
        self.parameters = list(model.parameters())
        started, processes = os.environ.get("WORLD_SIZE", "1"), self.accelerator.num_processes
        if started != str(processes):                              # each would train everything, and write one file
            raise ValueError(f"{started} processes were started, and each knows of {processes}: on a machine without "
                             "GPUs set ACCELERATE_USE_CPU=true, or start them with accelerate launch --cpu")
        asked = [asdict(schedule), asdict(settings), {name: t.shape for name, t in model.state_dict().items()},
                 self.seed, sorted(masks.masks) if masks else None, self.precision, processes]
        self.asked = json.loads(json.dumps(asked))                 # what a checkpoint must have been asked for, too
        self.optimiser = torch.optim.AdamW(self.parameters, lr=settings.lr, weight_decay=settings.weight_decay,
                                           fused=settings.fused or None)
        if masks is not None:
            masks.attach(self.optimiser)
        self.prepared = self.accelerator.prepare(model)
        if masks is not None and self.accelerator.num_processes > 1:    # the first process's, should they differ
            masks.load_state_dict(broadcast({k: t.to(self.accelerator.device) for k, t in masks.state_dict().items()}))
        if settings.patience is not None and type(schedule) is not Dense:
            raise ValueError("patience ends dense training early; schedules that prune have an end of their own")
        self.gradients = Gradients(schedule.absolute)
        self.best: tuple[float, int] | None = None                 # best validation score so far, and its epoch
        self.good: dict[str, Tensor] = {}                          # the weights that had it, kept for `patience`
        self.epoch = self.batch = self.step = 0
        self.lr = self.loss_sum = self.seconds = self.epoch_seconds = 0.0
        self.history: list[dict] = []
        self.phases: list[dict] = []

    def train(self) -> None:
        """Runs the schedule to its end. Raises Interrupted on Ctrl-C, TrainingError if the loss is not finite."""
        with self.accelerator.main_process_first():                # which may set a checkpoint aside
            if self.checkpoint is not None and self.checkpoint.exists():
                self._resume()
        with _StopOnSignal() as stop:
            while not self.schedule.done:
                self._epoch(stop)
            if self._mean(stop.asked):                             # while the last epoch was scored
                self._stop()
        self.model = self.accelerator.unwrap_model(self.prepared, keep_fp32_wrapper=False)

    def _epoch(self, stop: "_StopOnSignal") -> None:
        batches = self._share(self.task.batches(self.epoch))
        bar = tqdm(total=len(batches), initial=self.batch, desc=f"{self.name} epoch {self.epoch + 1}", leave=False,
                   disable=not (self.progress and self.accelerator.is_main_process and sys.stderr.isatty()))
        started = time.perf_counter() - self.epoch_seconds
        self.prepared.train()
        while self.batch < len(batches):
            done, every = self.schedule.cycle
            self.lr = self._learning_rate((done + self.batch / len(batches)) / every)
            together = batches[self.batch:self.batch + self.settings.accumulate]
            steps_left = -(-(len(batches) - self.batch) // self.settings.accumulate)
            self.loss_sum += self._step(together, self.lr, steps_left)
            self.batch, self.step = self.batch + len(together), self.step + 1
            self.epoch_seconds = time.perf_counter() - started
            bar.update(len(together))
            bar.set_postfix(loss=f"{self.loss_sum / self.batch:.3f}")
            if self._mean(stop.asked):
                bar.close()
                self._stop()
        bar.close()
        scores = self._evaluate()
        self.epoch_seconds = time.perf_counter() - started
        self.history.append({"epoch": self.epoch, "phase": self.schedule.phase, "loss": self.loss_sum / len(batches),
                             "lr": self.lr, "seconds": self.epoch_seconds, "scores": scores, **self._densities()})
        event = self.schedule.end_epoch(self.masks, self.gradients, scores[self.task.metric])
        if self.settings.patience is not None:
            event = self._be_patient(scores[self.task.metric])
        if event is not None:
            self.phases.append(asdict(event) | {"epoch": self.epoch, "scores": scores})
        self.seconds += self.epoch_seconds
        self._report(scores, event)
        if self.after_epoch is not None:
            self.after_epoch(self)
        self.epoch, self.batch, self.loss_sum, self.epoch_seconds = self.epoch + 1, 0, 0.0, 0.0
        self._save()

    def _be_patient(self, score: float) -> Event | None:
        """Keeps the best weights; at the end of patience, or of the epochs, they come back."""
        best = math.nan if self.best is None else self.best[0]
        if math.isnan(best) or (score < best if self.task.lower_is_better else score > best):
            self.best = score, self.epoch
            self.good = weights_of(self.model)
        if not self.schedule.done and self.epoch - self.best[1] < self.settings.patience:
            return None
        self.schedule.done = True
        self.model.load_state_dict(self.good)
        note = f"ended; weights of epoch {self.best[1] + 1} came back"
        if self.masks is not None:
            return Event.now("dense", self.masks, note=note)
        return Event("dense", 1.0, sum(p.numel() for p in self.parameters), note=note)

    def _share(self, batches: list) -> list:
        """This process's part of an epoch's batches, as many for each; a rest that cannot be shared out is left."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        if len(batches) < processes:
            raise TrainingError(f"{self.name}: {len(batches)} batches an epoch are too few for {processes} processes; "
                                "make the batches smaller or start fewer processes")
        return batches[:len(batches) // processes * processes][rank::processes]

    def _mean(self, value: float) -> float:
        """The mean of a number over all processes."""
        if self.accelerator.num_processes == 1:
            return value
        tensor = torch.tensor(float(value), dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(tensor, "mean").item()

    def _evaluate(self) -> dict[str, float]:
        """Validation scores. Of several processes the first one's are everybody's, and so are its running means."""
        if self.accelerator.num_processes == 1:
            return self.task.evaluate(self.model, self.accelerator.device)
        for buffer in self.model.buffers():
            buffer.copy_(broadcast(buffer))
        main = self.accelerator.is_main_process
        return broadcast_object_list([self.task.evaluate(self.model, self.accelerator.device) if main else None])[0]

    def _step(self, batches: list, lr: float, steps_left: int = 1) -> float:
        """One step down the mean gradient of these batches (and of those of the other processes); returns the sum
        of their losses. `steps_left` says how many steps of the epoch there are, this one included."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        torch.manual_seed(1_000_003 * (self.seed * processes + rank) + self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.zero_grad()
        total = 0.0
        for k, batch in enumerate(batches, 1):
            last = k == len(batches)                               # only then do the processes exchange gradients
            with nullcontext() if last else self.accelerator.no_sync(self.prepared):
                loss = self.task.loss(self.prepared, batch, self.accelerator.device)
                value = self._mean(loss.item())
                if not math.isfinite(value):
                    raise TrainingError(f"{self.name}: the loss became {value} in epoch {self.epoch + 1}; "
                                        "lower the learning rate")
                self.accelerator.backward(loss / len(batches))
            total += value
        if self.masks is not None:
            wanted = self.schedule.growth_batches
            if self.schedule.growing and (wanted is None or steps_left <= wanted):
                self.gradients.collect(self.masks)
            self.masks.mask_gradients_()
        nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        self.optimiser.step()
        return total

    def _learning_rate(self, position: float) -> float:
        retraining = self.schedule.restarts and self.schedule.phase in ("prune", "final")
        peak = self.settings.lr * (self.settings.retrain_lr if retraining else 1)
        if self.settings.decay is not None:
            return peak * self.settings.decay ** (self.schedule.cycle[0] // self.settings.decay_epochs)
        return learning_rate(peak, position, self.settings.warmup)

    def _densities(self) -> dict:
        if self.masks is None:
            return {}
        return {"density": self.masks.density(), "densities": {n: self.masks.density(n) for n in self.masks.masks}}

    def _report(self, scores: dict[str, float], event) -> None:
        if not (self.progress and self.accelerator.is_main_process):
            return
        row = self.history[-1]
        left = self.seconds / len(self.history) * self.schedule.epochs_left / 60
        line = (f"{self.name}  epoch {row['epoch'] + 1}  {row['phase']}  loss {row['loss']:.3f}  "
                + "  ".join(f"{k} {v:.1f}" for k, v in scores.items()) + f"  {row['seconds']:.0f} s")
        if "density" in row:
            line += f"  density {row['density']:.1%}"
        if event is not None:
            line += f"  [{': '.join(filter(None, (event.phase, event.note)))}, density {event.density:.1%}]"
        if left:
            line += f"  at most {left:.0f} min left" if left >= 1 else "  less than a minute left"
        tqdm.write(line, file=sys.stderr)

    def _save(self) -> None:
        if self.checkpoint is None or not self.accelerator.is_main_process:
            return
        schedule, good = self.schedule.state_dict()
        groups = {"model": self.model.state_dict(), "gradients": self.gradients.sums, "schedule": good,
                  "best": self.good, "masks": self.masks.state_dict() if self.masks else {}}
        for k, p in enumerate(self.parameters):
            groups[f"optimiser.{k}"] = self.optimiser.state.get(p, {})
        tensors = {f"{group}/{name}": t for group, part in groups.items() for name, t in part.items()}
        plain = ("epoch", "batch", "step", "lr", "loss_sum", "seconds", "epoch_seconds", "history", "phases", "best",
                 "key", "asked")
        save_tensors(self.checkpoint, tensors, {"schedule": schedule} | {name: getattr(self, name) for name in plain})

    def _resume(self) -> None:
        try:
            tensors, state = load_tensors(self.checkpoint)
        except ValueError:
            raise TrainingError(f"{self.checkpoint}: damaged or no checkpoint; delete it to start anew") from None
        if state.get("key") != self.key or state.get("asked") != self.asked:
            old = self.checkpoint.with_suffix(".old")
            self.checkpoint.replace(old)
            return print(f"{self.checkpoint}: of another recipe, model, corpus or code, or of training in another "
                         f"way; set aside as {old.name}, starting anew", file=sys.stderr)

        def part(group: str) -> dict:
            return {name.removeprefix(group + "/"): t for name, t in tensors.items() if name.startswith(group + "/")}
        self.model.load_state_dict(part("model"))
        self.gradients.sums = {name: t.to(self.accelerator.device) for name, t in part("gradients").items()}
        for k, p in enumerate(self.parameters):
            moments = part(f"optimiser.{k}")
            if moments:
                stays = () if self.settings.fused else ("step",)   # a fused one counts its steps beside the parameter
                self.optimiser.state[p] = {n: t if n in stays else t.to(p.device) for n, t in moments.items()}
        if self.masks is not None:
            self.masks.load_state_dict(part("masks"))
        self.schedule.load_state_dict(state.pop("schedule"), part("schedule"))
        self.good = part("best")
        self.__dict__.update(state)
        if self.progress and self.accelerator.is_main_process:
            where = "done, but for what follows training" if self.schedule.done else f"epoch {self.epoch + 1}"
            print(f"{self.name}: goes on from {self.checkpoint}: {where}", file=sys.stderr)

    def _stop(self) -> None:
        self._save()
        kept = f"a checkpoint is in {self.checkpoint}; the same command goes on from there" if self.checkpoint else \
            "no checkpoint was asked for"
        where = f"in epoch {self.epoch + 1}, batch {self.batch}" if not self.schedule.done else "behind the last epoch"
        raise Interrupted(f"{self.name}: stopped {where}; {kept}")


class _StopOnSignal:
    """Ctrl-C and SIGTERM set `asked`, which the loop reads between two steps; a second Ctrl-C stops at once."""

    def __enter__(self):
        self.asked, self.before = False, {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.before[number] = signal.signal(number, self._ask)
            except ValueError:                                     # not in the main thread: no handler, no harm
                pass
        return self

    def _ask(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *exc):
        for number, handler in self.before.items():
            signal.signal(number, handler)
