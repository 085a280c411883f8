"""What differs from benchmark to benchmark: the model, the task, and what a record says of a finished run.

A benchmark is made for one recipe's sizes, and knows nothing of how it is trained.
"""

import torch
from torch import Tensor, nn

from . import scores
from .audio import ALPHABET, BINS
from .caption_scores import caption_scores
from .corpora import CaptionCorpus, Picture, SpeechCorpus, Utterance
from .counting import Counts, count, output_positions, zero_shares
from .decoding import WordList, beam_search
from .deepspeech2 import DeepSpeech2
from .neuraltalk import NeuralTalk
from .search import BEAMS
from .tasks import CaptionTask, SpeechTask, spelled, tokens
from .toy import Interlock, ToyModel, ToyTask

CPU = torch.device("cpu")


class Speech:
    """Speech recognition: DeepSpeech2 on a corpus of spoken letters."""
    masked = "rnns.*weight_*"              # what is grown and pruned: the matrices of the recurrent layers
    normalisation = scores.NORMALISATION
    make = DeepSpeech2                     # arguments -> model
    sizes: dict = {}                       # further arguments, which the corpus decides

    def __init__(self, corpus: SpeechCorpus):
        self.corpus, self.name, self.sha256 = corpus, corpus.name, corpus.sha256

    def task(self, seed: int, **sizes) -> SpeechTask:
        return SpeechTask(self.corpus, seed=seed, **sizes)

    @staticmethod
    def about(task: dict) -> dict:
        """What else a model file has to say, so that the model can be used without the recipe."""
        return {"alphabet": ALPHABET}

    def results(self, model: nn.Module, task: SpeechTask) -> dict:
        """The fields of a record that the trained model gives: scores, samples and, unless it learned from them, scores
        on the validation speakers."""
        test = self.corpus.split("test", limit=task.limit)
        heard, found = self.scored(model, task, test)
        valid = {} if task.everything else task.evaluate(model, CPU)
        return {"scores": found, "valid_scores": valid, "normalisation": self.normalisation,
                "samples": [{"id": u.id, "speaker": u.speaker, "reference": u.transcript, "hypothesis": text}
                            for u, text in zip(test, heard)]}

    @staticmethod
    def scored(model: nn.Module, task: SpeechTask, utterances: list[Utterance]) -> tuple[list[str], dict[str, float]]:
        """Greedy transcripts, and their error rates; as `wer_words` that of a search among the words of the training
        transcripts, which knows more than the paper's and is no part of any comparison with it."""
        log_probs = task.log_probs(model, utterances, CPU)
        heard, said = spelled(log_probs), [u.transcript for u in utterances]
        words = WordList(u.transcript for u in task.corpus.split("train"))     # all of them, whatever the task's limit
        known = [beam_search(own.numpy(), words) for own in log_probs]
        return heard, scores.error_rates(said, heard) | {"wer_words": scores.error_rates(said, known)["wer"]}

    @staticmethod
    def frame(model: DeepSpeech2, masks: dict[str, Tensor], **options) -> Counts:
        """The costs of one output frame (20 or 40 ms of sound), by layer; `options` as `count`."""
        spec, lengths = torch.zeros(1, BINS, 200), torch.tensor([200])
        with torch.no_grad():
            made = int(model(spec, lengths)[1])
        positions = {name: n // made for name, n in output_positions(model, spec, lengths).items()}
        return count(model, masks, positions=positions, **options)

    @staticmethod
    def counts(model: DeepSpeech2, masks: dict[str, Tensor]) -> dict:
        """Of one output frame: the recurrent matrices alone, and the whole model."""
        return {"cell": count(model, masks, include="rnns.", weights_only=True).record(),
                "model": Speech.frame(model, masks).record()}


class Captions:
    """Image captioning: NeuralTalk on a corpus with stored features, or with pixels for an encoder that learns."""
    masked = "rnn.weight_*"                # the matrices of the recurrent layers; the output projection stays dense
    make = NeuralTalk

    def __init__(self, corpus: CaptionCorpus):
        self.corpus, self.name, self.sha256 = corpus, corpus.name, corpus.sha256
        tiny = corpus.encoder == "tiny"
        self.sizes = {"words": len(corpus.vocabulary), "features": 256 if tiny else corpus.width,
                      "encoder": corpus.encoder if tiny or corpus.pixels else None}

    def task(self, seed: int, corpus: str = "", encoder: str = "", **sizes) -> CaptionTask:
        return CaptionTask(self.corpus, seed=seed, **sizes)

    def about(self, task: dict) -> dict:
        """The vocabulary, how many words are said at most, whose features are read, and whether Java may score."""
        words = self.corpus.vocabulary
        return {"vocabulary": list(words.words), "longest": words.longest, "encoder": self.corpus.encoder,
                "java": task["java"]}

    def results(self, model: NeuralTalk, task: CaptionTask) -> dict:
        """Test scores: all of them of greedy captions, CIDEr for each beam (`cider_beam2`, ...), perplexity, and of an
        H-LSTM the percentage of hidden units in the gates that are exactly zero (`zero_units`)."""
        test = self.corpus.split("test", limit=task.limit)
        said, scores, normalisation = self.scored(model, task, test)
        return {"scores": scores, "valid_scores": task.evaluate(model, CPU), "normalisation": normalisation,
                "samples": [{"id": p.id, "reference": list(p.raw), "hypothesis": text} for p, text in zip(test, said)]}

    @staticmethod
    def scored(model: NeuralTalk, task: CaptionTask, pictures: list[Picture]) -> tuple[list[str], dict, str]:
        """Greedy captions, scores (those of the other beams as `cider_beam2`, ...), normalisation."""
        said = [task.captions(model, pictures, CPU, beam) for beam in BEAMS]
        found, normalisation = caption_scores(tokens(pictures), [list(p.raw) for p in pictures], *said,
                                              use_java=task.java)
        wider = {f"{name}_beam{beam}": scores[name] for beam, scores in zip(BEAMS[1:], found[1:])
                 for name in ("cider", "bleu4", "meteor") if name in scores}
        others = {"perplexity": task.perplexity(model, pictures, CPU)}
        if getattr(model.rnn, "gate_layers", 0):
            zeros = zero_shares(model, task.unpadded(model, pictures)).values()
            others["zero_units"] = 100 * float(torch.cat([share.flatten() for share in zeros]).mean())
        return said[0], found[0] | wider | others, normalisation

    @staticmethod
    def counts(model: NeuralTalk, masks: dict[str, Tensor]) -> dict:
        """Of one word: the recurrent matrices alone, and the whole model; what a picture takes, once, is no MAC."""
        once = {name: 0 for name, _ in model.named_parameters() if name.startswith(("encoder.", "picture."))}
        return {"cell": count(model, masks, include="rnn.", weights_only=True).record(),
                "model": count(model, masks, positions=once).record()}


class Toy:
    """The interlock: one recurrent layer on sequences that are drawn when they are wanted."""
    masked = "rnn.weight_*"
    normalisation = "none: a lever is read rightly or wrongly"
    name = "interlock"
    make = ToyModel
    sizes: dict = {}

    def __init__(self, rules: Interlock):
        self.rules, self.sha256 = rules, rules.sha256

    def task(self, seed: int, rules: dict, **sizes) -> ToyTask:
        return ToyTask(seed, Interlock(**rules), **sizes)

    @staticmethod
    def about(task: dict) -> dict:
        """The rules, and which sequences it is scored on."""
        return {"task": task}

    def results(self, model: nn.Module, task: ToyTask) -> dict:
        """Scores, and the first few test sequences: levers, settings, and the settings that the model read."""
        read = task.read(model, CPU, "test")
        x, wanted = task.splits["test"]
        return {"scores": task.evaluate(model, CPU, "test"), "valid_scores": task.evaluate(model, CPU),
                "normalisation": self.normalisation,
                "samples": [{"id": f"test-{k}", "inputs": _text(x[k] > 0), "reference": _text(wanted[k]),
                             "hypothesis": _text(read[k])} for k in range(min(3, len(x)))]}

    @staticmethod
    def counts(model: ToyModel, masks: dict[str, Tensor]) -> dict:
        """Of one step: the recurrent matrices alone, and the whole model."""
        return {"cell": count(model, masks, include="rnn.", weights_only=True).record(),
                "model": count(model, masks).record()}


def _text(bits: Tensor) -> list[str]:
    """Bits (T, n) -> a line a step."""
    return ["".join(str(int(bit)) for bit in row) for row in bits]
