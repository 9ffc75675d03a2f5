"""A smaller model out of a large one: importance on text, a plan, and the model that the plan leaves."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxdistill.checkpoint.model import save_model
from jaxdistill.checkpoint.open import Model, open_config, open_model
from jaxdistill.choices import check_choices
from jaxdistill.data.pipeline import DataConfig
from jaxdistill.formats.paths import any_path, write_text
from jaxdistill.jobs.inspect import describe_path
from jaxdistill.jobs.stage import counted, stage, whole_machine
from jaxdistill.models.decoder import Execution
from jaxdistill.models.export import check_exportable, write_hf
from jaxdistill.prune.baselines import random_importance, weight_magnitude
from jaxdistill.prune.choose import Target, choose, equal_importance
from jaxdistill.prune.depth import best_window, layers_when_dropped
from jaxdistill.prune.importance import Importance
from jaxdistill.prune.measure import Activations, Calibration, MaskGradients, calibrate
from jaxdistill.prune.plan import PrunePlan
from jaxdistill.prune.slice import NormRepair, prune_model
from jaxdistill.sharding import Layout

SCORERS = {"activations": Activations(), "mask-gradients": MaskGradients()}
ScorerName = Literal["activations", "mask-gradients", "weights", "random"]
DepthName = Literal["scorer", "loss", "kl", "block-by-loss", "block-by-kl"]
SCORES, SETTINGS, PLAN, MODEL = "importance.npz", "importance.json", "plan.json", "model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """What is cut and how, as in `jaxdistill prune --help`."""

    model: str
    out: str
    target: Target
    data: DataConfig
    batches: int
    scorer: ScorerName
    depth: DepthName
    plan: str | None
    sort: bool
    merge_heads: bool
    norm_repair: NormRepair
    to: Literal["jaxdistill", "hf"]
    dtype: str
    activations: Literal["float32", "bfloat16"]

    def __post_init__(self):
        check_choices(self)
        if self.plan is None and self.target.changes_nothing and not self.sort:
            raise ValueError("nothing to prune: give a size (--layers, --mlp, --embed, …), --plan FILE, or --sort.")
        if self.plan is not None and not self.target.changes_nothing:
            raise ValueError("--plan has its own sizes; leave out the others.")
        if self.plan is not None and (self.sort or self.merge_heads or self.depth != "scorer"):
            raise ValueError("--plan says what is kept, and in which order: leave out --sort, --merge-heads, --depth.")
        if self.depth != "scorer" and not isinstance(self.target.layers, int):
            raise ValueError(f"--depth {self.depth} chooses layers; say how many to keep with --layers.")
        reads_text = self.scorer in SCORERS or self.depth != "scorer"
        if self.plan is None and self.data.path is None and reads_text and (self.sort or self.target.needs_scores):
            raise ValueError("importance is measured on text; give --data FILE, or --plan FILE.")


def prune(config: PruneConfig) -> Path:
    """Writes OUT/plan.json and OUT/model, and returns the latter. Scores that OUT holds for the same settings are used
    again. Refuses an OUT/model that exists, and sizes that cannot be, before any array is read."""
    out = any_path(config.out)
    if (out / MODEL).exists():
        raise FileExistsError(f"{out / MODEL} exists. Choose another --out, or move it.")
    source = open_config(config.model)
    given = None if config.plan is None else PrunePlan.load(config.plan)
    shape = config.target.resize(source) if given is None else given.resize(source)
    if config.to == "hf":
        check_exportable(shape)
    layout = whole_machine()
    with stage(f"opening {config.model}"):
        model = open_model(config.model, layout=layout, dtype=jnp.dtype(config.dtype))
    plan = given or make_plan(config, model, layout)
    plan.save(out / PLAN)
    print(f"kept: {plan.summary()}")
    with stage("cutting"):
        smaller, params = prune_model(model.config, model.params, plan, layout=layout, norm_repair=config.norm_repair)
        jax.block_until_ready(params)
    with stage(f"writing {out / MODEL}"):
        if config.to == "hf":
            write_hf(out / MODEL, smaller, params, dtype=config.dtype, tokenizer=model.tokenizer)
        else:
            save_model(out / MODEL, smaller, params, write_tokenizer=model.tokenizer.save)
    print(describe_path(str(out / MODEL)))
    return out / MODEL


def make_plan(config: PruneConfig, model: Model, layout: Layout) -> PrunePlan:
    """The plan for a configuration's sizes, with importance measured or read."""
    if not (config.target.needs_scores or config.sort):
        return choose(model.config, equal_importance(model.config), config.target)

    def calibration() -> Calibration:
        return calibrate(
            model.config,
            model.params,
            model.tokenizer,
            config.data,
            batches=config.batches,
            layout=layout,
            execution=Execution(activation_dtype=config.activations),
        )

    scores, target = part_scores(config, model, layout, calibration), config.target
    if isinstance(target.layers, int) and config.depth != "scorer":
        given = calibration()
        with counted(f"layers by {config.depth}: batch") as progress:
            given = dataclasses.replace(given, progress=progress)
            if config.depth in ("loss", "kl"):
                scores = dataclasses.replace(scores, layers=layers_when_dropped(given, by=config.depth))
            elif target.layers < len(model.config.layers):
                by = "loss" if config.depth == "block-by-loss" else "kl"
                target = dataclasses.replace(target, layers=best_window(given, target.layers, by=by))
    return choose(model.config, scores, target, sort=config.sort, merge_heads=config.merge_heads)


def part_scores(
    config: PruneConfig, model: Model, layout: Layout, calibration: Callable[[], Calibration]
) -> Importance:
    """OUT/importance.npz if it was made with the same settings and files, else measured and written there."""
    if config.scorer == "random":
        return random_importance(model.config, config.data.seed)
    if config.scorer == "weights":
        return weight_magnitude(model.config, model.params, layout)
    out = any_path(config.out)
    settings: Any = {"model": config.model, "scorer": config.scorer, "batches": config.batches, "dtype": config.dtype}
    settings |= {"activations": config.activations, "data": dataclasses.asdict(config.data)}
    settings |= {"changed": [_changed(path) for path in (config.model, config.data.path) if path]}
    if (out / SCORES).exists() and (out / SETTINGS).exists():
        if json.loads((out / SETTINGS).read_text()) == json.loads(json.dumps(settings)):
            print(f"importance: as measured before, in {out / SCORES}")
            return Importance.load(out / SCORES)
        (out / SETTINGS).unlink()
    with counted(f"importance by {config.scorer}: batch") as progress:
        scores = SCORERS[config.scorer](dataclasses.replace(calibration(), progress=progress))
    scores.save(out / SCORES)
    write_text(out / SETTINGS, json.dumps(settings, indent=1) + "\n")
    return scores


def _changed(path: str) -> list[int]:
    """The size of all files at a path, and when the last of them was written, in nanoseconds."""
    place = any_path(path)
    files = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
    return [sum(file.stat().st_size for file in files), max((file.stat().st_mtime_ns for file in files), default=0)]
