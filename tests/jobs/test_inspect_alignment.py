"""`jaxdistill inspect alignment` from end to end: texts from everywhere, models on both sides, text and page out."""

from __future__ import annotations

import json

import pytest
from tiny import llama, params
from written_tokenizers import prefix_space_json, written

from jaxdistill import cli
from jaxdistill.checkpoint.model import save_model
from jaxdistill.tokenizers import load_tokenizer

TEXT = "the fox is naïve."


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """The written tokenizers, and a model of each of two of them."""
    root = tmp_path_factory.mktemp("models")
    found = written(root)
    for seed, kind in enumerate(("bytes", "byte_level")):
        tokenizer = load_tokenizer(found[kind])
        config = llama(vocab=tokenizer.vocab_size)
        save_model(root / f"{kind} model", config, params(config, seed), write_tokenizer=tokenizer.save)
        found[f"{kind} model"] = str(root / f"{kind} model")
    return found


def run(capsys, paths, *arguments, student: str, teacher: str) -> str:
    sides = ("--student", paths[student], "--teacher", paths[teacher])
    assert cli.run(["inspect", "alignment", *map(str, arguments), *sides]) == 0
    return capsys.readouterr().out


def labels(printed: str) -> list[str]:
    """What the rows of the first block are called."""
    return [line[:13].strip() for line in printed.partition("\n\n")[0].splitlines()]


def test_two_models_are_compared(capsys, paths, tmp_path):
    page = tmp_path / "page.html"
    printed = run(capsys, paths, TEXT, "--html", page, student="bytes model", teacher="byte_level model")
    assert labels(printed) == ["student", "teacher", "student nats", "teacher nats", "difference", "ALM x1000"]
    assert printed.endswith(f"groups of chunks\n{page}\n")
    assert "\x1b" not in printed
    assert "student: bytes model" in page.read_text()
    assert 'class="joined"' in page.read_text()


def test_a_threshold_decides_what_is_joined(capsys, paths):
    def groups(threshold) -> int:
        printed = run(
            capsys, paths, TEXT, "--merge-threshold", threshold, student="bytes model", teacher="byte_level model"
        )
        return int(printed.rpartition(" groups")[0].rpartition(" ")[2])

    printed = run(capsys, paths, TEXT, student="bytes", teacher="byte_level")
    compared = int(printed.partition(" of ")[0].rpartition("\n")[2])
    assert groups("None") == groups("0") == compared
    assert groups("1") == 1


@pytest.mark.parametrize(
    ("student", "teacher", "known"),
    [
        ("bytes model", "byte_level", ["student nats"]),
        ("prefix_space", "byte_level model", ["teacher nats"]),
        ("prefix_space", "bytes", []),
    ],
)
def test_a_tokenizer_alone_has_no_likelihoods(capsys, paths, student, teacher, known):
    printed = run(capsys, paths, TEXT, student=student, teacher=teacher)
    assert labels(printed) == ["student", "teacher", *known]
    assert "divergence" not in printed


def test_texts_come_from_files(capsys, paths, tmp_path):
    (tmp_path / "a.txt").write_text("naïve fox")
    records = [{"body": "the fox"}, {"prompt": "is", "completion": " it"}, {"body": "is it"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))

    def shown(name: str, *arguments) -> str:
        printed = run(capsys, paths, "--file", tmp_path / name, *arguments, student="byte_level", teacher="bytes")
        return printed.splitlines()[0].removeprefix("student").strip()

    # Three bytes are one of a character of two; it is left out. A text that goes on has no end.
    assert shown("a.txt", "--bytes-per-document", 3) == "(n)[a]"
    assert shown("a.txt", "--bytes-per-document", "None") == r"(n)[a][\xc3][\xaf][v][e][·fox]   [<|endoftext|>]"
    assert shown("a.jsonl", "--field", "body") == "(the)  [·fox]   [<|endoftext|>]"
    assert shown("a.jsonl", "--field", "body", "--record", 2) == "(i)[s][·i] [t][<|endoftext|>]"
    # A pair is never cut, and its prompt not compared.
    pair = shown("a.jsonl", "--field", "body", "--record", 1, "--bytes-per-document", 1)
    assert pair == "(i)(s)[·i] [t][<|endoftext|>]"


def test_a_record_that_is_not_there_is_refused(capsys, tmp_path):
    (tmp_path / "a.txt").write_text("fox")
    both = ("--student", "bytes", "--teacher", "bytes")
    assert cli.run(["inspect", "alignment", "--file", str(tmp_path / "a.txt"), "--record", "1", *both]) == 2
    assert f"record is 1 and {tmp_path}/a.txt has 1; they are counted from 0" in capsys.readouterr().err


def test_a_text_of_which_a_tokenizer_leaves_nothing_is_refused(capsys, tmp_path):
    definition = json.loads(prefix_space_json())
    definition["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    assert cli.run(["inspect", "alignment", "  ", "--student", str(tmp_path), "--teacher", "bytes"]) == 2
    assert f"the tokenizer of {tmp_path} leaves nothing of the text" in capsys.readouterr().err


@pytest.mark.parametrize(("no_colour", "coloured"), [("", True), ("1", False)])
def test_colours_are_for_terminals_that_want_them(capsys, monkeypatch, paths, no_colour, coloured):
    monkeypatch.setenv("NO_COLOR", no_colour)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert ("\x1b[" in run(capsys, paths, TEXT, student="bytes", teacher="byte_level")) == coloured


def test_lines_are_as_wide_as_the_terminal(capsys, monkeypatch, paths):
    for columns in (40, 90):
        monkeypatch.setenv("COLUMNS", str(columns))
        printed = run(capsys, paths, TEXT * 4, student="bytes", teacher="byte_level")
        rows = printed.rpartition("\n\n")[0].splitlines()
        assert columns - 16 < max(map(len, rows)) <= columns


def test_a_path_named_alignment_is_still_a_path(capsys, monkeypatch, paths, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alignment").symlink_to(paths["bytes model"])
    assert cli.run(["inspect", "./alignment"]) == 0
    assert "./alignment: a jaxdistill checkpoint" in capsys.readouterr().out
