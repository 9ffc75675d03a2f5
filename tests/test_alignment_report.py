"""The alignment as text and as a page: what a person sees of two tokenizers whose tokens are written in the tests."""

from __future__ import annotations

import html.parser
import itertools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import TEXTS
from written_tokenizers import written

from jaxdistill.evaluate.alignment import AlignedView, Cell, Group, Token
from jaxdistill.jobs.inspect_alignment import AlignmentConfig, inspect_alignment
from jaxdistill.report.alignment import alignment_text, columns_of, visible
from jaxdistill.report.alignment_page import alignment_page

TEXT = "the  fox is naïve.\njumping 😀"
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return written(tmp_path_factory.mktemp("written"))


def view_of(paths, student: str, teacher: str, text: str | None = TEXT, **settings) -> AlignedView:
    given = {"append_eos": False} | settings
    return inspect_alignment(AlignmentConfig(text=text, student=paths[student], teacher=paths[teacher], **given))


def lines(text: str) -> list[str]:
    """Without the summary."""
    return text.rpartition("\n\n")[0].splitlines()


def token(text: str, log_prob: float | None = -1.0) -> Token:
    return Token(7, text.encode(), log_prob)


def numbers_view() -> AlignedView:
    """Three groups of two, one and one chunk; before them what nothing predicts, between them a token of one side."""
    cells = [
        Cell(sides=((token("The", None),), (token("The", None),)), chunk=1, text_bytes=3),
        Cell(
            sides=((token(" quick", -2.5),), (token(" qu"), token("ick", -0.25))),
            chunk=2,
            compared=True,
            text_bytes=6,
            group=0,
        ),
        Cell(sides=((token("est", -0.5),), (token("est", -4.0),)), chunk=3, compared=True, text_bytes=3, group=0),
        Cell(sides=((token("<turn>"),), ())),
        Cell(sides=((token(" 東京", -12.0),), (token(" 東京", -11.5),)), chunk=4, compared=True, text_bytes=7, group=1),
        Cell(sides=((token("."),), (token("."),)), chunk=5, compared=True, text_bytes=1, group=2),
    ]
    groups = (
        Group(2, 3, -3.1, -5.5, 0.01234),
        Group(4, 4, -12.0, -11.5, 0.0005),
        Group(5, 5, -1.0, -1.0, 0.0),
    )
    return AlignedView(tuple(cells), groups)


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b" the\n\t", "·the⏎⇥"),
        ("naïve".encode(), "naïve"),
        (b"\xf0\x9f\x98", r"\xf0\x9f\x98"),
        (b"\x80", r"\x80"),
        (b"\xc3\xafx\xc3", r"ïx\xc3"),
        ("😀".encode(), "😀"),
        (b"\x1b[2J\x00\r", r"\x1b[2J\x00\x0d"),
        ("a\u200db\u00a0".encode(), r"a\xe2\x80\x8db\xc2\xa0"),
        (b"", "∅"),
    ],
)
def test_what_a_token_looks_like(data, shown):
    assert visible(data) == shown


@given(st.binary(max_size=12))
def test_no_token_moves_the_cursor(data):
    assert visible(data).isprintable()
    assert " " not in visible(data)


def test_a_prefix_space_and_collapsed_spaces_beside_bytes(paths):
    """The first tokenizer adds a space, reads two as one and writes bytes of what it has no piece for."""
    assert alignment_text(view_of(paths, "prefix_space", "bytes", prepend_bos=True, append_eos=True), width=80) == (
        "student      (<s>)  [·the] [·fox]     [·is]  [·na]  [\\xc3][\\xaf][ve] [.][⏎][j]\n"
        "teacher      (<bos>)[t│h│e][·│·│f│o│x][·│i│s][·│n│a][\\xc3][\\xaf][v│e][.][⏎][j]\n"
        "\n"
        "student      [u][m][p][ing]  [·][\\xf0][\\x9f][\\x98][\\x80][</s>]\n"
        "teacher      [u][m][p][i│n│g][·][\\xf0][\\x9f][\\x98][\\x80][<eos>]\n"
        "\n"
        "                     student  teacher\n"
        "tokens                    21       34\n"
        "unsupervised tokens        1        1\n"
        "20 of 21 chunks compared\n"
        "71.4% of the chunks one token on both sides\n"
        "1.52 bytes of text in a chunk"
    )


def test_an_emoji_over_byte_tokens_and_a_special_token_of_one_side(paths):
    assert lines(alignment_text(view_of(paths, "prefix_space", "byte_level", prepend_bos=True), width=80)) == [
        "student       <s> (·the)[·fox]  [·is][·na][\\xc3][\\xaf][ve] [.][⏎][j][u│m][p]",
        "teacher           (the) [·│·fox][·is][·na][\\xc3][\\xaf][v│e][.][⏎][j][um] [p]",
        "",
        "student      [ing][·][\\xf0│\\x9f│\\x98][\\x80]",
        "teacher      [ing][·][\\xf0\\x9f\\x98]  [\\x80]",
    ]


def test_chunks_of_words(paths):
    assert lines(alignment_text(view_of(paths, "byte_level", "bytes", chunks="words"), width=80)) == [
        "student      (the)  [·][·fox]   [·is]  [·na│\\xc3│\\xaf│v│e│.]  [⏎│j│um│p│ing]",
        "teacher      (t│h│e)[·][·│f│o│x][·│i│s][·│n│a│\\xc3│\\xaf│v│e│.][⏎│j│u│m│p│i│n│g]",
        "",
        "student      [·│\\xf0\\x9f\\x98│\\x80]",
        "teacher      [·│\\xf0│\\x9f│\\x98│\\x80]",
    ]


def test_a_conversation_shows_what_templates_add_and_goes_on_where_no_line_holds_it(paths, tmp_path):
    messages = [{"role": "user", "content": "is it?"}, {"role": "assistant", "content": "it  is 😀."}]
    file = tmp_path / "talk.jsonl"
    file.write_text(json.dumps({"text": "x"}) + "\n" + json.dumps({"messages": messages}))
    view = view_of(paths, "prefix_space", "byte_level", None, file=str(file), record=1)
    assert lines(alignment_text(view, width=44)) == [
        "student       <s>│·│u│s│e│r│: (·is)(·it) (?)",
        "teacher       u│s│e│r│:       (·is)(·i│t)(?)",
        "",
        "student       </s>│·│a│s│s│i│s│t│a│n│t│:",
        "teacher       <|endoftext|>│⏎│a│s│s│i│s│t│a",
        "",
        "student            (·it) [·is]  [·]",
        "teacher      n│t│: (·i│t)[·│·is][·]",
        "",
        "student      [\\xf0│\\x9f│\\x98][\\x80][.]",
        "teacher      [\\xf0\\x9f\\x98]  [\\x80][.]",
        "",
        "student      [</s>]",
        "teacher      [<|endoftext|>] ⏎",
    ]


def test_likelihoods_stand_below_their_chunks_and_groups_in_brackets():
    assert alignment_text(numbers_view(), width=80) == (
        "student      (The)[·quick] [est]   <turn> [·東京][.]\n"
        "teacher      (The)[·qu│ick][est]          [·東京][.]\n"
        "student nats          -2.50  -0.50         -12.00 -1.00\n"
        "teacher nats          -1.25  -4.00         -11.50 -1.00\n"
        "difference            -1.25  +3.50          -0.50 +0.00\n"
        "ALM x1000         ╰────12.34─────╯        ╰─0.50╯╰0.00╯\n"
        "\n"
        "                      student  teacher\n"
        "tokens                      6        6\n"
        "unsupervised tokens         2        1\n"
        "log-likelihood, nats   -16.00   -17.75\n"
        "bits per byte          1.3578   1.5063\n"
        "4 of 5 chunks compared\n"
        "80.0% of the chunks one token on both sides\n"
        "4.00 bytes of text in a chunk\n"
        "0.00428 mean divergence of 3 groups of chunks"
    )


def test_a_bracket_goes_on_where_the_line_breaks():
    brackets = [line for line in alignment_text(numbers_view(), width=30).splitlines() if line.startswith("ALM")]
    assert brackets == ["ALM x1000         ╰────────", "ALM x1000    ─12.34╯", "ALM x1000    ╰─0.50╯╰0.00╯"]


def test_colour_changes_nothing_of_the_text(paths):
    for view in (view_of(paths, "prefix_space", "byte_level", prepend_bos=True), numbers_view()):
        for width in (40, 100):
            plain, colour = (alignment_text(view, width=width, colour=each) for each in (False, True))
            assert "\x1b" not in plain
            assert colour.count("\x1b[0m") >= sum(map(len, (cell.sides for cell in view.chunks)))
            stripped = [line.rstrip() for line in ANSI.sub("", colour).splitlines()]
            assert stripped == [re.sub(r"[\[\]()]", " ", line).rstrip() for line in plain.splitlines()]


def test_neighbouring_chunks_differ_in_colour_and_what_is_not_compared_has_its_own():
    grounds = re.findall(r"48;5;(\d+)m", alignment_text(numbers_view(), colour=True).splitlines()[0])
    assert grounds[0] == "250"
    assert "250" not in grounds[1:]
    assert all(one != other for one, other in itertools.pairwise(grounds))


@given(text=TEXTS.filter(bool), width=st.integers(40, 90))
def test_lines_hold_all_tokens_within_the_width(paths, text, width):
    view = view_of(paths, "byte_level", "bytes", text)
    written_lines = lines(alignment_text(view, width=width))
    for line in written_lines:
        assert columns_of(line) <= width
    for side, label in enumerate(("student", "teacher")):
        shown = "".join(line.removeprefix(label) for line in written_lines if line.startswith(label))
        wanted = "".join(visible(each.text) for cell in view.cells for each in cell.sides[side])
        edges = str.maketrans("", "", "│[]() ")
        assert shown.translate(edges) == wanted.translate(edges)


class _Page(html.parser.HTMLParser):
    """The text of each side by class, the titles, and whether every element is closed."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.titles, self.texts, self.tags = [], [], {"student": [], "teacher": []}, []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if "title" in attributes:
            self.titles.append(attributes["title"])
        if tag not in ("meta",):
            self.open.append((tag, attributes.get("class", "")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == ("span", "token"):
            self.texts[self.open[-2][1]].append(data)


def test_the_page_has_every_token_and_needs_nothing_else(paths):
    view = view_of(paths, "prefix_space", "bytes", 'the <b>&"fox" 😀', prepend_bos=True)
    page = alignment_page(view, student="DIR/<one>", teacher="bytes")
    found = _Page(page)
    for side, texts in enumerate(found.texts.values()):
        assert texts == [visible(each.text) for cell in view.cells for each in cell.sides[side]]
    assert "student: &lt;one&gt;" in page
    assert not any("src" in attributes or tag in ("script", "link") for tag, attributes in found.tags)
    assert "http" not in page
    assert "--strength" not in page.partition("</style>")[2]


def test_the_page_tells_numbers_and_colours_differences():
    view = numbers_view()
    page = alignment_page(view, student="one", teacher="two")
    titles = _Page(page).titles
    assert "chunk 2, 6 bytes; student -2.500 nats; teacher -1.250 nats" in titles
    assert "chunk 1, 3 bytes, not compared" in titles
    assert "chunks 2 to 3, joined: divergence 0.0123; with the word's end student -3.100, teacher -5.500 nats" in titles
    assert titles.count("id 7, -0.500 nats") == 1
    assert titles.count("id 7") == 2
    grounds = re.findall(r'class="cell (less-likely|likelier)" style="--strength:(\d+)%"', page)
    # Differences of -1.25, 3.5, -0.5 and 0 nats; 3 are as strong as it gets.
    assert grounds == [("less-likely", "25"), ("likelier", "60"), ("less-likely", "10"), ("less-likely", "0")]
    assert "<small>-1.25</small>" in page
    assert page.count('class="joined"') == 3
    assert page.count('class="cell alone"') == 1
