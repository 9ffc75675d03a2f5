"""The tools that run experiments: what is in a file of results is told and drawn without running anything."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[1] / "tools" / "experiments"


@pytest.fixture
def minitron(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    common, module = importlib.import_module("common"), importlib.import_module("minitron")

    def trains(config):
        raise AssertionError(f"{config.out} would be trained")

    monkeypatch.setattr(common, "train", trains)
    return module


def test_what_is_there_is_told_without_training(minitron, tmp_path, capsys):
    results = Path(shutil.copy(EXPERIMENTS / "minitron.jsonl", tmp_path))
    before = results.read_text()
    minitron.main(minitron.Options(parts=("toy",), out=tmp_path / "out", results=results))
    assert "| embed and mlp |" in capsys.readouterr().out
    assert results.read_text() == before


def test_a_row_that_is_missing_needs_its_teacher(minitron, tmp_path):
    with pytest.raises(AssertionError, match="toy-teacher-0 would be trained"):
        minitron.main(minitron.Options(parts=("toy",), out=tmp_path / "out"))
