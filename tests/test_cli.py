"""The command line: what it understands, what it refuses and how it says so, and that refusals start no backend."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxdistill import cli
from jaxdistill.data.sources import DataError
from jaxdistill.recipes import parse_recipe
from jaxdistill.train.config import TrainConfig

ALIGNMENT = ("inspect", "alignment", "--teacher", "bytes")

RECIPE = '''"""A recipe of a test.

What it does stands here.
"""

import own_losses
from jaxdistill.losses.terms import CrossEntropy, ForwardKL
from jaxdistill.optimizer import AdamW, WarmupCosine
from jaxdistill.train.config import TrainConfig


def get_config():
    return TrainConfig(
        out="",
        losses={
            "kl": ForwardKL(),
            "ce": CrossEntropy(weight=lambda step: 1.0 / (1 + step)),
            "own": own_losses.Own(sharpness=2.0),
        },
        optimizer=AdamW(learning_rate=WarmupCosine(peak=1e-4)),
    )
'''

OWN_LOSSES = """
import dataclasses

from jaxdistill.losses.terms import Term


@dataclasses.dataclass(frozen=True, kw_only=True)
class Own(Term):
    sharpness: float = 1.0

    def __call__(self, student, teacher, at, parameters):
        return student.max() * self.sharpness
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text(OWN_LOSSES)
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield str(path)
    sys.modules.pop("own_losses", None)
    sys.modules.pop("recipe_recipe", None)


def refused(capsys, run) -> str:
    """What is printed by a command that the parser refuses."""
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_numbers_of_a_recipe_are_set_by_name(recipe):
    given = """
        --teacher.path DIR --data.path FILE --student.prune.layers 0 3 --out RUN
        --losses.kl.temperature 4 --losses.kl.weight 2 --losses.ce.weight 0.5 --losses.own.sharpness 3
        --optimizer.learning-rate.peak 1e-3 --mesh.fsdp 4 --data.long-documents truncate --held-out.every 7
    """
    config = parse_recipe(recipe, given.split())
    assert isinstance(config, TrainConfig)
    assert (config.teacher.path, config.data.path, config.out) == ("DIR", "FILE", "RUN")
    assert config.student.prune.layers == (0, 3)
    assert (config.losses["kl"].temperature, config.losses["kl"].weight) == (4.0, 2.0)
    assert (config.losses["ce"].weight, config.losses["own"].sharpness) == (0.5, 3.0)
    assert config.optimizer.learning_rate.peak == 1e-3
    assert (config.mesh.fsdp, config.data.long_documents, config.held_out.every) == (4, "truncate", 7)


def test_a_schedule_stays_unless_a_number_is_given(recipe):
    config = parse_recipe(recipe, [])
    assert config.losses["ce"].weight(3) == 0.25
    assert config.losses["kl"].temperature == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--losses.kl.temperatur", "4"], "Unrecognized options: --losses.kl.temperatur"),
        (["--steps", "many"], "Error parsing --steps"),
        (["--data.long-documents", "keep"], "invalid choice 'keep'"),
        (["--data.batch-size", "0"], "DataConfig.batch_size is 0; it must be at least 1"),
        (["--losses.kl.temperature", "-1"], "ForwardKL.temperature is -1.0; it must be positive"),
    ],
)
def test_what_a_recipe_does_not_allow_is_refused(recipe, capsys, arguments, message):
    assert message in refused(capsys, lambda: parse_recipe(recipe, arguments))


def test_help_of_a_recipe_shows_its_page_and_its_settings(recipe, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_recipe(recipe, ["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "What it does stands here." in shown
    for setting in ("--losses.kl.temperature", "--losses.own.sharpness", "--optimizer.learning-rate.peak"):
        assert setting in shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "has no function get_config()"),
        ("def get_config():\n    return 3\n", "returned a int; it must return a TrainConfig"),
        ("def get_config():\n    return 1 / 0\n", "broken.py, line 2: ZeroDivisionError: division by zero"),
        ("import nowhere_to_be_found\n", "broken.py, line 1: ModuleNotFoundError"),
        ("x = (\n", "broken.py, line 1: '(' was never closed"),
    ],
)
def test_a_broken_recipe_is_one_message(tmp_path, capsys, text, message):
    path = tmp_path / "broken.py"
    path.write_text(text)
    assert cli.run(["train", str(path)]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_a_missing_recipe_names_those_that_are_there(tmp_path, capsys):
    (tmp_path / "here.py").touch()
    assert cli.run(["train", str(tmp_path / "gone.py")]) == 2
    assert (
        f"there is no recipe {tmp_path}/gone.py; in {tmp_path} there are {tmp_path}/here.py." in capsys.readouterr().err
    )
    (tmp_path / "recipe.txt").touch()
    assert cli.run(["train", str(tmp_path / "recipe.txt")]) == 2
    assert "is not a Python file" in capsys.readouterr().err


def test_an_unknown_command_lists_the_commands(capsys):
    assert cli.run(["trian"]) == 2
    commands = "train, prune, retokenize, search, evaluate, generate, convert, inspect, inspect alignment, report"
    assert f"'trian'; the commands are {commands}" in capsys.readouterr().err


def test_errors_of_the_package_are_one_message_and_faults_keep_their_traceback(monkeypatch, capsys):
    def raised_here():
        raise ValueError("a fault outside the package")

    def raised_in_the_package():
        from jaxdistill.sharding import MeshConfig

        MeshConfig(data=0)

    monkeypatch.setitem(cli.COMMANDS, "report", lambda: raised_in_the_package())
    assert cli.run(["report"]) == 2
    assert "error: mesh sizes are" in capsys.readouterr().err
    with pytest.raises(ValueError, match="mesh sizes are"):
        cli.run(["--debug", "report"])
    monkeypatch.setenv(cli.DEBUG, "1")
    with pytest.raises(ValueError, match="mesh sizes are"):
        cli.run(["report"])
    monkeypatch.delenv(cli.DEBUG)
    monkeypatch.setitem(cli.COMMANDS, "report", lambda: raised_here())
    with pytest.raises(ValueError, match="outside the package"):
        cli.run(["report"])


def test_what_an_error_says():
    assert (
        cli.message(FileNotFoundError(2, "No such file or directory", "a.txt")) == "a.txt: No such file or directory."
    )
    assert cli.message(DataError("a.txt: no text")) == "a.txt: no text"
    assert cli.is_expected(PermissionError(13, "Permission denied", "a.txt"))
    assert not cli.is_expected(KeyError("x"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "NOWHERE"], "NOWHERE: there is no such file or directory"),
        ([*ALIGNMENT, "x", "--student", "NOWHERE"], "there is no file NOWHERE; allowed: a directory with tokenizer"),
        ([*ALIGNMENT, "x", "--file", "FILE", "--student", "bytes"], "both TEXT and --file are given"),
        ([*ALIGNMENT, "--student", "bytes"], "neither TEXT nor --file is given; give one of them"),
        ([*ALIGNMENT, "", "--student", "bytes"], "TEXT is empty"),
        ([*ALIGNMENT, "--file", "NOWHERE.txt", "--student", "bytes"], "NOWHERE.txt: there is no such file"),
        ([*ALIGNMENT, "x", "--merge-threshold", "2", "--student", "bytes"], "ALM.merge_threshold is 2.0"),
        ([*ALIGNMENT, "x", "--record", "-1", "--student", "bytes"], "record is -1; records are counted from 0"),
        ([*ALIGNMENT, "x", "--bytes-per-document", "0", "--student", "bytes"], "bytes_per_document is 0"),
        (["report", "NOWHERE"], "is not a run's directory"),
        (["convert", "NOWHERE", "OUT"], "NOWHERE"),
        (["convert", "NOWHERE", "FULL"], "FULL exists and is not empty"),
        (["evaluate", "NOWHERE"], "nothing to evaluate on; give --text FILE"),
        (["evaluate", "--piqa", "10"], "no model; give at least one path"),
        (["generate", "NOWHERE", "--prompt", "x", "--temperature", "-1"], "temperature is -1.0; it must be at least 0"),
    ],
)
def test_commands_refuse_what_is_not_there(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "file").touch()
    assert cli.run(arguments) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


# In processes of their own: what is imported, and which backends start.


def command(*arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess, float]:
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", "from jaxdistill.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1]), "COLUMNS": "100", **environment},
        check=False,
    )
    return done, time.perf_counter() - began


def test_help_is_quick_and_starts_no_backend():
    done, seconds = command("--help", JAX_PLATFORMS="nonexistent")
    assert done.returncode == 0
    assert seconds < 4
    for name in cli.COMMANDS:
        assert f"\n  {name} " in done.stdout


def test_settings_are_refused_before_any_backend_starts(recipe):
    # With this platform the first touch of a backend raises: the refusal has to come before it.
    done, _ = command("train", recipe, "--losses.kl.temperatur", "4", JAX_PLATFORMS="nonexistent")
    assert done.returncode == 2
    assert "--losses.kl.temperatur" in done.stderr
    done, _ = command("train", recipe, "--out", "RUN", JAX_PLATFORMS="nonexistent")
    assert done.returncode == 2
    assert done.stderr.startswith("error: nothing to train on")
    assert "nonexistent" not in done.stderr


def test_tokenizers_are_aligned_and_mistakes_told_without_any_backend():
    both = (*ALIGNMENT, "--student", "bytes")
    done, _ = command(*both, "it is", JAX_PLATFORMS="nonexistent")
    # Ended as training ends it.
    assert done.stdout.startswith("student      (i)[t][·][i][s][<eos>]\nteacher      (i)[t][·][i][s][<eos>]\n\n")
    done, _ = command(*both, "it is", "--append-eos", "False", JAX_PLATFORMS="nonexistent")
    assert done.stdout.startswith("student      (i)[t][·][i][s]\nteacher      (i)[t][·][i][s]\n\n")
    done, seconds = command("inspect", "alignment", "--help", JAX_PLATFORMS="nonexistent")
    assert done.returncode == 0
    assert seconds < 4
    assert "--merge-threshold" in done.stdout


def test_the_platform_of_these_tests_does_fail():
    code = "import jax; jax.devices()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "nonexistent"},
        check=False,
    )
    assert done.returncode != 0
    assert "nonexistent" in done.stderr
