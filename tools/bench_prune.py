"""What pruning costs: importance next to a plain forward pass, and a plan next to reading the parameters twice.

    python tools/bench_prune.py                       # SmolLM2-135M, 128 rows of 512 tokens

Both sides of a ratio alternate in one process, so that a machine that changes its speed changes both. Importance: the
whole accumulation (all axes, Block Influence) ÷ a forward pass to the last hidden states. Plan: cutting depth and all
widths at once, compiling included (nothing compiled is kept from one to the next), ÷ twice opening the model's
checkpoint, which is in the page cache. How far the cut alone is from the memory's speed is told by the time to sum all
parameters.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from jaxdistill.assets import asset
from jaxdistill.checkpoint.model import save_model
from jaxdistill.checkpoint.open import Model, open_model
from jaxdistill.data import DataConfig
from jaxdistill.models.decoder import apply
from jaxdistill.prune.choose import Target, choose
from jaxdistill.prune.importance import Importance, add, importance, importance_taps
from jaxdistill.prune.measure import Calibration, calibrate
from jaxdistill.prune.slice import plan_cut, prune_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured on what."""

    model: Path | None = None
    """None is SmolLM2-135M, fetched when it is not there."""
    data: Path | None = None
    rows: int = 128
    length: int = 512
    batch_size: int = 8
    repeats: int = 5


def main(options: Options) -> None:
    model = open_model(options.model or asset("smollm2"))
    data = DataConfig(
        path=str(options.data or asset("boolq-passages")), length=options.length, batch_size=options.batch_size
    )
    batches = options.rows // options.batch_size
    calibration = calibrate(model.config, model.params, model.tokenizer, data, batches=batches)
    scores = measure_importance(calibration)
    measure_plan(model, scores, options.repeats)


def measure_importance(calibration: Calibration) -> Importance:
    config, taps = calibration.config, importance_taps(calibration.config)
    plain = jax.jit(lambda params, batch: apply(config, params, batch).hidden)
    tapped = jax.jit(lambda params, batch: apply(config, params, batch, taps=taps).taps)
    times: dict[str, list[float]] = {"forward": [], "importance": []}
    for run in (plain, tapped):
        jax.block_until_ready(run(calibration.params, calibration.batches[0]))
    sums: Any = None
    for batch in calibration.batches:
        times["forward"].append(seconds(lambda b=batch: plain(calibration.params, b)))
        began = time.perf_counter()
        found = jax.tree.map(lambda x: np.asarray(x, np.float64), tapped(calibration.params, batch))
        sums = found if sums is None else add(sums, found)
        times["importance"].append(time.perf_counter() - began)
    forward, measured = sum(times["forward"]), sum(times["importance"])
    tokens = sum(batch.tokens.size for batch in calibration.batches)
    print(f"{tokens:,} tokens: forward {forward:.1f} s, importance {measured:.1f} s: {measured / forward:.3f}x")
    return importance(config, sums)


def measure_plan(model: Model, scores: Importance, repeats: int) -> None:
    widths, depth = model.config.layers[0].widths, len(model.config.layers)
    target = Target(
        layers=depth * 4 // 5,
        embed=model.config.embed * 3 // 4,
        mlp=widths["mlp"] * 3 // 4,
        heads=widths["heads"] * 2 // 3 // widths["kv_heads"] * widths["kv_heads"],
    )
    plan = choose(model.config, scores, target)
    _, cut = plan_cut(model.config, plan)
    add = jax.jit(lambda params: sum(leaf.sum() for leaf in jax.tree.leaves(params)))

    def compiled_again(run: Callable[[], Any]) -> float:
        jax.clear_caches()
        taken = seconds(run)
        jax.block_until_ready((cut(model.params), add(model.params)))
        return taken

    with tempfile.TemporaryDirectory() as directory:
        save_model(Path(directory) / "model", model.config, model.params, write_tokenizer=model.tokenizer.save)
        rounds = [
            (
                compiled_again(lambda: prune_model(model.config, model.params, plan)[1]),
                seconds(lambda: open_model(Path(directory) / "model").params),
                seconds(lambda: cut(model.params)),
                seconds(lambda: add(model.params)),
            )
            for _ in range(repeats)
        ]
    ratio = statistics.median(applied / (2 * opened) for applied, opened, _, _ in rounds)
    applied, opened, cutting, adding = (statistics.median(each) for each in zip(*rounds, strict=True))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    print(
        f"plan for {plan.summary()}: {applied:.2f} s, opening the checkpoint ({size / 1e6:.0f} MB) twice "
        f"{2 * opened:.2f} s: {ratio:.2f}x; compiled before {1e3 * cutting:.0f} ms, summing all parameters "
        f"{1e3 * adding:.0f} ms"
    )


def seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
