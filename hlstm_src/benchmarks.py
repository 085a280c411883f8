"""What differs from benchmark to benchmark: the model, the task, and what a record says of a finished run.

A benchmark is made for one recipe's sizes, and knows nothing of how it is trained.
"""

import torch
from torch import Tensor, nn

from . import scores
from .audio import ALPHABET, BINS
from .corpora import SpeechCorpus
from .counting import convolution_positions, count
from .deepspeech2 import DeepSpeech2
from .tasks import SpeechTask
from .toy import Interlock, ToyModel, ToyTask

CPU = torch.device("cpu")


class Speech:
    """Speech recognition: DeepSpeech2 on a corpus of spoken letters."""
    masked = "rnns.*weight_*"              # what is grown and pruned: the matrices of the recurrent layers
    normalisation = scores.NORMALISATION
    make = DeepSpeech2                     # arguments -> model

    def __init__(self, corpus: SpeechCorpus):
        self.corpus, self.name, self.sha256 = corpus, corpus.name, corpus.sha256

    def task(self, seed: int, batch: int = 16, limit: int | None = None) -> SpeechTask:
        return SpeechTask(self.corpus, batch, limit, seed)

    @staticmethod
    def about(task: dict) -> dict:
        """What else a model file has to say, so that the model can be used without the recipe."""
        return {"alphabet": ALPHABET}

    def results(self, model: nn.Module, task: SpeechTask) -> dict:
        """The fields of a record that the trained model gives: scores, validation scores and samples."""
        test = self.corpus.split("test", limit=task.limit)
        heard = task.transcribe(model, test, CPU)
        return {"scores": scores.error_rates([u.transcript for u in test], heard),
                "valid_scores": task.evaluate(model, CPU), "normalisation": self.normalisation,
                "samples": [{"id": u.id, "speaker": u.speaker, "reference": u.transcript, "hypothesis": text}
                            for u, text in zip(test, heard)]}

    @staticmethod
    def counts(model: DeepSpeech2, masks: dict[str, Tensor]) -> dict:
        """Of one output frame (20 ms of sound): the recurrent matrices alone, and the whole model."""
        spec, lengths = torch.zeros(1, BINS, 201), torch.tensor([201])
        with torch.no_grad():
            made = int(model(spec, lengths)[1])
        positions = {name: n // made for name, n in convolution_positions(model, spec, lengths).items()}
        return {"cell": count(model, masks, include="rnns.", weights_only=True).record(),
                "model": count(model, masks, positions=positions).record()}


class Toy:
    """The interlock: one recurrent layer on sequences that are drawn when they are wanted."""
    masked = "rnn.weight_*"
    normalisation = "none: a lever is read rightly or wrongly"
    name = "interlock"
    make = ToyModel

    def __init__(self, rules: Interlock):
        self.rules, self.sha256 = rules, rules.sha256

    def task(self, seed: int, rules: dict, **sizes) -> ToyTask:
        return ToyTask(seed, Interlock(**rules), **sizes)

    @staticmethod
    def about(task: dict) -> dict:
        """The rules, and which sequences it is scored on."""
        return {"task": task}

    def results(self, model: nn.Module, task: ToyTask, shown: int = 3) -> dict:
        """Scores, and the first few test sequences: levers, settings, and the settings that the model read."""
        read = task.read(model, CPU, "test")
        x, wanted = task.splits["test"]
        return {"scores": task.evaluate(model, CPU, "test"), "valid_scores": task.evaluate(model, CPU),
                "normalisation": self.normalisation,
                "samples": [{"id": f"test-{k}", "inputs": _text(x[k] > 0), "reference": _text(wanted[k]),
                             "hypothesis": _text(read[k])} for k in range(min(shown, len(x)))]}

    @staticmethod
    def counts(model: ToyModel, masks: dict[str, Tensor]) -> dict:
        """Of one step: the recurrent matrices alone, and the whole model."""
        return {"cell": count(model, masks, include="rnn.", weights_only=True).record(),
                "model": count(model, masks).record()}


def _text(bits: Tensor) -> list[str]:
    """Bits (T, n) -> a line a step."""
    return ["".join(str(int(bit)) for bit in row) for row in bits]
