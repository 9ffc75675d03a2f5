"""Every recipe loads, resolves to the golden text in tests/golden/recipes, and trains two steps when shrunk.

The golden texts show what a changed default means for each recipe. Where a change is meant, write them anew and look
at the difference: `python tests/test_recipes.py --update`.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import pytest
from tiny import slow
from tiny_tokenizers import byte_level_json

from jaxdistill.checkpoint.model import is_model
from jaxdistill.checkpoint.open import open_config
from jaxdistill.models.export import write_hf
from jaxdistill.models.schema import count_parameters, init_params
from jaxdistill.prune.choose import Target
from jaxdistill.search import Grid, search
from jaxdistill.specs import Attention, GatedMLP, LayerSpec, ModelConfig
from jaxdistill.tokenizers import ByteTokenizer, load_tokenizer
from jaxdistill.train.config import TrainConfig
from jaxdistill.train.loop import train

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "recipes"
RECIPES = {path.stem: path for path in sorted((ROOT / "configs").glob("*.py"))}

SEARCHES = {"search"}
"""Recipes of `jaxdistill search`; all others are those of `jaxdistill train`."""

TRAINED_EARLY = {"across_tokenizers", "conversations", "quickstart"}
"""Those that `make test` trains; it resolves all of them."""

TEACHER_LAYERS = 4
TEACHER_MLP = 32
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ("the", "teacher", "goes", "in", "and", "a", "smaller", "model", "comes", "out")


def load(path: Path) -> TrainConfig:
    """What the recipe's `get_config` returns."""
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def resolved(value: Any, name: str = "") -> Iterator[str]:
    """A configuration as lines `dotted.name = value`, classes included, in the order of the fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield f"{name or 'config'} = {type(value).__name__}"
        inner = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, Mapping):
        inner = {str(key): value[key] for key in value}
    elif isinstance(value, tuple) and any(dataclasses.is_dataclass(item) for item in value):
        inner = {str(index): item for index, item in enumerate(value)}
    else:
        yield f"{name} = {value.__qualname__ if callable(value) else repr(value)}"
        return
    for key, item in inner.items():
        yield from resolved(item, f"{name}.{key}" if name else key)


def text_of(config: TrainConfig) -> str:
    return "\n".join(resolved(config)) + "\n"


# Shrinking.


@dataclasses.dataclass(frozen=True)
class Small:
    """What a shrunk recipe runs on."""

    teacher: str
    text: str
    conversations: str
    tokenizer: str
    student: str
    """A model with that tokenizer, which is not the teacher's."""


def write_small(directory: Path) -> Small:
    """A byte-level teacher with a chat template, a text and some conversations, and a model with another tokenizer."""
    tokenizer = ByteTokenizer(chat_template=CHATML)
    layer = LayerSpec(mixer=Attention(heads=4, kv_heads=2, head_dim=4), ffn=GatedMLP(mlp=32))
    model = ModelConfig(
        family="llama", vocab=tokenizer.vocab_size, embed=16, layers=(layer,) * TEACHER_LAYERS, tied=True
    )
    teacher = write_hf(
        directory / "teacher", model, init_params(model, jax.random.key(0)), dtype="float32", tokenizer=tokenizer
    )
    phrases = [" ".join(WORDS[i % 5 : i % 5 + 3 + i % 7]) for i in range(200)]
    text, conversations = directory / "text.txt", directory / "chats.jsonl"
    text.write_text("\n\n".join(phrases) + "\n")
    chats = [
        {"messages": [{"role": "user", "content": "say it"}, {"role": "assistant", "content": p}]} for p in phrases
    ]
    conversations.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "tokenizer.json").write_text(byte_level_json())
    other = load_tokenizer(directory / "tokenizer")
    model = dataclasses.replace(model, vocab=other.vocab_size)
    student = write_hf(
        directory / "student", model, init_params(model, jax.random.key(1)), dtype="float32", tokenizer=other
    )
    return Small(str(teacher), str(text), str(conversations), str(directory / "tokenizer"), str(student))


def shrink(
    config: TrainConfig, small: Small, directory: Path, *, conversations: bool = False, command: str = ""
) -> TrainConfig:
    """The same run in small: two steps of short rows on a tiny model, on the mesh that the recipe asks for.

    Layers to keep are mapped to the tiny teacher's depth. What else a recipe says (losses, optimizer, dtypes, remat,
    how documents are cut, what is saved and written) stays as it is.
    """
    student, data = config.student, config.data
    if student.model is not None:
        student = dataclasses.replace(
            student, model=dataclasses.replace(student.model, layers=student.model.layers[:2])
        )
    layers, mlp = student.prune.layers, student.prune.mlp
    # Sizes that the page's command gives.
    layers = TEACHER_LAYERS - 1 if "--student.prune.layers" in command else layers
    mlp = TEACHER_MLP if "--student.prune.mlp" in command else mlp
    if isinstance(layers, int):
        layers = min(layers, TEACHER_LAYERS - 1)
    elif layers is not None:
        depth = max(layers) + 1
        layers = tuple(sorted({kept * TEACHER_LAYERS // depth for kept in layers}))
    student = dataclasses.replace(
        student,
        path=small.student if config.aligned and "--student.path" in command else student.path,
        tokenizer=small.tokenizer if "--student.tokenizer" in command else student.tokenizer,
        prune=Target(layers=layers, mlp=mlp and TEACHER_MLP // 2),
        calibration_batches=2,
    )
    data = dataclasses.replace(
        data,
        path=small.conversations if conversations else small.text,
        sources=(),
        length=32,
        teacher_length=data.teacher_length and 48,
        batch_size=8 * config.accumulate,
        virtual_shards=data.virtual_shards and 8,
    )
    has_teacher = config.teacher.path is not None or student.model is None
    return dataclasses.replace(
        config,
        out=str(directory / "run"),
        teacher=dataclasses.replace(config.teacher, path=small.teacher if has_teacher else None),
        student=student,
        data=data,
        steps=2,
        chunk=config.chunk and 16,
        held_out=dataclasses.replace(config.held_out, path=small.text, every=2, windows=8),
        log=dataclasses.replace(config.log, every=1, tensorboard=False, wandb_project=None),
        compilation_cache="none",
        processes="one",
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Small:
    return write_small(tmp_path_factory.mktemp("small"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Where no runs are: a recipe may look for them."""
    monkeypatch.chdir(tmp_path)


# Tests.


@pytest.mark.parametrize("name", RECIPES)
def test_says_what_it_is_and_how_it_is_run(name):
    page = ast.get_docstring(ast.parse(RECIPES[name].read_text())) or ""
    command = f"jaxdistill {'search' if name in SEARCHES else 'train'} configs/{name}.py"
    assert command in page or f"make {name}" in page, f"the docstring of {name} shows its command"
    assert page.splitlines()[0].endswith((".", ",", ":")), "the first line says what the recipe does"


@pytest.mark.parametrize("name", RECIPES)
def test_resolves_to_the_golden_text(name):
    path = GOLDEN / f"{name}.txt"
    expected = path.read_text() if path.exists() else ""
    assert text_of(load(RECIPES[name])) == expected, (
        f"configs/{name}.py does not resolve to {path.relative_to(ROOT)} any more. If the recipe or a default was "
        "meant to change: python tests/test_recipes.py --update, then read the difference."
    )


def test_no_golden_text_without_a_recipe():
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(RECIPES)


@pytest.mark.parametrize(
    "name", [name if name in TRAINED_EARLY else slow(name) for name in sorted(RECIPES.keys() - SEARCHES)]
)
def test_trains_two_steps_when_shrunk(name, small, tmp_path):
    page = RECIPES[name].read_text()
    command = page.partition("jaxdistill train")[2].partition("--out")[0]
    config = shrink(load(RECIPES[name]), small, tmp_path, conversations="CHATS" in page, command=command)
    result = train(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert result.step == 2
    assert len(losses) == 2
    assert all(loss is not None and math.isfinite(loss) for loss in losses)
    assert result.held_out
    assert all(math.isfinite(value) for value in result.held_out.values())
    assert result.student == tmp_path / "run" / "student"
    assert is_model(result.student) == (config.export == "jaxdistill")
    assert open_config(result.student).layers


@pytest.mark.slow
def test_searches_two_candidates_when_shrunk(small, tmp_path):
    config = load(RECIPES["search"])
    run = shrink(config.train, small, tmp_path)
    grid = Grid(layers=(3, 4), mlp=(16, 24, 32), embed=(16,))
    config = dataclasses.replace(config, out=str(tmp_path / "search"), train=run, grid=grid, candidates=2)
    ranked = search(config)
    assert len(ranked) == 2
    assert ranked[0].after <= ranked[1].after
    assert all(row.costs["parameters"] <= 0.75 * count_parameters(open_config(small.teacher)) for row in ranked)


@pytest.mark.slow
def test_rounds_follow_each_other_under_the_first_teacher(small, tmp_path):
    """The second round measures the first one's student, and keeps a part of it."""
    places = []
    for sizes in (Target(layers=3, mlp=16), Target(layers=2, mlp=8)):
        config = load(RECIPES["minitron_iterative"])
        places.append(config.out)
        shrunk = shrink(config, small, tmp_path)
        student = dataclasses.replace(shrunk.student, prune=sizes)
        result = train(dataclasses.replace(shrunk, out=config.out, student=student))
    assert [Path(place).name for place in places] == ["1", "2"]
    assert config.student.path == str(Path(places[0]) / "student")
    assert result.plan is not None
    result.plan.check(open_config(config.student.path))
    kept = open_config(result.student)
    assert (len(kept.layers), kept.layers[0].ffn.mlp) == (2, 8)
    assert load(RECIPES["minitron_iterative"]).out == places[1], "the last round is resumed"


def test_shrinking_keeps_what_a_recipe_is_about(small, tmp_path):
    pod = shrink(load(RECIPES["llama31_8b_to_4b"]), small, tmp_path)
    assert pod.student.prune.layers == (0, 1, 3)  # layers 0-14 and 31 of 32, on four layers
    assert pod.student.execution.remat == "block"
    assert pod.teacher.parameter_dtype == "bfloat16"
    assert pod.data.prepend_bos


def update() -> None:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for path in GOLDEN.glob("*.txt"):
        path.unlink()
    for name, path in RECIPES.items():
        (GOLDEN / f"{name}.txt").write_text(text_of(load(path)))


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit("usage: python tests/test_recipes.py --update")
    update()
