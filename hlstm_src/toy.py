"""A sequence task of seconds, to try growth, pruning and their rivals on: the staircase.

On a staircase over three floors each floor has a switch, and each switch changes the lamp: it burns when an odd
number of them is up. Here each of R registers, a bit of memory, has such a set of switches: when an odd number is up,
the register takes in the bit on its data line, and otherwise it keeps what it has. After each step the network reads
out all registers.

So a gate has to decide, within the step, on the parity of its switches, which no gate that is linear in its inputs
can do. The task was made so: it shows what hidden layers in the gates can do, not that speech or captions need them.
Sequences are drawn from a seed whenever they are wanted; there are no files.
"""

import hashlib
import json
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lstm import HLSTM


@dataclass(frozen=True)
class Staircase:
    """The rules: register k has the switches k, k + 1, ... on `floors` floors and the data line k % lines.

    Of as many switches as the default has, the last two are idle: nobody needs to listen to them. The numbers go
    round: behind the last switch comes the first. Raises ValueError for a house that cannot be built.
    """
    switches: int = 8
    lines: int = 2
    registers: int = 4                 # R
    floors: int = 3
    steps: int = 12                    # T

    def __post_init__(self):
        if min(asdict(self).values()) < 1 or max(self.registers, self.floors) > self.switches:
            raise ValueError(f"{self}: each number must be at least 1, registers and floors at most `switches`")

    @property
    def inputs(self) -> int:
        """I, numbers that a network sees at each step: the switches, then the lines."""
        return self.switches + self.lines

    @property
    def sha256(self) -> str:
        """What stands in a record where a corpus has the hash of its files."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """n sequences of switches and lines, each up or down by the toss of a coin: bits (n, T, I)."""
        return torch.randint(2, (n, self.steps, self.inputs), generator=generator)

    def taken(self, bits: Tensor) -> Tensor:
        """Where a register takes in its line: bits (B, T, I) -> bool (B, T, R)."""
        k = torch.arange(self.registers)
        return sum(bits[..., (k + floor) % self.switches] for floor in range(self.floors)) % 2 == 1

    def solve(self, bits: Tensor) -> Tensor:
        """What the registers hold after each step: bits (B, T, I) -> bits (B, T, R). They begin with 0."""
        t = torch.arange(1, bits.shape[1] + 1)[:, None]
        last = torch.where(self.taken(bits), t, 0).cummax(1).values        # step of the last taking in; 0: none yet
        offered = bits[..., self.switches + torch.arange(self.registers) % self.lines]
        return F.pad(offered, (0, 0, 1, 0)).gather(1, last)


class ToyModel(nn.Module):
    """One recurrent layer, H-LSTM or LSTM, and a linear layer that reads the registers.

    forward: switches and lines as -1 and 1, (B, T, I) -> the logit that each register holds a 1, (B, T, R).
    """

    def __init__(self, inputs: int, registers: int, cell: str = "hlstm", hidden: int = 24,
                 activation: str = "relu"):
        super().__init__()
        if cell not in ("lstm", "hlstm"):
            raise ValueError(f"cell {cell!r}: choose 'lstm' or 'hlstm'")
        self.rnn = HLSTM(inputs, hidden, gate_layers=int(cell == "hlstm"), activation=activation, batch_first=True)
        self.output = nn.Linear(hidden, registers)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.rnn(x)[0])


class ToyTask:
    """The staircase as training asks for it (see tasks.py).

    Each training batch is new; the validation and the test sequences are the same for every seed. `error`: registers
    read wrongly, in percent, over all steps.
    """
    metric, lower_is_better = "error", True

    def __init__(self, seed: int = 0, rules: Staircase = Staircase(), batch: int = 64, length: int = 25,
                 held_out: int = 512):
        self.seed, self.rules, self.batch, self.length = seed, rules, batch, length
        self.splits = {name: self._sequences(held_out, number) for number, name in enumerate(("valid", "test"))}

    def _sequences(self, n: int, number: int) -> tuple[Tensor, Tensor]:
        """n sequences, drawn from a seed of their own: inputs (n, T, I) as -1 and 1, registers (n, T, R) as bits."""
        bits = self.rules.draw(n, torch.Generator().manual_seed(number))
        return 2.0 * bits - 1, self.rules.solve(bits)

    def batches(self, epoch: int) -> list[int]:
        """Numbers of this epoch's batches, `length` of them."""
        return list(range(epoch * self.length, (epoch + 1) * self.length))

    def loss(self, model: nn.Module, number: int, device: torch.device) -> Tensor:
        """Binary cross-entropy of a training batch, in nats a register."""
        x, wanted = self._sequences(self.batch, 1_000_003 * (self.seed + 1) + number)
        return F.binary_cross_entropy_with_logits(model(x.to(device)), wanted.to(device, torch.float32))

    @torch.no_grad()
    def read(self, model: nn.Module, device: torch.device, split: str = "valid") -> Tensor:
        """What the model reads in a split, bits (n, T, R)."""
        return (model.eval()(self.splits[split][0].to(device)) > 0).long().cpu()

    def evaluate(self, model: nn.Module, device: torch.device, split: str = "valid") -> dict[str, float]:
        """`error` in percent."""
        wrong = self.read(model, device, split) != self.splits[split][1]
        return {"error": 100 * float(wrong.float().mean())}
