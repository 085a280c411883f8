# The graph of the book: corpora -> runs -> chapters -> book.
#
#     make book PROFILE=laptop            (which calls: snakemake --config profile=laptop)
#
# A chapter says in its notebook's metadata what it needs: {"hlstm": {"runs": [...], "corpora": [...]}}.
# What it imports is read from its code. A run depends on the training code alone, and decides by the
# key in its record whether it has anything to do; so a record is updated here, never deleted first.
# Records of desk, wide and paper are history: made when missing, otherwise never touched.
import shlex
import sys

sys.path.insert(0, workflow.basedir)
from book.tools import graph

PROFILE = config.get("profile", "laptop")
if PROFILE not in graph.PROFILES:
    raise WorkflowError(f"profile {PROFILE!r} is unknown; choose one of: {', '.join(graph.PROFILES)}")
PAGES = graph.pages()
CHAPTERS = {chapter.page: chapter for chapter in graph.chapters()}
EXECUTED = f"_build/executed/{PROFILE}"
PYTHON = shlex.quote(sys.executable)
TOOLS = ["book/tools/graph.py", "book/tools/lint.py"]


def manifest(folder):
    return f"{folder}/manifest.csv"


def corpus(wildcards):
    """The manifest of an experiment's corpus, where it has one."""
    folder = graph.corpus_of(wildcards.experiment, wildcards.get("kept") or wildcards.profile)
    return [manifest(folder)] if folder else []


def chapter_inputs(wildcards):
    chapter = CHAPTERS[wildcards.page]
    runs = [graph.record_of(name, PROFILE, seed) for name in chapter.runs for seed in graph.seeds(name, PROFILE)]
    # The page shows the recorded results beside this run's, so a new record renews it.
    kept = [path for name in chapter.runs for path in graph.kept_records(name)]
    corpora = [manifest(graph.CORPORA[kind][PROFILE]) for kind in chapter.corpora]
    return [*dict.fromkeys([*runs, *kept, *chapter.files, *chapter.code]), *map(ancient, corpora)]


wildcard_constraints:
    page="book/.+",
    profile="smoke|laptop",
    kept="desk|wide|paper",
    experiment="[a-z0-9][a-z0-9_.-]*",
    seed=r"\d+",


rule book:
    input:
        executed=[f"{EXECUTED}/{page}.ipynb" for page in CHAPTERS],
        text=[f"{page}.md" for page in PAGES if page not in CHAPTERS],
        top=["_config.yml", "_toc.yml", "references.bib", "book/tools/render.py", *TOOLS],
        beside=graph.beside_pages(),
    output:
        f"_build/site/{PROFILE}/_build/html/index.html",
    shell:
        "{PYTHON} -m book.tools.render --profile {PROFILE} 2>&1"


rule chapter:
    input:
        needs=chapter_inputs,
        tools=["book/tools/execute.py", *TOOLS],
        notebook="{page}.ipynb",
    output:
        EXECUTED + "/{page}.ipynb",
    shell:
        "{PYTHON} -m book.tools.execute {input.notebook} {output} --profile {PROFILE} 2>&1"


rule run:
    input:
        lambda w: [*corpus(w), *graph.training_code()],
    output:
        update("results/local/{profile}/{experiment}/seed{seed}.json"),
    wildcard_constraints:
        experiment="(?!toy-).+",
    shell:
        "{PYTHON} -m hlstm_src run {wildcards.experiment} --profile {wildcards.profile} --seed {wildcards.seed}"
        " 2>&1 && touch -c {output}"


# Runs of seconds: one job trains all seeds, since starting takes as long as training.
rule run_seeds:
    input:
        graph.training_code(),
    output:
        [update(f"results/local/{{profile}}/{{experiment}}/seed{k}.json") for k in graph.seeds("toy", PROFILE)],
    wildcard_constraints:
        experiment="toy-.+",
    params:
        seeds=" ".join(f"--seed {k}" for k in graph.seeds("toy", PROFILE)),
    shell:
        "{PYTHON} -m hlstm_src run {wildcards.experiment} --profile {wildcards.profile} {params.seeds}"
        " 2>&1 && touch -c {output}"


rule recorded_run:
    input:
        lambda w: ancient(corpus(w)),
    output:
        update("results/{kept}/{experiment}/seed{seed}.json"),
    threads: workflow.cores
    shell:
        "{PYTHON} -m hlstm_src run {wildcards.experiment} --profile {wildcards.kept} --seed {wildcards.seed}"
        " 2>&1"


rule an4:
    output:
        "data/an4/manifest.csv",
    shell:
        # An archive that is at hand already is taken, otherwise it is downloaded.
        '{PYTHON} -m data_prep.an4 --out data/an4'
        ' ${{HLSTM_REAL_DATA:+--archive "$HLSTM_REAL_DATA/an4_sphere.tar.gz"}} 2>&1'


# The archives of pictures are not to be had by an address: whoever has them says where they lie.
rule captions:
    output:
        "data/{corpus}/manifest.csv",
    wildcard_constraints:
        corpus="ucm|flowers",
    shell:
        '{{ archives="${{HLSTM_REAL_DATA:?is not set: say with it where {wildcards.corpus}_captions.tar.gz lies, or'
        ' prepare data/{wildcards.corpus} as the README tells}}"'
        ' && {PYTHON} -m data_prep.karpathy --archive "$archives/{wildcards.corpus}_captions.tar.gz"'
        ' --out data/{wildcards.corpus}'
        ' && {PYTHON} -m data_prep.features --corpus data/{wildcards.corpus} --encoder efficientnet_lite0; }} 2>&1'


rule coco:
    output:
        "data/coco/manifest.csv",
    shell:
        'echo "error: data/coco: 19 GB, to be prepared first; python -m data_prep.coco --help tells how"; exit 1'
