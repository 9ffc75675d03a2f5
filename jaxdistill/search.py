"""Searching the shape of a student: candidates under a budget, each pruned from one measurement and briefly distilled.

Which shape is best before training says little: rankings settle only while candidates learn (Compact Language Models
via Pruning and Knowledge Distillation, 2407.14679). So every candidate is a short run of the same recipe,
measured on held-out text before its first and after its last step. Everything resumes, inside a candidate too.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
from jax.experimental import multihost_utils

from jaxdistill.checkpoint.compatible import check_compatible
from jaxdistill.checkpoint.open import open_config, open_model
from jaxdistill.choices import check_choices
from jaxdistill.formats.paths import any_path, remove_tree, write_text
from jaxdistill.jobs.inspect import metric_lines
from jaxdistill.jobs.prune import kept_scores
from jaxdistill.models.cost import (
    HARDWARE,
    Workload,
    active_parameters,
    latency_seconds,
    memory_bytes,
)
from jaxdistill.models.export import check_exportable
from jaxdistill.models.schema import count_parameters
from jaxdistill.prune.choose import Target, choose, equal_importance
from jaxdistill.prune.depth import with_depth
from jaxdistill.prune.importance import Importance
from jaxdistill.prune.measure import Calibration
from jaxdistill.prune.plan import PrunePlan
from jaxdistill.prune.slice import NormRepair, plan_cut
from jaxdistill.report.search import Candidate, search_table, write_search_page
from jaxdistill.sharding import Layout
from jaxdistill.specs import ModelConfig
from jaxdistill.train import config as train_config
from jaxdistill.train.config import TrainConfig, as_document
from jaxdistill.train.loop import TrainingStopped, train
from jaxdistill.train.progress import Say, finite
from jaxdistill.train.setup import Places, calibration_of, check_shapes, enable_compilation_cache, join_processes

Cost = Literal["parameters", "active_parameters", "memory_mb", "latency_ms"]
HardwareName = Literal["a100", "h100", "h200", "tpu-v5e", "tpu-v5p", "tpu-v6e"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What a student may cost; None is unlimited. A number of at most 1 is a share of the original's cost."""

    parameters: float | None = None
    active_parameters: float | None = None
    memory_mb: float | None = None
    """Weights and KV cache of the workload, in 10⁶ bytes."""
    latency_ms: float | None = None
    """For the workload's prompts and answers, by the roofline of one device (`models.cost.latency_seconds`)."""
    workload: Workload = dataclasses.field(default_factory=Workload)
    hardware: HardwareName = "h100"

    def __post_init__(self):
        check_choices(self)
        if not self.limits:
            raise ValueError("the budget limits nothing; give parameters, active_parameters, memory_mb or latency_ms.")
        wrong = {name: limit for name, limit in self.limits.items() if not limit > 0}
        if wrong:
            raise ValueError(f"the budget has {wrong}; limits are positive.")

    @property
    def limits(self) -> dict[Cost, float]:
        names: tuple[Cost, ...] = ("parameters", "active_parameters", "memory_mb", "latency_ms")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def costs(self, shape: ModelConfig) -> dict[Cost, float]:
        """All costs of a shape."""
        return {
            "parameters": count_parameters(shape),
            "active_parameters": active_parameters(shape),
            "memory_mb": memory_bytes(shape, self.workload) / 1e6,
            "latency_ms": 1e3 * latency_seconds(shape, self.workload, HARDWARE[self.hardware]),
        }

    def absolute(self, original: ModelConfig) -> dict[Cost, float]:
        """The limits with shares as numbers."""
        whole = self.costs(original)
        return {name: limit * whole[name] if limit <= 1 else limit for name, limit in self.limits.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """Sizes that are tried. Without choices of its own an axis has the multiples of a divisor that are left after at
    most so large a share is cut; heads and experts are kept unless given (LLM Pruning and Distillation in Practice,
    2408.11796), and so is `mlp` where it differs from layer to layer."""

    layers: tuple[int, ...] = ()
    embed: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    kv_heads: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()
    max_width_pruning: float = 0.4
    max_depth_pruning: float = 0.2
    layers_divisor: int = 2
    embed_divisor: int | None = None
    """None: the query heads times a power of two, at most a sixteenth of the width, for formats that want a multiple
    of the heads; where devices split the width, a multiple of this that they divide."""
    mlp_divisor: int | None = None
    """None: a power of two, at most a sixteenth of the width, or a multiple of it that the devices divide."""

    def __post_init__(self):
        for name in ("max_width_pruning", "max_depth_pruning"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"Grid.{name} is {getattr(self, name)}; it is a share from 0 to below 1.")
        for name in ("layers_divisor", "embed_divisor", "mlp_divisor"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"Grid.{name} is {getattr(self, name)}; it must be at least 1.")

    def targets(self, config: ModelConfig, layout: Layout = Layout()) -> Iterator[Target]:
        """All combinations; an axis without choices of its own has its whole size among them. layout: where the
        candidates are to be."""
        depth = len(config.layers)
        attention = next((layer.mixer for layer in config.layers if layer.mixer is not None), None)
        kv_heads, all_heads = (1, 1) if attention is None else (attention.kv_heads, attention.heads)
        embed_divisor = _doubled(all_heads, config.embed // 16)
        embed_divisor = self.embed_divisor or _split(embed_divisor, config.embed, layout.split("embed"))
        axes: dict[str, tuple[int, ...]] = {
            "layers": self.layers or _multiples(depth, self.layers_divisor, self.max_depth_pruning),
            "embed": self.embed or _multiples(config.embed, embed_divisor, self.max_width_pruning),
            "mlp": self.mlp or self._neurons(config, layout),
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "experts": self.experts,
        }
        axes = {name: sizes for name, sizes in axes.items() if sizes}
        for sizes in itertools.product(*axes.values()):
            target = Target(**dict(zip(axes, sizes, strict=True)))
            groups, size = target.kv_heads or kv_heads, all_heads // kv_heads
            heads = target.heads or groups * size
            # Every key-value head has equally many query heads, no more than it had.
            if heads % groups == 0 and heads <= groups * size:
                yield target

    def _neurons(self, config: ModelConfig, layout: Layout) -> tuple[int, ...]:
        """Default sizes of the feed-forward networks; none where they differ: one for all would crush the widest."""
        sizes = {layer.ffn.mlp for layer in config.layers if layer.ffn is not None}
        if len(sizes) != 1:
            return ()
        [size] = sizes
        divisor = self.mlp_divisor or _split(_doubled(1, size // 16), size, layout.split("mlp"))
        return _multiples(size, divisor, self.max_width_pruning)


def _split(divisor: int, size: int, parts: int) -> int:
    """The least multiple of a divisor that the devices divide, if they divide the size at all."""
    return divisor if size % parts else math.lcm(divisor, parts)


def _doubled(start: int, most: int) -> int:
    """start · 2ⁿ as near below a number as it gets; start itself if that is above."""
    return start * 2 ** max(0, int(math.log2(max(1, most / start))))


def _multiples(size: int, divisor: int, most_cut: float) -> tuple[int, ...]:
    """Multiples of the divisor down to the smallest allowed size, and the size itself."""
    smallest = math.ceil((1 - most_cut) * size)
    return tuple(sorted({size, *range(-(-smallest // divisor) * divisor, size, divisor)}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """A search: what a candidate's run is, what it may cost, and which are tried."""

    out: str
    """Where everything goes; one that holds a search of this configuration is resumed."""
    train: TrainConfig
    """The run of each candidate; its `out`, `export` and sizes are the search's business."""
    budget: Budget
    grid: Grid = dataclasses.field(default_factory=Grid)
    candidates: int = 10
    """How many are tried: those that use most of the budget."""

    def __post_init__(self):
        if self.candidates < 1:
            raise ValueError(f"SearchConfig.candidates is {self.candidates}; it must be at least 1.")
        student = self.train.student
        if student.model is not None or student.plan is not None or not student.prune.changes_nothing:
            raise ValueError("a search chooses the sizes itself; leave out train.student.prune, plan and model.")

    def check(self) -> None:
        """Refuses what cannot run, before any device is touched."""
        if not self.out:
            raise ValueError("no directory; give --out DIR.")
        # Sizes come later, and with them the number of layers that `depth` is about.
        student = dataclasses.replace(self.train.student, depth="scorer")
        dataclasses.replace(self.train, out=self.out, student=student).check()
        if self.train.held_out.path is None:
            raise ValueError("candidates are compared on held-out text; give --train.held-out.path FILE.")


def search(config: SearchConfig) -> list[Candidate]:
    """Runs a search, prints the ranked table, writes OUT/search.json and OUT/search.html; returns the candidates, best
    first. The same call goes on after an interruption. Raises ValueError where nothing fits the budget."""
    config.check()
    join_processes(config.train)
    enable_compilation_cache(config.train.compilation_cache)
    out, say, first = any_path(config.out), Say(), jax.process_index() == 0
    original = open_config(_source(config))
    _check_same(out / "config.json", as_document(config))
    targets = _planned(config, original, out, say)
    rows: list[Candidate] = []
    for number, target in enumerate(targets):
        name = _name(target)
        plan = out / "plans" / f"{name}.json"
        shape = PrunePlan.load(plan).resize(original)
        say(f"candidate {number + 1}/{len(targets)}: {name}, {count_parameters(shape):,} parameters")
        found = _distilled(config, out / "candidates" / name, plan)
        if found is None:
            say("stopped; the same command goes on")
            return sorted(rows, key=lambda row: row.after)
        before, after = found
        costs = {str(cost): number for cost, number in config.budget.costs(shape).items()}
        rows.append(Candidate(name=name, plan=str(plan), costs=costs, before=before, after=after))
        if first:
            _write(config, out, rows, planned=len(targets))
    ranked = sorted(rows, key=lambda row: row.after)
    say(f"\n{search_table(ranked, limited=tuple(config.budget.limits))}\n\npage: {out / 'search.html'}")
    return ranked


def _source(config: SearchConfig) -> str:
    return config.train.student.path or config.train.teacher.path or ""


def _planned(config: SearchConfig, original: ModelConfig, out: Path, say: Say) -> list[Target]:
    """The candidates, each with its plan in OUT/plans. The original is read only where a plan is missing, or where its
    layers differ, so that a shape depends on which of them stay."""
    layout = Places.of(config.train).student
    parts = _Parts(config, original, out, layout, say)
    alike = Target(layers=1).certain(original)
    targets = feasible(config, original, layout=layout, named=None if alike else parts.named, say=say)
    for target in targets:
        student = dataclasses.replace(config.train.student, prune=target if alike else parts.named(target))
        check_shapes(dataclasses.replace(config.train, student=student), layout=layout)
    say(f"{len(targets)} candidates of at most {_limits(config.budget, original)}")
    for target in targets:
        plan = out / "plans" / f"{_name(target)}.json"
        if _exists(plan):
            continue
        chosen = choose(original, parts.scores, parts.named(target))
        if jax.process_index() == 0:
            write_text(out / "config.json", json.dumps(as_document(config), indent=1) + "\n")
            chosen.save(plan)
    _together()
    return targets


def feasible(
    config: SearchConfig,
    original: ModelConfig,
    *,
    layout: Layout = Layout(),
    named: Callable[[Target], Target] | None = None,
    say: Callable[[str], None] = print,
) -> list[Target]:
    """The candidates: shapes of the grid within the budget that can be written as the run wants them and that its mesh
    divides, those that use most of the first limit first. Says how many are left out, and raises ValueError when none
    is left.

    layout: where the candidates are to be. named: gives a target the layers that it keeps; None takes the first ones,
    which is as good where all are alike.
    """
    limits = config.budget.absolute(original)
    main = next(iter(limits))
    found: list[tuple[float, Target]] = []
    left_out: dict[type, list[str]] = {}
    smallest = math.inf
    on_mesh = _mesh_check(original, layout, config.train.student.norm_repair)
    for target in config.grid.targets(original, layout):
        shape = (named(target) if named else target).resize(original)
        try:
            if config.train.export == "huggingface":
                check_exportable(shape)
            on_mesh(dataclasses.replace(target, layers=None))
        except ValueError as error:
            left_out.setdefault(type(error), []).append(f"{_name(target)}: {error}")
            continue
        costs = config.budget.costs(shape)
        smallest = min(smallest, costs[main])
        if shape != original and all(costs[name] <= limit for name, limit in limits.items()):
            found.append((costs[main], target))
    for reasons in left_out.values():
        say(f"{len(reasons)} of the grid's shapes are left out, such as {reasons[0]}")
    if math.isinf(smallest):
        raise ValueError(
            "no shape of the grid can be made; give other sizes (grid.embed, …), another train.mesh, or train.export "
            "jaxdistill."
        )
    if not found:
        raise ValueError(
            f"no shape of the grid fits {_limits(config.budget, original)}; the smallest has {main} {smallest:.4g}. "
            "Allow more (grid.max_width_pruning, grid.max_depth_pruning), or give sizes (grid.layers, grid.mlp, …)."
        )
    found.sort(key=lambda each: -each[0])
    return [target for _, target in found[: config.candidates]]


def _mesh_check(original: ModelConfig, layout: Layout, norm_repair: NormRepair) -> Callable[[Target], None]:
    """Refuses widths that the mesh does not divide, or norms that cannot be repaired. Layers of one kind are cut alike:
    one of each kind tells all."""
    kinds = dataclasses.replace(original, layers=tuple(dict.fromkeys(original.layers)))

    @functools.cache
    def check(target: Target) -> None:
        plan_cut(kinds, choose(kinds, equal_importance(kinds), target), layout=layout, norm_repair=norm_repair)

    return check


class _Parts:
    """What the original's parts are worth, measured once for all candidates, when it is first asked for."""

    def __init__(self, config: SearchConfig, original: ModelConfig, out: Path, layout: Layout, say: Say):
        self._config, self._original, self._out, self._layout, self._say = config, original, out, layout, say
        self._layers: dict[int, Target] = {}

    @functools.cached_property
    def scores(self) -> Importance:
        student, train = self._config.train.student, self._config.train
        settings = {
            "scorer": as_document(student.scorer),
            "depth": student.depth,
            "batches": student.calibration_batches,
            "model": _source(self._config),
            "activations": student.execution.activation_dtype,
            "data": as_document(train.data),
        }

        def measure() -> Importance:
            scores = student.scorer(self._text)
            return scores if self._by_block else self._by_depth(scores, Target(layers=1))[0]

        files = [_source(self._config), train.data.path]
        return kept_scores(self._out, settings, files, measure, say=self._say)

    def named(self, target: Target) -> Target:
        """The target with the layers that it keeps."""
        if not isinstance(target.layers, int):
            return target
        if target.layers not in self._layers:
            number = Target(layers=target.layers)
            if self._by_block:
                number = self._by_depth(self.scores, number)[1]
            kept = choose(self._original, self.scores, number).layers
            self._layers[target.layers] = Target(layers=kept)
        return dataclasses.replace(target, layers=self._layers[target.layers].layers)

    @property
    def _by_block(self) -> bool:
        return self._config.train.student.depth.startswith("block")

    def _by_depth(self, scores: Importance, target: Target) -> tuple[Importance, Target]:
        return with_depth(self._config.train.student.depth, scores, target, lambda: self._text)

    @functools.cached_property
    def _text(self) -> Calibration:
        model = open_model(_source(self._config), layout=self._layout)
        return calibration_of(
            self._config.train,
            model,
            self._layout,
            lambda done, total: self._say.progress(f"importance: batch {done}/{total}"),
        )


def _limits(budget: Budget, original: ModelConfig) -> str:
    return ", ".join(f"{name} {limit:,.4g}" for name, limit in budget.absolute(original).items())


def _name(target: Target) -> str:
    sizes = {field.name: getattr(target, field.name) for field in dataclasses.fields(target)}
    return "-".join(f"{name}{size}" for name, size in sizes.items() if size is not None)


def _distilled(config: SearchConfig, directory: Path, plan: Path) -> tuple[float, float] | None:
    """A candidate's distance from the teacher (or bits per byte) before and after its run; infinite when it diverged,
    None when it was stopped by a signal."""
    run = dataclasses.replace(
        config.train,
        out=str(directory),
        student=dataclasses.replace(config.train.student, plan=str(plan), depth="scorer"),
        export="none",
    )
    result = directory / "result.json"
    if not _exists(result):
        try:
            if train(run).step < run.steps:
                return None
        except TrainingStopped:
            pass  # its steps were not finite: what it has measured so far is all there is
        if jax.process_index() == 0:
            write_text(result, json.dumps(_measured(directory / "metrics.jsonl", run.steps)) + "\n")
            # A candidate's weights are many times its plan, and one is trained again for longer anyway.
            remove_tree(directory / "checkpoints")
    _together()
    found = json.loads(result.read_text())
    return _number(found["before"]), _number(found["after"])


def _measured(metrics: Path, steps: int) -> dict[str, float | None]:
    """The score before the first and after the last step; None where there is none, or none that is finite."""
    held_out = {line["step"]: line["held_out"] for line in metric_lines(metrics) if "held_out" in line}
    scores = {step: found.get("kl_nats", found["bits_per_byte"]) for step, found in held_out.items()}
    return {"before": scores.get(0), "after": scores.get(steps)}


def _number(score: float | None) -> float:
    return math.inf if score is None else score


def _exists(file: Path) -> bool:
    """Whether a file is there, as all processes agree: no one looks before the others have written."""
    _together()
    return file.exists()


def _together() -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("search")


MAY_CHANGE = {"out", "candidates", *(f"train.{name}" for name in train_config.MAY_CHANGE)}
ADDED = {f"train.{name}": value for name, value in train_config.ADDED.items()}


def _check_same(file: Path, document: Any) -> None:
    """A search that is resumed compares candidates of one configuration."""
    if file.exists():
        check_compatible(json.loads(file.read_text()), document, may_change=MAY_CHANGE, added=ADDED)


def _write(config: SearchConfig, out: Path, rows: list[Candidate], *, planned: int) -> None:
    ranked = sorted(rows, key=lambda row: row.after)
    rows_of_json = [finite(dataclasses.asdict(row)) for row in ranked]
    write_text(out / "search.json", json.dumps(rows_of_json, indent=1) + "\n")
    write_search_page(
        out / "search.html",
        ranked,
        limited=tuple(config.budget.limits),
        unit=unit(config),
        tokens=config.train.steps * config.train.data.batch_size * config.train.data.length,
        left=planned - len(rows),
    )


def unit(config: SearchConfig) -> str:
    """What candidates are ranked by: across tokenizers no KL is measured on held-out text."""
    by_kl = config.train.teacher.path is not None and not config.train.aligned
    return "KL to the teacher, nats per token" if by_kl else "bits per byte"
