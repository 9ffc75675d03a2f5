"""What a report shows, as plain data, and how it is collected from a run's directory."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdistill.checkpoint.arrays import CheckpointError
from jaxdistill.checkpoint.open import open_config
from jaxdistill.formats.paths import AnyPath, any_path
from jaxdistill.models.schema import count_parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """One line about a model. bytes: of its files."""

    name: str
    family: str
    parameters: int
    layers: int
    vocab: int
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """What a model made of a prompt."""

    model: str
    prompt: str
    continuation: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything on the page. What is empty or None is left out of it.

    steps, held_out: the lines of metrics.jsonl of the two kinds, in order of steps. evaluation: as
    `Evaluation.to_dict` writes it. times: seconds by part. config, versions: as the run wrote them.
    """

    title: str
    models: tuple[ModelFacts, ...] = ()
    steps: tuple[Mapping[str, Any], ...] = ()
    held_out: tuple[Mapping[str, Any], ...] = ()
    evaluation: Mapping[str, Any] | None = None
    samples: tuple[Sample, ...] = ()
    times: Mapping[str, float] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def collect(run: AnyPath) -> ReportData:
    """Reads what a run's directory holds: metrics.jsonl, config.json, evaluation.json, samples.json, times.json,
    versions.json, and the models that they name.

    Files of the training part may lie in a sub-directory `train`. Raises FileNotFoundError when there is nothing to
    show, and ValueError for a file that is not what it should be.
    """
    directory = any_path(run)
    found = {name: _find(directory, name) for name in FILES}
    if not any(found.values()):
        raise FileNotFoundError(f"{run} is not a run's directory: it has none of {', '.join(FILES)}.")
    lines = _lines(found["metrics.jsonl"])
    config = _object(found["config.json"])
    models = tuple(_models(directory, config))
    return ReportData(
        title=_title(directory, models),
        models=models,
        steps=tuple(line for line in lines if "loss" in line),
        held_out=tuple(line for line in lines if isinstance(line.get("held_out"), dict)),
        evaluation=_evaluation(found["evaluation.json"]),
        samples=_samples(found["samples.json"]),
        times=_times(found["times.json"]),
        config=config,
        versions=_object(found["versions.json"]),
    )


FILES = ("metrics.jsonl", "config.json", "evaluation.json", "samples.json", "times.json", "versions.json")


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _find(directory: Path, name: str) -> Path | None:
    return next((place / name for place in (directory, directory / "train") if (place / name).is_file()), None)


def _title(directory: Path, models: Sequence[ModelFacts]) -> str:
    name = directory.resolve().name
    if len(models) < 2:
        return name
    return f"{name}: {short_count(models[0].parameters)} into {short_count(models[-1].parameters)} parameters"


def short_count(value: float) -> str:
    """1234567 → 1.23M."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def _lines(file: Path | None) -> list[dict[str, Any]]:
    """Whole lines only: the last one may be torn in a run that goes on or was killed."""
    if file is None:
        return []
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            parsed = json.loads(line)
        except ValueError:
            continue
        if isinstance(parsed, dict) and number(parsed.get("step")) is not None:
            found.append(parsed)
    return sorted(found, key=lambda line: line["step"])


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}). Write it again, or move it away to leave it out.") from None


def _object(file: Path | None) -> dict[str, Any]:
    parsed = {} if file is None else _json(file)
    if not isinstance(parsed, dict):
        raise ValueError(f"{file} holds a JSON {type(parsed).__name__}; an object is needed.")
    return parsed


def _evaluation(file: Path | None) -> dict[str, Any] | None:
    if file is None:
        return None
    parsed = _object(file)
    if not isinstance(parsed.get("models"), dict):
        raise ValueError(f"{file} has no object 'models'; write it with `jaxdistill evaluate --out`.")
    return parsed


def _samples(file: Path | None) -> tuple[Sample, ...]:
    if file is None:
        return ()
    fields = [field.name for field in dataclasses.fields(Sample)]
    try:
        return tuple(Sample(**{name: str(row[name]) for name in fields}) for row in _json(file))
    except (KeyError, TypeError):
        raise ValueError(f"{file} must be a list of objects with {', '.join(fields)}.") from None


def _times(file: Path | None) -> dict[str, float]:
    parts = {name: number(value) for name, value in _object(file).items()}
    return {name: value for name, value in parts.items() if value is not None and value > 0}


def _models(directory: Path, config: Mapping[str, Any]) -> Iterator[ModelFacts]:
    """The teacher that the configuration names and the student that the run wrote, if they are still there."""
    teacher = (config.get("teacher") or {}).get("path")
    places = {"teacher": [any_path(teacher)] if teacher else [], "student": [directory / "student"]}
    places["student"].append(directory / "train" / "student")
    for name, candidates in places.items():
        for place in (candidate for candidate in candidates if candidate.exists()):
            try:
                shape = open_config(place)
            except (ValueError, CheckpointError):
                continue  # another program's files: the page says nothing about them
            size = place.stat().st_size if place.is_file() else sum(f.stat().st_size for f in place.rglob("*"))
            yield ModelFacts(
                name=name,
                family=shape.family,
                parameters=count_parameters(shape),
                layers=len(shape.layers),
                vocab=shape.vocab,
                bytes=size,
            )
            break
