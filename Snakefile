# The graph of the book: corpora -> runs -> chapters -> book.
#
#     make book PROFILE=laptop            (which calls: snakemake --config profile=laptop)
#
# A chapter says in its notebook's metadata what it needs: {"hlstm": {"runs": [...], "corpora": [...]}}.
# What it imports is read from its code. A run depends on the training code alone, and decides by the
# key in its record whether it has anything to do; so a record is updated here, never deleted first.
# Records of desk and paper are history: made when missing, otherwise never touched.
import sys

sys.path.insert(0, workflow.basedir)
from book.tools import graph

PROFILE = config.get("profile", "laptop")
if PROFILE not in graph.PROFILES:
    raise WorkflowError(f"profile {PROFILE!r} is unknown; choose one of: {', '.join(graph.PROFILES)}")
SEEDS = graph.SEEDS[PROFILE]
PAGES = graph.pages()
CHAPTERS = {chapter.page: chapter for chapter in graph.chapters()}
EXECUTED = f"_build/executed/{PROFILE}"
PYTHON = sys.executable
TOOLS = ["book/tools/graph.py", "book/tools/lint.py"]


def manifest(folder):
    return f"{folder}/manifest.csv"


def chapter_inputs(wildcards):
    chapter = CHAPTERS[wildcards.page]
    runs = [graph.record_of(name, PROFILE, seed) for name in chapter.runs for seed in SEEDS]
    # The page shows the recorded results beside this run's, so a new record renews it.
    kept = [path for name in chapter.runs for path in graph.kept_records(name)]
    corpora = [manifest(graph.CORPORA[kind][PROFILE]) for kind in chapter.corpora]
    return [*dict.fromkeys([*runs, *kept, *chapter.code]), *map(ancient, corpora)]


wildcard_constraints:
    page="book/.+",
    profile="smoke|laptop",
    kept="desk|paper",
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
        lambda w: [manifest(graph.corpus_of(w.experiment, w.profile)), *graph.training_code()],
    output:
        update("results/local/{profile}/{experiment}/seed{seed}.json"),
    shell:
        "{PYTHON} -m hlstm_src run {wildcards.experiment} --profile {wildcards.profile} --seed {wildcards.seed}"
        " 2>&1 && touch {output}"


rule recorded_run:
    input:
        lambda w: ancient(manifest(graph.corpus_of(w.experiment, w.kept))),
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
