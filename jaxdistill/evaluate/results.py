"""What an evaluation found: scores that can be added, one table, and JSON."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextScore:
    """Sums over a text's targets, and the means that they stand for. Scores of different texts may be added.

    nats: -Σ log p(target). kl_nats, agreements: sums over targets, None where there is no teacher to compare with.
    """

    nats: float
    tokens: int
    bytes: int
    kl_nats: float | None = None
    agreements: float | None = None

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def kl_nats_per_token(self) -> float | None:
        """KL(teacher ‖ model)."""
        return None if self.kl_nats is None else self.kl_nats / self.tokens

    @property
    def top_one_agreement(self) -> float | None:
        """The share of positions where model and teacher rank the same token first."""
        return None if self.agreements is None else self.agreements / self.tokens

    def __add__(self, other: TextScore) -> TextScore:
        def add(a: float | None, b: float | None) -> float | None:
            return None if a is None or b is None else a + b

        return TextScore(
            nats=self.nats + other.nats,
            tokens=self.tokens + other.tokens,
            bytes=self.bytes + other.bytes,
            kl_nats=add(self.kl_nats, other.kl_nats),
            agreements=add(self.agreements, other.agreements),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "bits_per_byte": self.bits_per_byte,
            "kl_nats": self.kl_nats_per_token,
            "top_one_agreement": self.top_one_agreement,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoiceScore:
    """Accuracy on multiple-choice items, by the summed log-probability and by that divided by the option's bytes."""

    items: int
    summed: float
    per_byte: float

    def to_dict(self) -> dict[str, Any]:
        return {"items": self.items, "accuracy_summed": self.summed, "accuracy_per_byte": self.per_byte}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Models by name: text by domain, and multiple choice by the name of the set. teacher: one of the models."""

    text: Mapping[str, Mapping[str, TextScore]] = dataclasses.field(default_factory=dict)
    choices: Mapping[str, Mapping[str, ChoiceScore]] = dataclasses.field(default_factory=dict)
    teacher: str | None = None

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys([*self.text, *self.choices]))

    def all_text(self, model: str) -> TextScore:
        """All domains together: every token and byte counts the same."""
        return functools.reduce(operator.add, self.text[model].values())

    def to_dict(self) -> dict[str, Any]:
        """JSON values: {"teacher", "models": {name: {"text": {domain: …}, "all_text": …, "choices": {set: …}}}}."""
        found: dict[str, Any] = {name: {} for name in self.models}
        for name, domains in self.text.items():
            found[name]["text"] = {domain: value.to_dict() for domain, value in domains.items()}
            found[name]["all_text"] = self.all_text(name).to_dict()
        for name, sets in self.choices.items():
            found[name]["choices"] = {key: value.to_dict() for key, value in sets.items()}
        return {"teacher": self.teacher, "models": found}

    def table(self) -> str:
        """One aligned table: a row for each model, columns for domains and measures. Missing values are a dash."""
        return format_table(table_of(self.to_dict()))


Column = tuple[str, str, list[str]]
"""What a column measures, its own name, and its cells."""


def table_of(evaluation: Mapping[str, Any]) -> tuple[list[str], list[Column]]:
    """Row names and columns of an evaluation in the form of `Evaluation.to_dict`."""
    models = evaluation["models"]
    names = list(models)
    domains = list(dict.fromkeys(d for m in models.values() for d in m.get("text", {})))
    sets = list(dict.fromkeys(s for m in models.values() for s in m.get("choices", {})))
    columns: list[Column] = []

    def add(measure: str, title: str, path: tuple[str, ...], form: str) -> None:
        columns.append((measure, title, [_cell(models[name], path, form) for name in names]))

    for domain in domains:
        add("bits per byte", domain, ("text", domain, "bits_per_byte"), ".3f")
    if len(domains) > 1:
        add("bits per byte", "all", ("all_text", "bits_per_byte"), ".3f")
    if domains and evaluation.get("teacher") is not None:
        add("beside the teacher", "KL, nats", ("all_text", "kl_nats"), ".3f")
        add("beside the teacher", "top-1 equal", ("all_text", "top_one_agreement"), ".1%")
    for each in sets:
        items = max(m["choices"][each]["items"] for m in models.values() if each in m.get("choices", {}))
        add(f"{each}, {items} items", "summed", ("choices", each, "accuracy_summed"), ".2f")
        add(f"{each}, {items} items", "per byte", ("choices", each, "accuracy_per_byte"), ".2f")
    return names, columns


def _cell(values: Mapping[str, Any], path: tuple[str, ...], form: str) -> str:
    value: Any = values
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return "–" if value is None else format(value, form)


def format_table(table: tuple[list[str], list[Column]]) -> str:
    """The table as text, with measures over the columns that share them."""
    names, columns = table
    first = max(map(len, [*names, "model"]))
    widths = [max(map(len, [title, *cells])) for _, title, cells in columns]
    # A measure may be longer than its columns: the last of them then widens.
    runs: list[list[int]] = []
    for index, (measure, _, _) in enumerate(columns):
        if runs and columns[runs[-1][0]][0] == measure:
            runs[-1].append(index)
        else:
            runs.append([index])
    for run in runs:
        missing = len(columns[run[0]][0]) - (sum(widths[i] for i in run) + 2 * (len(run) - 1))
        widths[run[-1]] += max(0, missing)
    spans = [(columns[run[0]][0], sum(widths[i] for i in run) + 2 * (len(run) - 1)) for run in runs]
    rows = [("", [measure.ljust(width) for measure, width in spans])]
    rows += [("model", [title.rjust(width) for (_, title, _), width in zip(columns, widths, strict=True)])]
    for index, name in enumerate(names):
        rows += [(name, [cells[index].rjust(width) for (_, _, cells), width in zip(columns, widths, strict=True)])]
    lines = ["  ".join([name.ljust(first), *cells]) for name, cells in rows]
    return "\n".join(line.rstrip() for line in lines)
