"""A smaller model out of a large one: importance on text, a plan, and the model that the plan leaves."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
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
from jaxdistill.prune.depth import Depth, with_depth
from jaxdistill.prune.importance import Aggregation, Importance
from jaxdistill.prune.measure import Activations, Calibration, MaskGradients, calibrate
from jaxdistill.prune.plan import PrunePlan
from jaxdistill.prune.slice import NormRepair, plan_cut, prune_model
from jaxdistill.sharding import Layout, MeshConfig

SCORERS = {"activations": Activations(), "mask-gradients": MaskGradients()}
ScorerName = Literal["activations", "mask-gradients", "weights", "random"]
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
    over_tokens: Aggregation
    over_rows: Aggregation
    depth: Depth
    plan: str | None
    sort: bool
    merge_heads: bool
    norm_repair: NormRepair
    to: Literal["jaxdistill", "hf"]
    dtype: str
    activations: Literal["float32", "bfloat16"]
    mesh: MeshConfig

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
        if self.scorer != "activations" and self.reduction != Activations():
            raise ValueError(f"--over-tokens and --over-rows reduce activations; leave them out for {self.scorer}.")
        reads_text = self.scorer in SCORERS or self.depth != "scorer"
        if self.plan is None and self.data.path is None and reads_text and (self.sort or self.target.needs_scores):
            raise ValueError("importance is measured on text; give --data FILE, or --plan FILE.")

    @property
    def reduction(self) -> Activations:
        return Activations(sequence=self.over_tokens, batch=self.over_rows)


def prune(config: PruneConfig) -> Path:
    """Writes OUT/plan.json and OUT/model, and returns the latter. Scores that OUT holds for the same settings are used
    again. Refuses an OUT/model that exists, and sizes that cannot be (of the model, on the mesh, in the format), before
    any array is read."""
    out = any_path(config.out)
    if (out / MODEL).exists():
        raise FileExistsError(f"{out / MODEL} exists. Choose another --out, or move it.")
    source = open_config(config.model)
    given = None if config.plan is None else PrunePlan.load(config.plan)
    layout = whole_machine(config.mesh)
    # Which parts are kept may not be known before they are measured, but how many are.
    foreseen = given or choose(source, equal_importance(source), config.target)
    if config.to == "hf" and (given is not None or config.target.certain(source)):
        check_exportable(foreseen.resize(source))
    plan_cut(source, foreseen, layout=layout, norm_repair=config.norm_repair)
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
    if config.depth != "scorer":
        with counted(f"layers by {config.depth}: batch") as progress:
            scores, target = with_depth(
                config.depth, scores, target, lambda: dataclasses.replace(calibration(), progress=progress)
            )
    return choose(model.config, scores, target, sort=config.sort, merge_heads=config.merge_heads)


def part_scores(
    config: PruneConfig, model: Model, layout: Layout, calibration: Callable[[], Calibration]
) -> Importance:
    """OUT/importance.npz if it was made with the same settings and files, else measured and written there."""
    if config.scorer == "random":
        return random_importance(model.config, config.data.seed)
    if config.scorer == "weights":
        return weight_magnitude(model.config, model.params, layout)
    settings: Any = {"model": config.model, "scorer": config.scorer, "batches": config.batches, "dtype": config.dtype}
    settings |= {"activations": config.activations, "data": dataclasses.asdict(config.data)}
    settings |= {"over": [config.over_tokens, config.over_rows]}

    def measure() -> Importance:
        scorer = config.reduction if config.scorer == "activations" else SCORERS[config.scorer]
        with counted(f"importance by {config.scorer}: batch") as progress:
            return scorer(dataclasses.replace(calibration(), progress=progress))

    return kept_scores(any_path(config.out), settings, [config.model, config.data.path], measure)


def kept_scores(
    out: Path,
    settings: Mapping[str, Any],
    files: Iterable[str | None],
    measure: Callable[[], Importance],
    *,
    say: Callable[[str], None] = print,
) -> Importance:
    """OUT/importance.npz if it was made with these settings, from these files as they are now; else what is measured,
    written there by process 0."""
    made_with = json.loads(json.dumps({**settings, "changed": [_changed(path) for path in files if path]}))
    if (out / SCORES).exists() and (out / SETTINGS).exists() and json.loads((out / SETTINGS).read_text()) == made_with:
        say(f"importance: as measured before, in {out / SCORES}")
        return Importance.load(out / SCORES)
    scores = measure()
    if jax.process_index() == 0:
        # Settings last: they never stand beside the scores of others.
        (out / SETTINGS).unlink(missing_ok=True)
        scores.save(out / SCORES)
        write_text(out / SETTINGS, json.dumps(made_with, indent=1) + "\n")
    return scores


def _changed(path: str) -> list[int]:
    """The size of all files at a path, and when the last of them was written, in nanoseconds."""
    place = any_path(path)
    files = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
    return [sum(file.stat().st_size for file in files), max((file.stat().st_mtime_ns for file in files), default=0)]
