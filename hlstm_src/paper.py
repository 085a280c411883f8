"""The paper's own figures, read from `paper.yml`: each knows its unit and its source.

>>> str(claim("deepspeech2.wer_gp"))
'8.7 %'

What was not checked against the paper's PDF carries a dagger and is never held against a result.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, model_validator

Source = Literal["abstract", "derived", "unverified"]
DAGGER = "†"
FOOTNOTE = f"{DAGGER} not checked against the paper's PDF"
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    source: Source
    journal: bool = False  # it stands in the journal's abstract, not in arXiv's

    @property
    def mark(self) -> str:
        """The dagger of an unverified entry, else nothing."""
        return DAGGER if self.source == "unverified" else ""


class Figure(_Entry):
    """A number of the paper: `value` in `unit`, with its source and what it measures (`note`)."""

    written: str  # the digits as `paper.yml` has them
    unit: str
    note: str
    formula: str | None = None

    @model_validator(mode="after")
    def _derived_has_formula(self) -> Figure:
        if self.source == "derived" and self.formula is None:
            raise ValueError("a derived figure needs its formula")
        return self

    @property
    def value(self) -> float:
        digits = self.written.replace("_", "")
        return int(digits) if digits.isdigit() else float(digits)

    def text(self, value: float | None = None) -> str:
        """The figure (or another value in its place) in its unit and digits, without the dagger."""
        value = self.value if value is None else value
        if self.unit in ("weights", "FLOPs"):
            return short(value, max(3, len(self.written.replace("_", "").rstrip("0"))))
        number = f"{value:,.{len(self.written.partition('.')[2])}f}"
        return number + {"x": "x", "%": " %"}.get(self.unit, "")

    def __str__(self) -> str:
        return self.text() + self.mark


class Statement(_Entry):
    """Something that the paper says in words."""

    text: str


class Exhibit(_Entry):
    """A figure or table of the paper that the book makes again."""

    title: str


class Model(BaseModel):
    """A row of the paper's tables; `figures` by what they measure (params, wer, cider, ...)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    name: str
    cell: Literal["LSTM", "GRU", "H-LSTM"]
    layers: int
    figures: dict[str, Figure]


def short(value: float, digits: int = 3) -> str:
    """A count in three digits: 163 K, 2.60 M, 50.4 M; below a thousand as it is."""
    if abs(value) < 999.5:
        return f"{value:.0f}"
    power = int(f"{value:.{digits - 1}e}".partition("e")[2])  # after rounding: 999 999 is 1.00 M
    group = min(power // 3, 4)
    return f"{value / 1000**group:.{max(0, digits - 1 - power + 3 * group)}f} {' KMGT'[group]}"


@functools.cache
def _book() -> dict[str, Any]:
    # The base loader leaves every scalar as the text that was written, 11.60 with its nought.
    data = yaml.load(Path(__file__).with_name("paper.yml").read_text(encoding="utf-8"), yaml.BaseLoader)
    found = {key: Figure(key=key, written=row.pop("value"), **row) for key, row in data["figures"].items()}
    rows = data["models"]
    for key, model in ((key, model) for group in rows.values() for key, model in group.items()):
        model |= {"key": key, "figures": {name: _get(found, of) for name, of in model["figures"].items()}}
    return {
        "figures": found,
        "models": {name: {key: Model(**row) for key, row in group.items()} for name, group in rows.items()},
        "statements": {key: Statement(key=key, **row) for key, row in data["statements"].items()},
        "exhibits": {key: Exhibit(key=key, **row) for key, row in data["exhibits"].items()},
    }


def _get(entries: Mapping[str, Any], key: str) -> Any:
    """The entry, or a KeyError that names its nearest neighbours."""
    if key not in entries:
        near = get_close_matches(key, entries, n=3, cutoff=0.5)
        remedy = f"did you mean {', '.join(near)}?" if near else "its keys stand in that file"
        raise KeyError(f"paper.yml has no {key!r}; {remedy}")
    return entries[key]


def claim(key: str) -> Figure:
    """The figure of that name, such as `deepspeech2.wer_gp`. Raises KeyError for an unknown one."""
    return _get(_book()["figures"], key)


def goal(key: str) -> Figure:
    """The figure, to be held against a result. Raises ValueError for an unverified one."""
    figure = claim(key)
    if figure.source == "unverified":
        raise ValueError(f"{key}: {FOOTNOTE[2:]}; it may be shown, but nothing may be judged by it")
    return figure


def model(benchmark: str, key: str) -> Model:
    """A row of the paper's table of a benchmark: `model("deepspeech2", "compact")`."""
    return _get(_get(_book()["models"], benchmark), key)


def statement(key: str) -> Statement:
    """What the paper says in words. Raises KeyError for an unknown key."""
    return _get(_book()["statements"], key)


def exhibit(key: str) -> Exhibit:
    """An exhibit such as `tab-ds2-models`. Raises KeyError for an unknown key."""
    return _get(_book()["exhibits"], key)


def claims() -> dict[str, Figure]:
    """All figures by key."""
    return dict(_book()["figures"])


def models(benchmark: str) -> dict[str, Model]:
    """All rows of a benchmark, `neuraltalk` or `deepspeech2`, by key."""
    return dict(_get(_book()["models"], benchmark))


def statements() -> dict[str, Statement]:
    """All statements by key."""
    return dict(_book()["statements"])


def exhibits() -> dict[str, Exhibit]:
    """All exhibits by key."""
    return dict(_book()["exhibits"])


def compute(key: str) -> float:
    """The figure from its formula, unrounded; a figure without a formula as it is.

    Raises:
        ValueError: the formula holds more than numbers, names of figures and + - * / //.
    """
    figure = claim(key)
    return _evaluate(ast.parse(figure.formula, mode="eval").body) if figure.formula else figure.value


def _evaluate(node: ast.AST) -> float:
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.Attribute() | ast.Name():
            return compute(ast.unparse(node))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_evaluate(left), _evaluate(right))
    raise ValueError(f"paper.yml: {ast.unparse(node)!r} is no arithmetic")
