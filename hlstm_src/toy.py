"""A sequence task of seconds, to try growth, pruning and their rivals on: the interlock.

A machine has n levers, each up or down, and a safety interlock: its setting follows the levers only when they differ
from the present setting in exactly one lever. Otherwise two hands were at work, or none, and the setting stays as it
is. A network sees the levers step by step, and a few idle ones that belong to another machine; after each step it has
to say what the setting is. It begins with all levers down.

So at each step the gates have to compare two words bit by bit, the input and the state, and count the differences.
That is no linear function of either, and the next step needs its outcome. The task was made so: it shows what hidden
layers in the gates can do, not that speech or captions need them. Sequences are drawn from a seed whenever they are
wanted; there are no files.
"""

import hashlib
import json
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lstm import HLSTM


@dataclass(frozen=True)
class Interlock:
    """The rules, and how long a sequence is. Raises ValueError for sizes that make no machine."""
    levers: int = 4                    # n
    idle: int = 2
    steps: int = 8                     # T

    def __post_init__(self):
        if min(self.levers, self.steps) < 1 or self.idle < 0:
            raise ValueError(f"{self}: it takes at least 1 lever and 1 step, and no fewer than 0 idle levers")

    @property
    def inputs(self) -> int:
        """I, numbers that a network sees at each step: the levers, then the idle ones."""
        return self.levers + self.idle

    @property
    def sha256(self) -> str:
        """What stands in a record where a corpus has the hash of its files."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """So many sequences of levers, each up (1) or down (0) by the toss of a coin: (count, T, I)."""
        return torch.randint(2, (count, self.steps, self.inputs), generator=generator)

    def settings(self, bits: Tensor) -> Tensor:
        """The setting after each step: levers (B, T, I) -> (B, T, n)."""
        setting, found = torch.zeros_like(bits[:, 0, :self.levers]), []
        for levers in bits[..., :self.levers].unbind(1):
            follows = (levers != setting).sum(1, keepdim=True) == 1
            setting = torch.where(follows, levers, setting)
            found.append(setting)
        return torch.stack(found, 1)


class ToyModel(nn.Module):
    """One recurrent layer, H-LSTM or LSTM, and a linear layer that reads the setting from its state.

    forward: levers as -1 and 1, (B, T, inputs) -> the logit that each lever of the setting is up, (B, T, outputs).
    """

    def __init__(self, inputs: int, outputs: int, cell: str = "hlstm", hidden: int = 24, activation: str = "relu"):
        super().__init__()
        if cell not in ("lstm", "hlstm"):
            raise ValueError(f"cell {cell!r}: choose 'lstm' or 'hlstm'")
        self.rnn = HLSTM(inputs, hidden, gate_layers=int(cell == "hlstm"), activation=activation, batch_first=True)
        self.output = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.rnn(x)[0])


class ToyTask:
    """The interlock as training asks for it (see tasks.py).

    Each training batch is new; the validation and the test sequences are the same for every seed. `error`: levers of
    the setting that are read wrongly, in percent, over all steps.
    """
    metric, lower_is_better = "error", True

    def __init__(self, seed: int = 0, rules: Interlock = Interlock(), batch: int = 64, length: int = 25,
                 held_out: int = 512):
        self.seed, self.rules, self.batch, self.length = seed, rules, batch, length
        self.splits = {name: self._sequences(held_out, number) for number, name in enumerate(("valid", "test"))}

    def _sequences(self, count: int, number: int) -> tuple[Tensor, Tensor]:
        """Sequences drawn from a seed of their own: levers (count, T, I) as -1 and 1, settings (count, T, n)."""
        bits = self.rules.draw(count, torch.Generator().manual_seed(number))
        return 2.0 * bits - 1, self.rules.settings(bits)

    def batches(self, epoch: int) -> list[int]:
        """Numbers of this epoch's batches, `length` of them."""
        return list(range(epoch * self.length, (epoch + 1) * self.length))

    def loss(self, model: nn.Module, number: int, device: torch.device) -> Tensor:
        """Binary cross-entropy of a training batch, in nats a lever."""
        x, wanted = self._sequences(self.batch, 1_000_003 * (self.seed + 1) + number)
        return F.binary_cross_entropy_with_logits(model(x.to(device)), wanted.to(device, torch.float32))

    @torch.no_grad()
    def read(self, model: nn.Module, device: torch.device, split: str = "valid") -> Tensor:
        """The settings that the model reads in a split, (count, T, n)."""
        return (model.eval()(self.splits[split][0].to(device)) > 0).long().cpu()

    def evaluate(self, model: nn.Module, device: torch.device, split: str = "valid") -> dict[str, float]:
        """`error` in percent."""
        wrong = self.read(model, device, split) != self.splits[split][1]
        return {"error": 100 * float(wrong.float().mean())}
