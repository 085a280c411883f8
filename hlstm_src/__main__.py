"""The command line: `python -m hlstm_src run|evaluate|pack|transcribe|caption|report|bench|doctor`; all have --help."""

import importlib.util
import os
import shutil
import signal
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import typer

from .errors import UserError, told
from .files import possible

TRAINED = Path(__file__).parent.parent / "results/desk/ds2-hlstm3-compact/seed0.safetensors"
QUICK = TRAINED.parent.parent / "ds2-hlstm3-fast/seed0.safetensors"
RECOGNISER = QUICK.with_suffix(".compact.safetensors")
TRAINED_CAPTIONER = TRAINED.parent.parent / "nt-hlstm1-compact/seed0.safetensors"
CAPTIONER = TRAINED_CAPTIONER.with_suffix(".compact.safetensors")
# What not everybody needs, by the name that is imported: which extra brings it, and what for.
EXTRAS = {"numba": ("compact,bench", "the sparse engine"), "soxr": ("compact,bench", "sound of other rates"),
          "PIL": ("data", "pictures"), "pycocoevalcap": ("scores", "the scores of captions"),
          "thop": ("scores", "checking our counts"), "onnx": ("bench", "benches of the engine"),
          "onnxruntime": ("bench", "benches of the engine")}
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  help="Grow and Prune LSTMs: run and read the experiments of the book.")
benches = typer.Typer(no_args_is_help=True, help="Measure speed: contestants take turns in one process.")
app.add_typer(benches, name="bench")
ProfileOption = Annotated[str, typer.Option(help="smoke, laptop, desk, wide or paper")]
JsonOption = Annotated[Path | None, typer.Option("--json", callback=possible, help="also write the timings here")]


def _list(wanted: bool) -> None:
    """Prints the names and titles of all experiments, and ends."""
    if wanted:
        from . import recipes
        for name in recipes.CATALOGUE:
            print(f"{name:<34} {recipes.recipe(name, 'smoke').title}")
        raise typer.Exit


@app.command()
def run(name: Annotated[str, typer.Argument(help="experiment, such as ds2-lstm5")], profile: ProfileOption = "laptop",
        seed: Annotated[list[int], typer.Option(help="may be given several times")] = [0],  # noqa: B006
        force: Annotated[bool, typer.Option(help="train even if there is a record")] = False,
        names: Annotated[bool, typer.Option("--list", is_eager=True, callback=_list,
                                            help="print the experiments, and end")] = False):
    """Train an experiment, or say that its record is up to date."""
    from . import experiments, records
    if name not in experiments.CATALOGUE and (near := get_close_matches(name, experiments.CATALOGUE)):
        raise ValueError(f"experiment {name!r}: did you mean {', '.join(near)}? `run --list` names them all")
    experiments.recipe(name, profile)                                      # what cannot be is refused at once
    paths = {k: records.path_of(name, profile, k) for k in seed}
    for k, path in paths.items():
        before = path.stat().st_mtime_ns if path.exists() else None
        record = experiments.run(name, profile, k, force=force)
        if before == path.stat().st_mtime_ns:
            print(f"{name} {profile} seed {k}: recorded {str(record.provenance.ended)[:10]}; nothing to train (--force "
                  "trains anew)")
        named = "wer", "cer", "error", "cider", "bleu4", "meteor"
        rates = "  ".join(f"{score} {record.scores[score]:.2f} %" for score in named if score in record.scores)
        cell = record.counts.cell
        print(f"{name} {profile} seed {k}: {rates}  "
              f"live recurrent weights {cell.nonzero_params:,} of {cell.params:,}")
        if (record.recipe["settings"]["precision"], record.provenance.precision) == ("bf16", "fp32"):
            print("trained in fp32: the processor lacks the instructions for bf16")
        print(f"record: {_short(path)}")


@app.command()
def evaluate(model: Annotated[Path, typer.Argument(help="a .safetensors file that `run` or `pack` wrote")],
             corpus: Annotated[Path | None, typer.Option(help="its corpus, such as data/an4 or data/ucm")] = None,
             split: Annotated[str, typer.Option(help="train, valid or test")] = "test",
             limit: Annotated[int | None, typer.Option(min=1, help="only so many utterances or pictures")] = None,
             show: Annotated[int, typer.Option(min=0, help="print so many transcripts or captions")] = 0):
    """Score a stored model on a corpus, a compact one on the engine."""
    from . import experiments, records
    from .masks import load_tensors
    about = load_tensors(model)[1]
    records.check_model(model)
    if about.get("benchmark") == "toy" and (corpus is not None or limit is not None or show):
        raise ValueError(f"{model}: a network of the interlock has no corpus and is scored whole; leave out --corpus, "
                         "--limit and --show")
    if "kind" in about:                                            # `pack` wrote it
        from . import packed
        opened, rates, heard = packed.evaluate(model, corpus, split, limit)
    else:
        opened = None if corpus is None else experiments.open_corpus(model, corpus)
        rates, heard = experiments.evaluate(model, opened, split, limit=limit)
    if "error" in rates:
        return print(f"{model.name} on the interlock, {split}: error {rates['error']:.4f} %; {len(heard)} sequences")
    if "cider" in rates:
        for p, text in list(zip(opened.split(split), heard))[:show]:
            print(f"{p.id}\n  people   {p.raw[0]}\n  machine  {text}")
        named = "cider", "cider_low", "cider_high", "pictures"
        return print(f"{model.name} on {opened.name} {split}: CIDEr {rates['cider']:.4f} %, 95 % interval "
                     f"{rates['cider_low']:.1f} to {rates['cider_high']:.1f}; {rates['pictures']:.0f} pictures; "
                     + ", ".join(f"{name} {value:.4f}" for name, value in rates.items() if name not in named)
                     + ("" if "meteor" in rates else "; scored without Java: not to be compared with PTB scores"))
    for u, text in list(zip(opened.split(split), heard))[:show]:
        print(f"{u.id}\n  said   {u.transcript}\n  heard  {text}")
    print(f"{model.name} on {opened.name} {split}: WER {rates['wer']:.4f} %, 95 % interval "
          f"{rates['wer_low']:.1f} to {rates['wer_high']:.1f}; CER {rates['cer']:.4f} %; "
          f"{rates['utterances']:.0f} utterances")


@app.command()
def pack(model: Annotated[Path, typer.Argument(help="a .safetensors file that `run` wrote")],
         out: Annotated[Path, typer.Argument(help="the compact file to write")],
         values: Annotated[str, typer.Option(help="fp32, fp16 or int8")] = "fp16"):
    """Write a trained recogniser or captioner as a compact file; print its layouts and what storing it takes."""
    from . import load_compact
    from .compact import pack as packing
    size = packing.pack(model, out, values)
    for name, matrix in load_compact(out).matrices.items():
        print(f"{name:<32} {matrix.kind:<8} {matrix.why}")
    print("\nbytes on disk, tensors alone")
    for name, n in packing.sizes(model).items():
        print(f"  {name:<18} {n:>12,}")
    print(f"wrote {_short(out)}: {size:,} bytes with what it says of itself")


@app.command()
def transcribe(files: Annotated[list[Path], typer.Argument(
                   help="sound files of any rate and number of channels", readable=False)],
               model: Annotated[Path, typer.Option(help="a recogniser's file")] = RECOGNISER,
               beam: Annotated[int, typer.Option(min=1, max=1000, help="prefixes to keep; 1: greedy")] = 1,
               threads: Annotated[int, typer.Option(min=1, max=2, help="2: both directions at once")] = 1,
               json: Annotated[bool, typer.Option("--json", help="a JSON object a line")] = False):
    """Write down what is said in sound files. Exit code 1 if one of them could not be read; the others are done."""
    from .audio import AudioError
    from .compact.recogniser import Recogniser
    recogniser = _opened(model, Recogniser, threads=threads)
    _each(files, lambda path: recogniser.transcribe(path, beam=beam), AudioError, "nothing was heard", json)


@app.command()
def caption(files: Annotated[list[Path], typer.Argument(help="pictures of any size", readable=False)],
            model: Annotated[Path, typer.Option(help="a captioner's file")] = CAPTIONER,
            beam: Annotated[int, typer.Option(min=1, max=1000, help="beginnings that the search keeps; 1: greedy")] = 2,
            json: Annotated[bool, typer.Option("--json", help="a JSON object a line")] = False):
    """Say what is on pictures. Exit code 1 if one of them could not be read; the others are done."""
    from .compact.captioner import Captioner
    from .compact.pictures import PictureError
    captioner = _opened(model, Captioner)
    _each(files, lambda path: captioner.caption(path, beam=beam), PictureError, "nothing was said", json)


def _opened(model: Path, wanted: type, **options):
    """The model in a file, if it is of the kind that is wanted."""
    from . import load_compact
    if model in (CAPTIONER, RECOGNISER) and not model.exists():
        raise FileNotFoundError(f"{_short(model)}: no such file; train a {wanted.__name__.lower()} with `python -m "
                                f"hlstm_src run {model.parent.name}` and name the .safetensors file beside its record "
                                "with --model")
    made = load_compact(model, **options)
    if not isinstance(made, wanted):
        raise ValueError(f"{model}: a {type(made).__name__.lower()}, where a {wanted.__name__.lower()} is needed")
    return made


def _each(files: list[Path], use: Callable[[Path], str], unreadable: type[Exception], nothing: str, json: bool) -> None:
    """Prints the text that `use` makes of each file; ends with exit code 1 if one of them could not be read."""
    from json import dumps
    failed = 0
    for k, path in enumerate(files, 1):
        if len(files) > 1 and sys.stderr.isatty():
            print(f"\033[K{k} of {len(files)}  {path}", end="\r", file=sys.stderr)
        try:
            text, problem = use(path), None
        except unreadable as error:
            text, problem, failed = None, str(error), failed + 1
            print(f"error: {error}", file=sys.stderr)
        if text == "":
            print(f"{path}: {nothing}", file=sys.stderr)
        if json:
            print(dumps({"file": str(path), "text": text} | ({"error": problem} if problem else {})), flush=True)
        elif text is not None:
            print(f"{path}\t{text}" if len(files) > 1 else text, flush=True)
    if failed:
        raise SystemExit(1)


@app.command()
def report(profile: ProfileOption = "laptop"):
    """Print the tables that the records of a profile make."""
    from . import tables
    print(tables.report(profile))


@benches.command("layer")
def bench_layer(rounds: Annotated[int, typer.Option(min=1, help="timings of each contestant")] = 5,
                threads: Annotated[list[int], typer.Option(min=1, help="may be given several times")] = (1, 2),
                compiled: Annotated[bool, typer.Option(help="also torch.compile of the readable step (slow)")] = False,
                only: Annotated[str, typer.Option(help="cases with this in their names, such as 'H512 bf16'")] = "",
                json: JsonOption = None):
    """Forward and backward of the H-LSTM layer for each multiply-accumulate, against torch.nn.LSTM."""
    from . import bench
    rows, work, memory = bench.layer(n_threads=threads, rounds=rounds, compiled=compiled, only=only)
    print("Time per multiply-accumulate, forward and backward, as a multiple of torch.nn.LSTM's:")
    print(bench.ratios(rows, "nn.LSTM", work))
    print("\nPeak memory of such a step, MB:")
    print(bench.memory_table(memory))
    if json:
        bench.save(json, "layer", rows, memory=[{"engine": e, "case": c, "bytes": n} for (e, c), n in memory.items()])


@benches.command("masks")
def bench_masks(rounds: Annotated[int, typer.Option(min=1, help="timings of each contestant")] = 9,
                threads: Annotated[list[int], typer.Option(min=1, help="may be given several times")] = (1, 2),
                json: JsonOption = None):
    """What masks, and the gradients that growth looks at, add to a dense training step."""
    from . import bench
    rows, (masks, sums) = bench.masks(n_threads=threads, rounds=rounds)
    print("Time of a training step with masks, and while growing, as a multiple of the dense step's:")
    print(bench.ratios((row for row in rows if "alone" not in row.engine), "dense"))
    print("What is added, timed alone, in percent of the dense step:")
    dense = {(row.case, row.threads): row.microseconds for row in rows if row.engine == "dense"}
    for row in rows:
        if "alone" in row.engine:
            share = 100 * row.microseconds / dense[row.case, row.threads]
            print(f"{row.case}, {row.threads} threads, {row.engine.removesuffix(' alone')}: {share:.2f} %")
    print(f"Memory, in copies of the masked weights: {masks:.2f} for the masks; {sums:.2f} more while growing")
    if json:
        bench.save(json, "masks", rows, copies={"masks": masks, "gradients": sums})


@benches.command("engine")
def bench_engine(quick: Annotated[bool, typer.Option(help="tiny layers: is everything there?")] = False,
                 model: Annotated[Path, typer.Option(help="a recogniser, for its own masks, or none")] = TRAINED,
                 rounds: Annotated[int, typer.Option(min=1, help="timings of each contestant")] = 9,
                 threads: Annotated[int, typer.Option(min=1, max=2, help="2: two directions on two as well")] = 1,
                 json: JsonOption = None):
    """A step of sparse recurrent layers on our engine, against the best dense engine. One thread, one sequence."""
    from . import bench
    from . import bench_engine as b
    without = model == Path("none") or model == TRAINED and not model.exists()
    made, rows, bounds = b.engine(quick, None if without else model, rounds, threads)
    print(b.table(made, rows, bounds))
    if json:
        bench.save(json, "engine", rows, limits={"bytes_per_second": bounds.bandwidth, "macs_per_second": bounds.macs},
                   cases=[{"case": c.name, "steps": c.steps, "macs": c.macs, "dense": c.dense, "bytes": c.bytes,
                           "live": c.live} for c in made])


@benches.command("speech")
def bench_speech(corpus: Annotated[Path, typer.Option(help="a corpus folder, such as data/an4")],
                 model: Annotated[Path, typer.Option(help="a recogniser that `run` wrote")] = TRAINED,
                 against: Annotated[list[Path], typer.Option(help="another recogniser, or the name of a dense one, "
                                                             "which is timed untrained; may be repeated")] = (),
                 limit: Annotated[int, typer.Option(min=1, help="utterances of the test split")] = 20,
                 rounds: Annotated[int, typer.Option(min=1, help="timings of each contestant")] = 5,
                 json: JsonOption = None):
    """Whole utterances, from samples to text: the engine against PyTorch; start-up and memory."""
    from . import bench, bench_speech, experiments
    from .corpora import SpeechCorpus
    speech = SpeechCorpus(corpus)
    rows, seconds = bench_speech.speech(model, speech, limit, rounds, against)
    print(f"{seconds:.0f} seconds of speech, utterance by utterance")
    for row in rows:
        print(f"  {row.engine:24} {row.microseconds / 1000:7.2f} ms a second of speech, "
              f"{1e6 / row.microseconds:5.0f} times real time, "
              f"{rows[0].microseconds / row.microseconds:5.2f} times as fast as torch")
    begun, peak = bench_speech.start(model, speech.split("test")[0].path)
    print(f"a fresh process writes its first text after {begun:.2f} s and takes {peak:.0f} MB at most")
    if json:
        bench.save(json, "speech", rows, seconds=seconds, start_seconds=begun, peak_mb=peak,
                   experiment=experiments.load(model)[2].get("experiment"))


@benches.command("training")
def bench_training(profile: ProfileOption = "laptop",
                   name: Annotated[list[str], typer.Option(help="a recogniser; may be repeated")] =
                   ("ds2-lstm5", "ds2-hlstm3", "ds2-hlstm3-gp"),
                   precision: Annotated[list[str], typer.Option(help="fp32 or bf16; by default what there is")] = (),
                   batches: Annotated[int, typer.Option(min=1, help="from short utterances to long ones")] = 4,
                   rounds: Annotated[int, typer.Option(min=1, help="timings of each contestant")] = 3,
                   json: JsonOption = None):
    """A training step of the recognisers: how long it takes, and which part of it."""
    from . import bench
    from . import bench_training as b
    rows, sizes = b.training(name, profile, precision, batches, rounds)
    print(b.table(rows, sizes))
    if json:
        bench.save(json, "training", rows, profile=profile, **sizes)


@benches.command("captions")
def bench_captions(corpus: Annotated[Path, typer.Option(help="a corpus folder with features, such as data/ucm")],
                   model: Annotated[Path, typer.Option(help="a captioner that `run` wrote")] = TRAINED_CAPTIONER,
                   against: Annotated[list[Path], typer.Option(help="another captioner; may be repeated")] = (),
                   limit: Annotated[int, typer.Option(min=1, help="pictures of the test split")] = 20,
                   rounds: Annotated[int, typer.Option(min=1, help="timings of each contestant")] = 5,
                   json: JsonOption = None):
    """Whole captions, from a picture's feature to words: the engine against PyTorch; start-up and memory."""
    from . import bench, bench_captions, experiments
    bench_captions.check(model, *against)
    opened = experiments.open_corpus(model, corpus)
    features = opened.features(opened.split("test", limit=limit))
    timed = bench_captions.captions(model, features, rounds, against=against)
    for case in dict.fromkeys(row.case for row in timed.rows):
        rows = [row for row in timed.rows if row.case == case]
        print(f"{case}, picture by picture, {len(features)} pictures")
        for row in rows:
            print(f"  {row.engine:32} {row.microseconds / 1000:8.2f} ms, {1e6 / row.microseconds:7.0f} a second, "
                  f"{rows[0].microseconds / row.microseconds:6.2f} times as fast as torch; "
                  f"{timed.words[case, row.engine]:4.1f} words")
    starts = bench_captions.starts(model, features[0])
    for name, (begun, peak) in starts.items():
        print(f"{name}: a fresh process has its first caption after {begun:.2f} s and takes {peak:.0f} MB at most")
    if json:
        bench.save(json, "captions", timed.rows, pictures=len(features),
                   experiment=experiments.load(model)[2].get("experiment"),
                   words=[{"case": case, "engine": name, "words": n} for (case, name), n in timed.words.items()],
                   starts=[{"engine": name, "seconds": begun, "peak_mb": peak}
                           for name, (begun, peak) in starts.items()])


@app.command()
def doctor():
    """Look at this machine: packages, cores, GPU, corpora. Exit code 1 if something needed is missing."""
    import torch

    from .caption_scores import java
    from .library import has_bfloat16
    from .profiles import MINI_SCENES, MINI_SPEECH, PROFILES, ROOT, home, place
    missing = []
    for package in ("accelerate", "jiwer", "jupyter_book", "numpy", "pandas", "papermill", "safetensors", "snakemake",
                    "soundfile"):
        found = importlib.util.find_spec(package) is not None
        spare = package in ("jupyter_book", "papermill", "snakemake") and home() != ROOT     # no checkout, no book
        print(f"{'ok     ' if found else 'absent ' if spare else 'missing'}  package {package}"
              + (": for the book, which is not here" if spare and not found else ""))
        missing += [] if found or spare else [package]
    for package, (extra, use) in EXTRAS.items():
        found = importlib.util.find_spec(package) is not None
        print(f"ok       package {package}" if found else
              f"absent   package {package}: for {use}; install it with `pip install '.[{extra}]'`")
    print(f"ok       torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores, "
          + (torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"))
    able = {"products in bfloat16": (has_bfloat16(), "recipes that ask for it train in float32"),
            "Java": (java(), "captions are scored without METEOR and PTB's tokens")}
    if importlib.util.find_spec("numba"):
        from .compact.kernels import cpu_features
        able["AVX-512"] = cpu_features(), "unstructured sparse layers gain less speed"
    for what, (there, without) in able.items():
        print(f"ok       {what}" if there else f"without  {what}: {without}")
    print(f"ok       {shutil.disk_usage(home()).free >> 30} GB free")
    minis = MINI_SPEECH, MINI_SCENES
    ways = {"data/an4": "data_prep.an4 --out data/an4", "data/coco": "data_prep.coco --out data/coco"}
    users = {}                                                     # the profiles of each corpus
    for p in PROFILES.values():
        for folder in {part.corpus: None for part in (p.speech, p.captions, p.flowers) if part}:
            users.setdefault(folder, []).append(p.name)
    for folder, names in users.items():
        there = (place(folder) / "corpus.json").exists()
        way = ways.get(folder, f"data_prep.karpathy --archive ARCHIVE --out {folder}")
        print(f"{'ok     ' if there else 'absent '}  corpus {folder}"
              + ("" if there else ": it comes with the code, restore it from git" if folder in minis else
                 f": `python -m {way}` (for the profile {', '.join(names)})"))
    if missing:
        raise SystemExit(f"missing: {', '.join(missing)}; install with `pip install -r requirements.lock`")
    if not all((place(folder) / "corpus.json").exists() for folder in minis):
        raise SystemExit(1)


def _short(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def main() -> None:
    """Runs the command line; what users can mend is one line on standard error and exit code 1, not a traceback.

    SIGTERM unwinds it as an error does, so that nothing that it began goes on or stays. Exit code 143.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if hasattr(sys.stdout, "reconfigure"):
        utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"      # else not all that we print can be
        sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "replace")    # a file's name need not be text
    try:
        app()
    except (UserError, OSError, ValueError) as error:
        code = getattr(error, "exit_code", 1)
        print(error if code == 130 else f"error: {told(error)}", file=sys.stderr)
        sys.exit(code)
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        print(f"error: {missing.name} is not installed; install what this needs with `pip install "
              f"'.[{EXTRAS[package][0]}]'`", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
