"""The report: what it shows comes from the run's files, what is missing is left out, and nothing is loaded or run."""

from __future__ import annotations

import html.parser
import json
import re

import pytest

from jaxdistill.report import ReportData, Sample, collect, render, write_report
from jaxdistill.report.charts import Series, dot_rows, line_chart, ticks
from jaxdistill.report.page import closed_gap

STEPS = [
    {"step": 10, "tokens": 1000, "seconds": 1.0, "loss": 3.0, "terms": {"kl": 2.0, "ce": 1.0}, "learning_rate": 0.001},
    {"step": 20, "tokens": 2000, "seconds": 2.0, "loss": None, "terms": {"kl": None, "ce": 1.5}},
    {"step": 30, "tokens": 3000, "seconds": 3.0, "loss": 1.25, "terms": {"kl": 1.0, "ce": 0.25}},
]
HELD_OUT = [{"step": 20, "held_out": {"kl_nats": 0.5, "bits_per_byte": 1.5}}]
EVALUATION = {
    "teacher": "big",
    "models": {
        name: {
            "text": {"wiki": {"bits_per_byte": bits, "kl_nats": kl, "top_one_agreement": None}},
            "all_text": {"bits_per_byte": bits, "kl_nats": kl, "top_one_agreement": None},
        }
        for name, bits, kl in (("big", 1.0, None), ("fresh", 3.0, 2.5), ("taught", 1.5, 0.4))
    },
}
EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'


class Page(html.parser.HTMLParser):
    """What a browser would find: headings, texts, tags, and that every tag is closed."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.headings: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] == "style":
            return
        self.text += data
        if self._open and self._open[-1] in ("h1", "h2"):
            self.headings.append(data)


def full() -> ReportData:
    return ReportData(
        title="a run",
        steps=tuple(STEPS),
        held_out=tuple(HELD_OUT),
        evaluation=EVALUATION,
        samples=(Sample(model="taught", prompt="Once upon", continuation=" a time"),),
        times={"train": 90.0, "evaluate": 30.0},
        config={"type": "TrainConfig", "steps": 30, "losses": {"kl": {"type": "ForwardKL", "temperature": 2.0}}},
        versions={"jax": "0.10.2"},
    )


def test_the_page_has_every_part():
    page = Page(render(full()))
    sections = ["a run", "Evaluation", "Training", "Samples", "Time", "Configuration", "Versions"]
    assert page.headings == sections
    for shown in ("Once upon", " a time", "losses.kl.temperature", "0.10.2", "90.0 s", "2 min 00 s", "wiki"):
        assert shown in page.text
    # (3 - 1.5) of (3 - 1).
    assert "75%" in page.text


def test_what_is_missing_is_left_out():
    page = Page(render(ReportData(title="empty")))
    assert page.headings == ["empty"]
    assert not {"svg", "table", "details"} & set(page.tags)
    only_steps = Page(render(ReportData(title="t", steps=tuple(STEPS))))
    assert only_steps.headings == ["t", "Training"]
    assert "Held-out" not in only_steps.text
    assert "Gradient norm" not in only_steps.text


def test_the_page_needs_nothing_from_outside():
    text = render(full())
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href", "srcset") or name.startswith("on")]
    assert "url(" not in text
    assert "@import" not in text


def test_text_from_outside_is_text():
    evil = ReportData(
        title=EVIL,
        steps=({"step": 1, "loss": 1.0, "terms": {EVIL: 1.0, "kl": 2.0}},),
        evaluation={
            "teacher": EVIL,
            "models": {EVIL: {"text": {EVIL: {"bits_per_byte": 1.0}}, "choices": {EVIL: {"items": 1}}}},
        },
        samples=(Sample(model=EVIL, prompt=EVIL, continuation=EVIL),),
        times={EVIL: 1.0},
        config={EVIL: EVIL},
        versions={EVIL: EVIL},
    )
    page = Page(render(evil))
    assert not {"script", "img"} & set(page.tags)
    assert EVIL in page.text
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def points(chart: str) -> list[tuple[float, float]]:
    [line] = re.findall(r'points="([^"]*)"', chart)
    return [tuple(map(float, pair.split(","))) for pair in line.split()]


def test_a_curve_is_drawn_where_its_numbers_are():
    chart = line_chart("Loss", "nats", [Series(name="loss", points=((0, 4.0), (50, 2.0), (100, 0.0)))])
    (x0, y0), (x1, y1), (x2, y2) = points(chart)
    # Right is more tokens, up is more loss; SVG's y grows downwards.
    assert (x1 - x0, y1 - y0) == pytest.approx((x2 - x1, y2 - y1), abs=0.11)
    assert x0 < x1
    assert y0 < y1 < y2
    assert "<b>0</b>" in chart


def test_values_that_are_not_finite_are_gaps_and_long_runs_are_thinned():
    text = render(ReportData(title="t", steps=tuple(STEPS)))
    by_name = dict(re.findall(r"aria-label=\"([^,\"]*),.*?points=\"([^\"]*)\"", text))
    assert len(by_name["Training loss"].split()) == 2
    many = tuple({"step": n, "tokens": n, "loss": float(n % 7)} for n in range(1, 100_001))
    assert len(render(ReportData(title="t", steps=many))) < 40_000


def test_one_point_and_equal_values_are_drawn():
    for data in (((5.0, 1.0),), ((0.0, 2.0), (1.0, 2.0))):
        chart = line_chart("x", "y", [Series(name="s", points=data)])
        assert "nan" not in chart
        assert chart.count("<circle") == len(data)
    assert line_chart("x", "y", [Series(name="s", points=())]) == ""
    assert dot_rows("x", "y", [("row", [])], names=[]) == ""


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 5, 10]), (0, 4, [0, 1, 2, 3, 4]), (0.12, 0.38, [0.1, 0.2, 0.3, 0.4]), (3, 3, [3, 4, 5, 6])],
)
def test_ticks_are_round_and_enclose_the_values(low, high, expected):
    assert ticks(low, high, 5) == pytest.approx(expected)


def test_the_gap_is_measured_from_the_worst_student_to_the_teacher():
    assert closed_gap(EVALUATION) == (0.75, "taught", "fresh")
    assert closed_gap(EVALUATION | {"teacher": None}) is None
    two = {name: EVALUATION["models"][name] for name in ("big", "taught")}
    assert closed_gap({"teacher": "big", "models": two}) is None


def write(directory, **documents):
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in documents.items():
        (directory / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))


def test_a_run_is_read_from_its_directory(tmp_path):
    lines = [json.dumps(line) for line in STEPS[:2] + HELD_OUT] + ['{"step": 30, "lo']
    write(
        tmp_path,
        evaluation=EVALUATION,
        samples=[{"model": "taught", "prompt": "p", "continuation": "c"}],
        config={"teacher": {"path": str(tmp_path / "gone")}},
    )
    # What the train job writes may lie one level below what the evaluation wrote.
    write(tmp_path / "train", times={"train": 2.5, "broken": None}, versions={"jax": "1"})
    (tmp_path / "train" / "metrics.jsonl").write_text("\n".join(lines))
    data = collect(tmp_path)
    assert data.steps == tuple(STEPS[:2])
    assert data.held_out == tuple(HELD_OUT)
    assert data.samples == (Sample(model="taught", prompt="p", continuation="c"),)
    assert data.times == {"train": 2.5}
    assert data.models == ()
    assert data.title == tmp_path.name
    page = write_report(tmp_path)
    assert page == tmp_path / "report.html"
    assert Page(page.read_text()).headings[1:] == [
        "Evaluation",
        "Training",
        "Samples",
        "Time",
        "Configuration",
        "Versions",
    ]


def test_a_damaged_checkpoint_is_left_out(tmp_path):
    write(tmp_path, samples=[])
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "jaxdistill.json").write_text("{")
    assert collect(tmp_path).models == ()


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ({"evaluation": "{"}, "evaluation.json is not JSON"),
        ({"evaluation": []}, "holds a JSON list"),
        ({"evaluation": {}}, "has no object 'models'"),
        ({"samples": [{"model": "m"}]}, "must be a list of objects with model, prompt, continuation"),
    ],
)
def test_files_that_are_not_what_they_should_be_are_named(tmp_path, documents, message):
    write(tmp_path, **documents)
    with pytest.raises(ValueError, match=message):
        collect(tmp_path)


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none of metrics\.jsonl"):
        collect(tmp_path)
