"""What a search found: the ranked table as text, and the page with the picture of its Pareto front."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from html import escape

from jaxdistill.formats.paths import AnyPath, any_path, write_text
from jaxdistill.report.charts import front_chart, value
from jaxdistill.report.data import short_count
from jaxdistill.report.page import html_page, html_table

TITLES = {
    "parameters": "parameters",
    "active_parameters": "active parameters",
    "memory_mb": "memory, MB",
    "latency_ms": "latency, ms",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One shape: its plan, its costs, and its score (lower is better) before and after a short distillation."""

    name: str
    plan: str
    costs: Mapping[str, float]
    before: float
    after: float


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points that no other one beats in both numbers, by rising first number; of equals the first."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front


def search_table(ranked: Sequence[Candidate], *, limited: Sequence[str]) -> str:
    """Aligned text: one line for each candidate, best first, with its rank before training."""
    head, rows = _cells(ranked, limited)
    table = [head, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    lines = []
    for row in table:
        cells = (
            cell.ljust(w) if i == 1 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def write_search_page(
    path: AnyPath,
    ranked: Sequence[Candidate],
    *,
    limited: Sequence[str],
    unit: str,
    tokens: int,
    left: int = 0,
) -> None:
    """Candidates best first. limited: the costs that have a limit; the picture is over the first. left: how many are
    still to be tried."""
    main = limited[0]
    # One that diverged is in the table alone.
    drawn = [row for row in ranked if math.isfinite(row.after) and math.isfinite(row.before)]
    points = [(row.costs[main], row.after) for row in drawn]
    chart = front_chart(
        "Score and cost",
        unit,
        [(row.name, row.costs[main], row.before, row.after) for row in drawn],
        front=pareto_front(points),
        x_title=TITLES[main],
    )
    state = f", {left} still to be tried" if left else ""
    told = f"Every candidate was distilled on {short_count(tokens)} tokens{state}. Scores: {unit}, lower is better."
    body = (
        f"<section><p>{escape(told)}</p>{chart}</section>\n"
        f"<section><h2>Candidates</h2>{html_table(*_cells(ranked, limited))}</section>"
    )
    write_text(any_path(path), html_page("Search for a shape", body))


def _cells(ranked: Sequence[Candidate], limited: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    before = sorted(row.before for row in ranked)
    shown = list(dict.fromkeys(["parameters", *limited]))
    head = ["rank", "candidate", *(TITLES[name] for name in shown), "before", "rank before", "after"]
    rows = [
        [
            str(rank),
            row.name,
            *(f"{row.costs[name]:,.0f}" if row.costs[name] >= 1000 else value(row.costs[name]) for name in shown),
            f"{row.before:.4f}",
            str(before.index(row.before) + 1),
            f"{row.after:.4f}" if math.isfinite(row.after) else "diverged",
        ]
        for rank, row in enumerate(ranked, 1)
    ]
    return head, rows
