"""What the documentation says to type works: programs run, command lines parse, make targets and files exist."""

from __future__ import annotations

import ast
import functools
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tyro
from compiling import flags_for_one_device
from test_layers import FLOORS
from tiny import llama, slow

from jaxdistill import cli
from jaxdistill.checkpoint.open import open_config
from jaxdistill.models.export import write_hf
from jaxdistill.models.schema import init_params
from jaxdistill.prune.plan import PrunePlan
from jaxdistill.recipes import parse_recipe
from jaxdistill.search import SearchConfig
from jaxdistill.tokenizers import ByteTokenizer

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "configs").glob("*.py"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(path: Path) -> str:
    """A page's text; of a Python file its docstring."""
    text = path.read_text()
    return text if path.suffix == ".md" else inspect.cleandoc(ast.get_docstring(ast.parse(text)) or "")


def programs() -> list[str]:
    return [code for language, code in FENCE.findall((ROOT / "docs" / "api.md").read_text()) if language == "python"]


def typed() -> list[tuple[str, str]]:
    """(file, what is to be typed) for every line of a shell block and every piece of inline code."""
    found = []
    for path in [*PAGES, *RECIPES]:
        text = text_of(path).replace("\\\n", " ")
        blocks = [code for language, code in FENCE.findall(text) if language != "python"]
        blocks += re.findall(r"^ {4}.*$", text, re.MULTILINE) if path.suffix == ".py" else []
        lines = [line.strip() for block in blocks for line in block.splitlines()]
        inline = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
        found += [(path.name, each) for each in lines + inline]
    return found


def command_lines() -> list[tuple[str, str]]:
    lines = ((name, line.removeprefix(".venv/bin/")) for name, line in typed())
    return list(dict.fromkeys((name, line) for name, line in lines if line.startswith("jaxdistill ")))


# Programs.


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """What stands for DIR, FILE and RUN."""
    directory = tmp_path_factory.mktemp("docs")
    tokenizer = ByteTokenizer()
    model = llama(vocab=tokenizer.vocab_size, layers=4)
    params = init_params(model, jax.random.key(0))
    teacher = write_hf(directory / "teacher", model, params, dtype="float32", tokenizer=tokenizer)
    text = directory / "text.txt"
    text.write_text("\n\n".join(f"{n} bottles of milk and {n + 1} loaves of bread" for n in range(100)))
    return {"DIR": str(teacher), "FILE": str(text), "RUN": str(directory / "run")}


def made_small(program: str, places: dict[str, str]) -> str:
    """The program with its placeholders filled in, on fewer and shorter rows, for two steps."""
    changes = {f'"{name}"': repr(path) for name, path in places.items()}
    changes |= {"length=512": "length=32", "batch_size=16": "batch_size=8", "steps=1000": "steps=2"}
    changes |= {"layers=16": "layers=2"}
    for old, new in changes.items():
        program = program.replace(old, new)
    return program


def test_a_run_from_python_is_short():
    run, *_ = programs()
    assert len(run.splitlines()) <= 25


@pytest.mark.parametrize(("program", "term"), [(0, "reverse_kl"), slow(3, "alm")])
def test_a_run_from_python(program, term, places, tmp_path):
    """In an interpreter of its own, as a user's file is: train() sets up the process (compilation cache, signals)."""
    file = tmp_path / "mine.py"
    run = tmp_path / "run"
    file.write_text(made_small(programs()[program], places | {"RUN": str(run)}))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAXDISTILL_CACHE": str(tmp_path / "cache"),
        "XLA_FLAGS": flags_for_one_device(),
    }
    done = subprocess.run(
        [sys.executable, file], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    student = Path(done.stdout.splitlines()[-1])
    assert student == run / "student"
    assert (student / "model.safetensors").is_file()
    assert f'"{term}"' in (run / "metrics.jsonl").read_text()


def test_a_step_of_pure_functions(places):
    names: dict = {}
    exec(compile(made_small(programs()[1], places), "docs/api.md", "exec"), names)
    names["loader"].close()
    assert int(names["state"].step) == 1
    assert float(names["metrics"]["terms"]["kl"].value) > 0
    assert np.isfinite(float(names["metrics"]["loss"]))


def test_pruning_from_python(places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(made_small(programs()[2], places), "docs/api.md", "exec"), names)
    shape = open_config(tmp_path / "pruned")
    assert [layer.ffn.mlp for layer in shape.layers] == [24] * 3
    assert PrunePlan.load(tmp_path / "plan.json").layers == names["plan"].layers


# Command lines.


def as_typed(line: str, places: dict[str, str]) -> list[str]:
    """The arguments of a command line; words in brackets are options, an ellipsis more of the same."""
    words = [word.rstrip("…") for word in shlex.split(line, comments=True)[1:]]
    names = places | {"RECIPE": "configs/distill.py"}
    return [names.get(word, word) for word in words if word and not word.startswith("[")]


def test_commands_are_found():
    shown = {cli.split_command(line.split()[1:])[0] for _, line in command_lines()}
    assert shown >= set(cli.COMMANDS), "the pages show every command"


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_command_lines_parse(page, line, places, monkeypatch):
    monkeypatch.chdir(ROOT)
    command, arguments = cli.split_command(as_typed(line, places))
    assert command in cli.COMMANDS
    if not arguments:
        return  # the command is mentioned, not shown
    if command == "search":
        recipe = arguments[0].replace("configs/distill.py", "configs/search.py")
        parse_recipe(recipe, arguments[1:], kind=SearchConfig, command="search")
        return
    if command == "train":
        recipe, *overrides = arguments
        # A reader's own recipe has the program of docs/api.md in it.
        recipe = str(own_recipe(Path(places["DIR"]).parent)) if recipe == "my_recipe.py" else recipe
        parse_recipe(recipe, overrides)
        return
    calls = []
    parsed_only = functools.wraps(cli.COMMANDS[command])(lambda *given, **named: calls.append((given, named)))
    tyro.cli(parsed_only, args=arguments)
    assert len(calls) == 1


def own_recipe(directory: Path) -> Path:
    program = programs()[0]
    head, _, config = program.partition("\nconfig = ")
    body = config.partition("\nprint")[0].replace("\n", "\n    ")
    path = directory / "my_recipe.py"
    path.write_text(f"{head}\n\ndef get_config():\n    return {body}\n")
    return path


def test_an_option_that_does_not_exist_is_noticed(places):
    with pytest.raises(SystemExit):
        parse_recipe(str(RECIPES[0]), ["--student.layer-count", "16"])


# What is referred to.


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {(page, line.split()[1]) for page, line in typed() if re.match(r"make [a-z]", line)}
    assert named, "README.md names make targets"
    assert {target for _, target in named} <= targets, named


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_paths_exist(page):
    text = FENCE.sub("", page.read_text())
    links = {link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link}
    missing = [link for link in links if not (page.parent / link).exists()]
    named = re.findall(r"`((?:jaxdistill|configs|tests|tools|docs)/[a-z0-9_./]+)`", text)
    missing += [path for path in named if not (ROOT / path).exists()]
    assert not missing


def is_in_package(dotted: str) -> bool:
    """Whether `room.module.name` names a module, or a word in the source of one."""
    at, (*parts,) = ROOT / "jaxdistill", dotted.split(".")
    while parts and (at / parts[0]).is_dir():
        at = at / parts.pop(0)
    at = at / f"{parts.pop(0)}.py" if parts and (at / f"{parts[0]}.py").is_file() else at / "__init__.py"
    source = at.read_text()
    return all(re.search(rf"\b{part}\b", source) for part in parts)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_names_in_the_package_exist(page):
    """`losses.terms.Parameterized`, `checkpoint.open`: what the pages call by its full name."""
    names = re.findall(r"`([a-z_]+(?:\.[A-Za-z_]+)+)`", FENCE.sub("", page.read_text()))
    assert [name for name in names if name.split(".")[0] in FLOORS and not is_in_package(name)] == []


def test_names_that_do_not_exist_are_noticed():
    assert is_in_package("models.families.llama.from_hf")
    assert is_in_package("step.init_state")
    assert not is_in_package("losses.terms.NoSuchTerm")
    assert not is_in_package("step.no_such_step")
