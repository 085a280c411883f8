"""Scores of a compact file, on the engine: as `experiments.evaluate` gives those of a trained model's file."""

from pathlib import Path

from . import scores
from .caption_scores import caption_scores
from .compact.captioner import Captioner
from .compact.runtime import load_compact
from .corpora import CaptionCorpus, SpeechCorpus
from .tasks import tokens


def evaluate(file: Path, folder: Path | None, split: str = "test", limit: int | None = None
             ) -> tuple[SpeechCorpus | CaptionCorpus, dict[str, float], list[str]]:
    """Hears or captions a split, or its first `limit` items, one by one: (the corpus, scores, what was said, greedy).

    Raises ValueError without a corpus or for another vocabulary, CorpusError and ModelFileError.
    """
    engine = load_compact(file)
    pictures = isinstance(engine, Captioner)
    if folder is None:
        kind, usual = ("captioner", "data/ucm") if pictures else ("recogniser", "data/an4")
        raise ValueError(f"{file}: a {kind} is scored on a corpus; name its folder, such as {usual}")
    corpus = CaptionCorpus(folder, engine.encoder) if pictures else SpeechCorpus(folder)
    chosen = corpus.split(split, limit=limit)
    if not pictures:
        said = [engine.transcribe(corpus.audio(u).numpy()) for u in chosen]
        return corpus, scores.error_rates([u.transcript for u in chosen], said), said
    if list(corpus.vocabulary.words) != list(engine.vocabulary):
        raise ValueError(f"{file}: its vocabulary is not that of {folder}; name the corpus it learnt from")
    # Stored features are those of the encoder as it came, not of one that learnt along with the words.
    said = [engine.caption(p.path if engine.tuned else corpus.feature(p).numpy(), beam=1) for p in chosen]
    found, _ = caption_scores(tokens(chosen), [list(p.raw) for p in chosen], said,
                              use_java=engine.metadata.get("java", True))
    return corpus, found[0], said
