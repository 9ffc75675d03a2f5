"""Two tokenizations of one text for a terminal: both sides of every chunk one under the other, with what each model
makes of it."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxdistill.evaluate.alignment import AlignedView, Cell, Group, Token

MARKS = {" ": "·", "\n": "⏎", "\t": "⇥"}
BAR = "│"
BACKGROUNDS = (153, 223, 157, 225)
"""Of chunks, in turn: light colours of the 256 that terminals have, under black letters."""
NOT_COMPARED = 250
LABELS = ("student", "teacher", "student nats", "teacher nats", "difference", "ALM x1000")
LABEL_WIDTH = max(map(len, LABELS)) + 1


def visible(text: bytes) -> str:
    """What a token looks like: white space as marks; what does not print, and parts of a character, as hex."""
    shown = [
        MARKS.get(each) or (each if each.isprintable() else "".join(f"\\x{byte:02x}" for byte in each.encode()))
        for each in text.decode("utf-8", errors="backslashreplace")
    ]
    return "".join(shown) or "∅"


def alignment_text(view: AlignedView, *, width: int = 100, colour: bool = False) -> str:
    """Lines of at most `width` columns, broken between chunks, and a summary.

    Chunks stand in brackets, those that are not compared in parentheses; with colour, on coloured ground instead, and
    nothing else of the text changes. Below each stand its log-likelihoods, and below the chunks that are compared as
    one their divergence, times 1000. A chunk that no line holds is continued on the next.
    """
    room = width - LABEL_WIDTH
    columns = [column for cell in view.cells for column in _columns(view, cell, room, colour)]
    blocks = ["\n".join(_block(view, line, colour)) for line in _lines(columns, room)]
    return "\n\n".join([*blocks, _summary(view)])


def facts(view: AlignedView) -> list[tuple[str, str]]:
    """The numbers that matter most, and what each is."""
    found = [(f"{len(view.compared)}", f"of {len(view.chunks)} chunks compared")]
    if view.chunks:
        found.append((f"{view.one_to_one:.1%}", "of the chunks one token on both sides"))
        found.append((f"{view.bytes_per_chunk:.2f}", "bytes of text in a chunk"))
    if view.divergence is not None:
        found.append((f"{view.divergence:.3g}", f"mean divergence of {len(view.groups)} groups of chunks"))
    return found


def totals(view: AlignedView) -> list[list[str]]:
    """Rows of a table: a name, the student's number, the teacher's."""

    def row(name: str, values: Sequence[float | None], form: str) -> list[str]:
        return [name, *("-" if value is None else f"{value:{form}}" for value in values)]

    rows = [row("tokens", view.tokens, ","), row("unsupervised tokens", view.unsupervised, ",")]
    if any(value is not None for value in view.nats):
        rows.append(row("log-likelihood, nats", view.nats, ",.2f"))
        rows.append(row("bits per byte", view.bits_per_byte, ".4f"))
    return rows


class _Column(NamedTuple):
    """One column of a block, a chunk's or a part of it. texts: both sides. numbers: what stands below, by label. opens,
    closes: whether the group's bracket begins and ends here."""

    cell: Cell
    texts: tuple[str, ...]
    numbers: dict[str, str]
    opens: bool
    closes: bool

    @property
    def width(self) -> int:
        room = {"ALM x1000": 2}  # its bracket; other numbers keep their distance from the one before
        numbers = [len(number) + room.get(label, 1) for label, number in self.numbers.items()]
        return max(*map(columns_of, self.texts), *numbers)


def columns_of(text: str) -> int:
    """How many columns of a terminal a text takes."""
    return sum(
        0 if unicodedata.combining(each) else 2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text
    )


def _columns(view: AlignedView, cell: Cell, room: int, colour: bool) -> Iterator[_Column]:
    """A cell's columns: one, unless it is wider than a line."""
    edges = "  " if colour or not cell.chunk else "[]" if cell.compared else "()"
    parts = list(itertools.zip_longest(*(_broken(side, edges, room) for side in cell.sides), fillvalue=""))
    group = None if cell.group is None else view.groups[cell.group]
    for index, texts in enumerate(parts, 1):
        last = index == len(parts)
        yield _Column(
            cell,
            texts,
            _numbers(cell, group) if last else {},
            opens=group is not None and group.first == cell.chunk and index == 1,
            closes=group is not None and group.last == cell.chunk and last,
        )


def _broken(tokens: Sequence[Token], edges: str, room: int) -> list[str]:
    """Tokens between bars and edges, in pieces of at most `room` columns (a token is never cut)."""
    pieces: list[str] = []
    for token in tokens:
        joined = f"{pieces[-1]}{BAR}{visible(token.text)}" if pieces else edges[0] + visible(token.text)
        if pieces and columns_of(joined) < room:
            pieces[-1] = joined
        else:
            pieces.append(joined if not pieces else visible(token.text))
    return [*pieces[:-1], pieces[-1] + edges[1]] if pieces else []


def _numbers(cell: Cell, group: Group | None) -> dict[str, str]:
    """What stands below a chunk; the divergence of a group below its last one."""
    student, teacher = cell.nats
    found = {
        "student nats": "" if student is None else f"{student:.2f}",
        "teacher nats": "" if teacher is None else f"{teacher:.2f}",
        "difference": "" if cell.difference is None else f"{cell.difference:+.2f}",
        "ALM x1000": "" if group is None or group.last != cell.chunk else f"{1000 * group.divergence:.2f}",
    }
    return {label: number for label, number in found.items() if number}


def _lines(columns: Sequence[_Column], room: int) -> Iterator[list[_Column]]:
    line: list[_Column] = []
    for column in columns:
        if line and sum(each.width for each in line) + column.width > room:
            yield line
            line = []
        line.append(column)
    if line:
        yield line


def _block(view: AlignedView, line: Sequence[_Column], colour: bool) -> Iterator[str]:
    """The rows of one line of chunks: both tokenizations, and those numbers that are known."""
    for side, label in enumerate(LABELS[:2]):
        yield _row(label, [_tokens(column, side, colour) for column in line])
    known = [label for label, nats in zip(LABELS[2:4], view.nats, strict=True) if nats is not None]
    known += ["difference"] if view.groups else []
    for label in known:
        yield _row(label, [column.numbers.get(label, "").rjust(column.width) for column in line])
    if view.groups:
        joined = itertools.groupby(line, key=lambda column: column.cell.group)
        yield _row("ALM x1000", [_bracket(list(columns)) for _, columns in joined])


def _row(label: str, pieces: Sequence[str]) -> str:
    return (label.ljust(LABEL_WIDTH) + "".join(pieces)).rstrip()


def _tokens(column: _Column, side: int, colour: bool) -> str:
    """A column's tokens, filled to its width."""
    cell, text = column.cell, column.texts[side]
    filled = text + " " * (column.width - columns_of(text))
    if not colour:
        return filled
    if not cell.chunk:
        return f"\033[2m{filled}\033[0m"
    ground = BACKGROUNDS[cell.chunk % len(BACKGROUNDS)] if cell.compared else NOT_COMPARED
    return f"\033[38;5;16;48;5;{ground}m{filled}\033[0m"


def _bracket(columns: Sequence[_Column]) -> str:
    """A bracket below the columns of one group, as far as it is on this line; the number stands where it ends."""
    width, last = sum(column.width for column in columns), columns[-1]
    if last.cell.group is None:
        return " " * width
    opening, closing = "╰" if columns[0].opens else "─", "╯" if last.closes else "─"
    return opening + last.numbers.get("ALM x1000", "").center(width - 2, "─") + closing


def _summary(view: AlignedView) -> str:
    rows = [["", "student", "teacher"], *totals(view)]
    widths = [max(len(row[index]) for row in rows) for index in range(3)]
    table = [f"{name:<{widths[0]}}  {student:>{widths[1]}}  {teacher:>{widths[2]}}" for name, student, teacher in rows]
    return "\n".join([*table, *(f"{number} {what}" for number, what in facts(view))])
