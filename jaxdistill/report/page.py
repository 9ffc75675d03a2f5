"""The page itself: sections in order, each a pure function of the report's data, and nothing from outside the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from jaxdistill.evaluate.results import Column, table_of
from jaxdistill.formats.paths import AnyPath, any_path, write_text
from jaxdistill.report.charts import Series, dot_rows, line_chart, value
from jaxdistill.report.data import ReportData, collect, number, short_count

NAME = "report.html"


def write_report(run: AnyPath) -> Path:
    """Writes RUN/report.html from what the directory holds, and returns its path. See `collect` for errors."""
    page = any_path(run) / NAME
    write_text(page, render(collect(run)))
    return page


def render(data: ReportData) -> str:
    """The page as HTML. A part without data is not there; text from outside is escaped."""
    sections = [
        _headline(data),
        _section("Models", _models(data)),
        _section("Evaluation", _evaluation(data)),
        _section("Training", _curves(data)),
        _section("Samples", _samples(data)),
        _section("Time", _times(data)),
        _section("Configuration", _details("Every setting of the run", _flat(data.config))),
        _section("Versions", _details("What it was made with", _flat(data.versions))),
    ]
    body = "\n".join(section for section in sections if section)
    return html_page(data.title, body)


def html_page(title: str, body: str, *, styles: Sequence[str] = ("style.css",)) -> str:
    """A whole page around some sections, with nothing from outside the file. styles: sheets of this directory."""
    sheets = files("jaxdistill.report")
    style = "".join(sheets.joinpath(name).read_text(encoding="utf-8") for name in styles)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"<header><p>jaxdistill</p><h1>{escape(title)}</h1></header>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


# The numbers that matter most.


def _headline(data: ReportData) -> str:
    tiles = [f'<div class="tile"><b>{escape(n)}</b><span>{escape(t)}</span></div>' for n, t in _facts(data)]
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _facts(data: ReportData) -> Iterator[tuple[str, str]]:
    gap = closed_gap(data.evaluation) if data.evaluation else None
    if gap:
        share, student, start = gap
        yield f"{share:.0%}", f"of the gap in bits per byte from {start} to the teacher closed by {student}"
    if len(data.models) == 2 and data.models[0].parameters:
        share = data.models[1].parameters / data.models[0].parameters
        yield f"{share:.0%}", "of the teacher's parameters"
    if data.held_out:
        last = data.held_out[-1]["held_out"]
        for key, text in (("kl_nats", "nats from the teacher on held-out text"), ("bits_per_byte", "bits per byte")):
            found = number(last.get(key))
            if found is not None:
                yield value(found), text
                break
    if data.steps:
        last = data.steps[-1]
        tokens = number(last.get("tokens"))
        if tokens:
            yield short_count(tokens), f"tokens in {last['step']:,} steps"


def closed_gap(evaluation: Mapping[str, Any]) -> tuple[float, str, str] | None:
    """(share, best student, next best): how much of what lies between the next best and the teacher the best closed.

    None without a teacher, without two students, or where the next best is no worse than the teacher.
    """
    bits = {
        name: number(model.get("all_text", {}).get("bits_per_byte")) for name, model in evaluation["models"].items()
    }
    teacher = bits.pop(evaluation.get("teacher"), None)
    students = {name: found for name, found in bits.items() if found is not None}
    if teacher is None or len(students) < 2:
        return None
    best, start = sorted(students, key=lambda n: students[n])[:2]
    if not students[start] > max(teacher, students[best]):
        return None
    return (students[start] - students[best]) / (students[start] - teacher), best, start


# Sections.


def _models(data: ReportData) -> str:
    if not data.models:
        return ""
    rows = [
        [m.name, m.family, f"{m.parameters:,}", f"{m.layers}", f"{m.vocab:,}", f"{m.bytes / 1e6:,.1f} MB"]
        for m in data.models
    ]
    return html_table(["", "family", "parameters", "layers", "vocabulary", "on disk"], rows)


def _evaluation(data: ReportData) -> str:
    if not data.evaluation or not data.evaluation["models"]:
        return ""
    names, columns = table_of(data.evaluation)
    # The same colours in both charts; the teacher has no distance to itself.
    charts = [
        dot_rows(title, unit, rows, names=names)
        for title, unit, rows in (
            ("Bits per byte by domain", "lower is better", _by_domain(data.evaluation, "bits_per_byte")),
            ("Distance from the teacher", "KL, nats per token", _by_domain(data.evaluation, "kl_nats")),
        )
    ]
    drawn = "".join(charts)
    return _grouped_table(names, columns) + (f'<div class="grid-2">{drawn}</div>' if drawn else "")


def _by_domain(evaluation: Mapping[str, Any], measure: str) -> list[tuple[str, list[tuple[str, float]]]]:
    models = evaluation["models"]
    domains = list(dict.fromkeys(d for model in models.values() for d in model.get("text", {})))
    rows = []
    for domain in domains:
        found = [(name, number(model.get("text", {}).get(domain, {}).get(measure))) for name, model in models.items()]
        rows.append((domain, [(name, each) for name, each in found if each is not None]))
    return rows


def _curves(data: ReportData) -> str:
    def over_tokens(lines: Sequence[Mapping[str, Any]], *path: str) -> tuple[tuple[float, float], ...]:
        points = []
        for line in lines:
            found: Any = line
            for key in path:
                found = found.get(key) if isinstance(found, Mapping) else None
            if number(found) is not None:
                points.append((_tokens(data, line), float(found)))
        return tuple(points)

    terms = list(dict.fromkeys(name for line in data.steps for name in line.get("terms") or {}))
    shown = [Series(name=name, points=over_tokens(data.steps, "terms", name)) for name in terms]
    if len(shown) != 1:
        shown.insert(0, Series(name="loss", points=over_tokens(data.steps, "loss")))

    def single(name: str, lines: Sequence[Mapping[str, Any]], *path: str) -> list[Series]:
        return [Series(name=name, points=over_tokens(lines, *path))]

    charts = [
        line_chart("Training loss", "mean over supervised tokens", shown),
        line_chart("Held-out KL", "nats per token", single("KL", data.held_out, "held_out", "kl_nats")),
        line_chart("Held-out text", "bits per byte", single("student", data.held_out, "held_out", "bits_per_byte")),
        line_chart("Learning rate", "", single("rate", data.steps, "learning_rate"), from_zero=True),
        line_chart("Gradient norm", "before clipping", single("norm", data.steps, "gradient_norm"), from_zero=True),
        line_chart("Speed", "tokens per second", single("speed", data.steps, "tokens_per_second"), from_zero=True),
    ]
    drawn = "\n".join(chart for chart in charts if chart)
    return f'<div class="grid-2">{drawn}</div>' if drawn else ""


def _tokens(data: ReportData, line: Mapping[str, Any]) -> float:
    """Tokens at a line; held-out lines have only the step, and every step has as many tokens."""
    own = number(line.get("tokens"))
    if own is not None:
        return own
    known = next((each for each in data.steps if number(each.get("tokens")) and each["step"]), None)
    return float(line["step"]) if known is None else line["step"] * known["tokens"] / known["step"]


def _samples(data: ReportData) -> str:
    prompts = list(dict.fromkeys(sample.prompt for sample in data.samples))
    parts = []
    for prompt in prompts:
        columns = [
            f'<div class="card"><h3>{escape(s.model)}</h3><p class="sample"><span>{escape(prompt)}</span>'
            f"{escape(s.continuation)}</p></div>"
            for s in data.samples
            if s.prompt == prompt
        ]
        parts.append(f'<div class="samples">{"".join(columns)}</div>')
    return "\n".join(parts)


def _times(data: ReportData) -> str:
    if not data.times:
        return ""
    total = sum(data.times.values())
    rows = []
    for name, seconds in data.times.items():
        width = max(0.3, 100 * seconds / total)
        rows.append(
            f'<div class="time"><span>{escape(name)}</span><div><i style="width:{width:.1f}%"></i></div>'
            f"<b>{_duration(seconds)}</b></div>"
        )
    rows.append(f'<div class="time total"><span>total</span><div></div><b>{_duration(total)}</b></div>')
    return f'<div class="card">{"".join(rows)}</div>'


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


# Tables and lists.


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls where it is too wide; the first cell of a row names it."""
    cells = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{_rows(rows)}</tbody></table></div>'


def _grouped_table(names: Sequence[str], columns: Sequence[Column]) -> str:
    """Columns of one measure stand under it; the lines between measures are drawn by the class `first`."""
    runs: list[tuple[str, int]] = []
    firsts = set()
    for index, (measure, _, _) in enumerate(columns):
        if runs and runs[-1][0] == measure:
            runs[-1] = (measure, runs[-1][1] + 1)
        else:
            runs.append((measure, 1))
            firsts.add(index)
    measures = "".join(f'<th class="first" scope="colgroup" colspan="{size}">{escape(m)}</th>' for m, size in runs)
    titles = "".join(
        f'<th scope="col"{_first(index in firsts)}>{escape(title)}</th>' for index, (_, title, _) in enumerate(columns)
    )
    rows = [[name, *(cells[row] for _, _, cells in columns)] for row, name in enumerate(names)]
    body = _rows(rows, {index + 1 for index in firsts})
    return (
        f'<div class="scroll"><table><thead><tr class="measures"><th></th>{measures}</tr><tr><th></th>{titles}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>"
    )


def _rows(rows: Sequence[Sequence[str]], firsts: set[int] | None = None) -> str:
    lines = []
    for name, *cells in rows:
        drawn = "".join(
            f"<td{_first(index in (firsts or set()))}>{escape(cell)}</td>" for index, cell in enumerate(cells, 1)
        )
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{drawn}</tr>')
    return "".join(lines)


def _first(first: bool) -> str:
    return ' class="first"' if first else ""


def _details(summary: str, pairs: Sequence[tuple[str, str]]) -> str:
    if not pairs:
        return ""
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in pairs)
    return f"<details><summary>{escape(summary)} ({len(pairs)})</summary><dl>{rows}</dl></details>"


def _flat(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested values by dotted name; the kind of a part (`type`) stands at the part's own name."""
    if isinstance(tree, Mapping):
        pairs = []
        for key, node in tree.items():
            name = prefix if key == "type" and prefix else f"{prefix}.{key}" if prefix else str(key)
            pairs += _flat(node, name)
        return pairs
    if isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        return [pair for index, item in enumerate(tree) for pair in _flat(item, f"{prefix}.{index}")]
    if isinstance(tree, list):
        return [(prefix, ", ".join(map(str, tree)) or "none")]
    return [(prefix, "none" if tree is None else str(tree))]
