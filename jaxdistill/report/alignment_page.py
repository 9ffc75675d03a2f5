"""The alignment as a page: chunks in a row, coloured by how far apart the two models are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from html import escape
from pathlib import Path, PurePath

from jaxdistill.evaluate.alignment import AlignedView, Cell, Token
from jaxdistill.formats.paths import AnyPath, any_path, write_text
from jaxdistill.report.alignment import facts, totals, visible
from jaxdistill.report.page import html_page, html_table

FULL_NATS = 3.0
"""The difference that has the strongest colour."""
COLOURS = 3


def write_alignment(view: AlignedView, path: AnyPath, *, student: str, teacher: str) -> Path:
    """Writes the page and returns where it is. student, teacher: what the two sides are called."""
    page = any_path(path)
    write_text(page, alignment_page(view, student=student, teacher=teacher))
    return page


def alignment_page(view: AlignedView, *, student: str, teacher: str) -> str:
    """The page as HTML: numbers, a legend, and the text. Details of a chunk or a token show under the pointer."""
    tiles = "".join(f'<div class="tile"><b>{escape(n)}</b><span>{escape(what)}</span></div>' for n, what in facts(view))
    groups = itertools.groupby(view.cells, key=lambda cell: cell.group)
    flow = "".join(_group(view, index, list(cells)) for index, cells in groups)
    names = (f"{side}: {PurePath(name).name}" for side, name in (("student", student), ("teacher", teacher)))
    table = html_table(["", *names], totals(view))
    return html_page(
        "Two tokenizations of one text",
        f'<div class="tiles">{tiles}</div>\n<section><h2>Chunks</h2>\n{_legend(view)}\n'
        f'<div class="card flow">{flow}</div></section>\n<section><h2>In all</h2>\n{table}</section>',
        styles=("style.css", "alignment.css"),
    )


def _group(view: AlignedView, index: int | None, cells: Sequence[Cell]) -> str:
    """Cells that are compared as one share a line below; others stand alone."""
    drawn = "".join(_cell(cell) for cell in cells)
    if index is None:
        return drawn
    group = view.groups[index]
    what = f"chunk {group.first}" if group.first == group.last else f"chunks {group.first} to {group.last}, joined"
    told = (
        f"{what}: divergence {group.divergence:.3g}; with the word's end student {group.student:.3f}, teacher "
        f"{group.teacher:.3f} nats"
    )
    return f'<div class="joined" title="{escape(told)}">{drawn}</div>'


def _cell(cell: Cell) -> str:
    sides = "".join(
        f'<div class="{name}">{"".join(map(_token, side)) or "&nbsp;"}</div>'
        for name, side in zip(("student", "teacher"), cell.sides, strict=True)
    )
    if not cell.chunk:
        return f'<div class="cell alone">{sides}</div>'
    told = f"chunk {cell.chunk}, {cell.text_bytes} bytes"
    if not cell.compared:
        return f'<div class="cell left-out" title="{told}, not compared">{sides}</div>'
    known = [(name, nats) for name, nats in zip(("student", "teacher"), cell.nats, strict=True) if nats is not None]
    told += "".join(f"; {name} {nats:.3f} nats" for name, nats in known)
    if cell.difference is None:
        number = "".join(f"<small>{nats:.2f}</small>" for _, nats in known)
        return f'<div class="cell k{cell.chunk % COLOURS}" title="{told}">{sides}{number}</div>'
    return (
        f'<div class="cell {_ground(cell.difference)} title="{told}">{sides}<small>{cell.difference:+.2f}</small></div>'
    )


def _token(token: Token) -> str:
    told = f"id {token.id}" + ("" if token.log_prob is None else f", {token.log_prob:.3f} nats")
    return f'<span class="token" title="{told}">{escape(visible(token.text))}</span>'


def _ground(difference: float) -> str:
    """The rest of a class attribute, and the share of the colour in the ground, as attributes of an element."""
    strength = round(60 * min(1.0, abs(difference) / FULL_NATS))
    return f'{"likelier" if difference > 0 else "less-likely"}" style="--strength:{strength}%"'


def _legend(view: AlignedView) -> str:
    shown = ["upper row: the student's tokens; lower row: the teacher's"]
    if view.groups:
        scale = (-FULL_NATS, -FULL_NATS / 3, 0.0, FULL_NATS / 3, FULL_NATS)
        keys = "".join(f'<span class="swatch {_ground(nats)}>{nats:+g}</span>' for nats in scale)
        shown += [
            f"the student finds it less likely {keys} likelier: the number, in nats",
            "a line below: compared as one",
        ]
    elif any(nats is not None for nats in view.nats):
        shown += ["below: the log-likelihood in nats"]
    shown += ['<span class="swatch left-out">grey</span> not compared', "without ground: in no chunk"]
    return f'<p class="legend">{"".join(f"<span>{each}</span>" for each in shown)}</p>'
