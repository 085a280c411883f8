"""What the tests of tables share: a record to be changed, and a cell of a table."""

from hlstm_src.records import RunRecord


def count(params, live):
    return {
        "params": params,
        "nonzero_params": live,
        "macs": params,
        "nonzero_macs": live,
        "flops": 2 * params,
        "nonzero_flops": 2 * live,
    }


def make(experiment, profile, seed=0, live=1000, **changes) -> RunRecord:
    counts = count(10_000_000, live)
    fields = {
        "experiment": experiment,
        "profile": profile,
        "seed": seed,
        "title": "A run",
        "key": "0" * 64,
        "recipe": {},
        "history": [],
        "scores": {"wer": 15.1, "cer": 6.8},
        "normalisation": "upper case",
        "counts": {"cell": counts, "model": counts},
        "provenance": {
            "commit": "abcdef0123" + "4" * 30,
            "dirty": False,
            "lock_sha256": "2" * 64,
            "versions": {},
            "corpus": "an4",
            "corpus_sha256": "3" * 64,
            "cpu": "A CPU",
            "gpu": None,
            "cores": 2,
            "threads": 1,
            "started": "2026-01-31T12:00:00+00:00",
            "ended": "2026-02-01T12:01:30+00:00",
            "seconds": 90.0,
            "command": "run",
        },
    }
    return RunRecord.model_validate(fields | changes)


def cell(table, row, group, heading):
    place = table.columns.index((group, heading))
    (cells,) = [cells for name, cells in table.rows if name == row]
    return cells[place]
