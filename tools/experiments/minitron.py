"""Does importance matter, and is pruning with distillation worth it? The experiments behind docs/papers.md, Minitron.

    python tools/experiments/minitron.py toy            # a byte-level model on Python source
    python tools/experiments/minitron.py smollm2-50     # SmolLM2-135M cut to half, about two hours on two cores
    python tools/experiments/minitron.py smollm2-75     # and to three quarters, about as long
    python tools/experiments/minitron.py toy smollm2-50 smollm2-75 --draw docs/pictures

Every run adds a line to OUT/results.jsonl; the same command goes on where it was interrupted, inside a run too. What
docs/papers.md reports is kept in tools/experiments/minitron.jsonl: `--results` with that file draws it, or adds to it.
Learning rates are tuned alike for all methods: each is tried with the same number of them on seed 0, on the same
held-out text, and the best is used for the other seeds. A line of the final tables is a mean over seeds and their
standard deviation.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from common import (
    SEEDS,
    Bench,
    Places,
    Row,
    domains_of_held_out_text,
    draw_ways,
    finish,
    in_turn,
    plotting,
    rows_of,
    run_parts,
    spread,
    write_texts,
)

from jaxdistill.assets import asset
from jaxdistill.checkpoint.open import Model, open_config, open_model
from jaxdistill.data import DataConfig, eval_batches, source_at
from jaxdistill.losses.chunked import default_chunk
from jaxdistill.losses.terms import CrossEntropy, ForwardKL, Term, TopOneAgreement
from jaxdistill.models.decoder import apply
from jaxdistill.prune.baselines import even_importance, worst_first
from jaxdistill.prune.choose import Target, choose
from jaxdistill.prune.importance import Importance
from jaxdistill.prune.measure import (
    Activations,
    Calibration,
    MaskGradients,
    RandomScores,
    Scorer,
    WeightMagnitude,
    calibrate,
)
from jaxdistill.prune.slice import prune_model
from jaxdistill.sharding import Layout
from jaxdistill.specs import Attention, GatedMLP, LayerSpec, ModelConfig
from jaxdistill.step import make_eval_step
from jaxdistill.tokenizers import ByteTokenizer
from jaxdistill.train.config import (
    StudentConfig,
    TeacherConfig,
)
from jaxdistill.types import as_batch

CALIBRATION_BATCHES = 16
BEFORE = ("importance", "mask gradients", "even", "weights", "random", "worst")
"""Ways to choose what is kept."""
Part = Literal["toy", "smollm2-50", "smollm2-75"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Places):
    """Which experiments to run, and where."""

    parts: tyro.conf.Positional[tuple[Part, ...]]
    out: Path = Path("runs/experiments/minitron")


def main(options: Options) -> None:
    run_parts(options, options.parts, run=experiment, table=table, draw=draw)


def experiment(out: Path, results: Path, part: Part) -> None:
    if part == "toy":
        toy(out, results)
    else:
        smollm2(out, results, part.removeprefix("smollm2-"))


LABELS = {"kl_nats": "KL to the teacher, nats per token", "cross_entropy_nats": "cross-entropy, nats per byte"}


def calibration(bench: Bench, model: Model, seed: int) -> Calibration:
    """The batches that `train` measures importance on, for this seed."""
    data = DataConfig(path=str(bench.text), length=bench.length, batch_size=bench.batch_size, seed=seed)
    return calibrate(model.config, model.params, model.tokenizer, data, batches=CALIBRATION_BATCHES)


def held_out_numbers(bench: Bench, model: Model, plan: Any) -> dict[str, float]:
    """Cross-entropy, KL and agreement of the teacher cut to a plan."""
    shape, params = prune_model(model.config, model.params, plan)
    terms: dict[str, Any] = {"cross_entropy": CrossEntropy(), "kl": ForwardKL(), "agreement": TopOneAgreement()}
    step = jax.jit(
        make_eval_step(
            lambda params, batch: apply(shape, params, batch),
            lambda params, batch: apply(model.config, params, batch),
            terms,
            chunk=default_chunk(model.config.vocab),
            layout=Layout(),
        )
    )
    sums: dict[str, Any] = {}
    for rows in held_out_rows(bench, model):
        found = jax.device_get(step(params, model.params, as_batch(rows, vocab=model.config.vocab)))
        sums = {name: mean + sums[name] if name in sums else mean for name, mean in found.items()}
    names = {"cross_entropy": "cross_entropy_nats", "kl": "kl_nats", "agreement": "agreement"}
    return {names[name]: float(mean.value) for name, mean in sums.items()}


def held_out_rows(bench: Bench, model: Model) -> list[dict[str, np.ndarray]]:
    return eval_batches(
        source_at(str(bench.held_out)),
        model.tokenizer,
        length=bench.length,
        batch_size=bench.batch_size,
        max_windows=bench.windows,
    )


# SmolLM2-135M.

SMOLLM2_TARGETS = {"50": Target(layers=16, mlp=896), "75": Target(layers=24, mlp=1232)}
"""67.3M and 100.7M of 134.5M parameters: depth and mlp width together."""
STEPS_60K = 59
"""Of 4 x 256 tokens: 60,416."""


def smollm2(out: Path, results: Path, share: str) -> None:
    """Students with this share, in percent, of the teacher's parameters."""
    bench = Bench(
        name=f"smollm2-{share}",
        out=out,
        results=results,
        teacher=asset("smollm2"),
        text=asset("boolq-passages"),
        held_out=six_domains(out / "heldout.jsonl"),
        length=256,
        batch_size=4,
        windows=32,
    )
    target = SMOLLM2_TARGETS[share]
    before_training(bench, {f"{share} % of the parameters": target})
    # From scratch one seed: a run takes as long as six others, and ends nats away from them.
    compare(
        bench,
        target,
        STEPS_60K,
        shape=target.resize(open_config(bench.teacher)),
        rates=(5e-4, 1e-3),
        scratch_rates=(1e-3, 3e-3),
        scratch=(4,),
        scratch_seeds=(0,),
        # Rows of rare tokens would drift in a short run, and the gradient of the table is a tenth of a step.
        trainable=("segments.*", "final_norm.*"),
    )


def six_domains(file: Path) -> Path:
    """1,400 bytes of each of the six held-out domains in turn, so that 32 windows see all of them."""
    return write_texts(file, in_turn(domains_of_held_out_text(document_bytes=1_500, domain_bytes=6_000)))


# The toy: a byte-level model on the standard library's own source.

TOY_MODEL = ModelConfig(
    family="llama",
    vocab=ByteTokenizer().vocab_size,
    embed=96,
    layers=(LayerSpec(mixer=Attention(heads=4, kv_heads=2, head_dim=24), ffn=GatedMLP(mlp=256)),) * 4,
    tied=True,
)
TOY_AXES = {
    "embed": Target(embed=64),
    "mlp": Target(mlp=128),
    "heads": Target(heads=2),
    "kv_heads": Target(kv_heads=1),
    "layers": Target(layers=3),
    "embed and mlp": Target(embed=64, mlp=128),
}
TOY_STEPS = 150
TOY_SHAPES = {"width": Target(mlp=80), "depth": Target(layers=2)}
"""Equal in parameters: 80 of 256 neurons in 4 layers, or 2 whole layers."""


def toy(out: Path, results: Path) -> None:
    text, held_out = source_code(out)
    benches = []
    for teacher_seed in SEEDS:
        bench = Bench(
            name=f"toy-teacher-{teacher_seed}",
            out=out,
            results=results,
            teacher=out / f"toy-teacher-{teacher_seed}" / "student",
            text=text,
            held_out=held_out,
            length=96,
            batch_size=16,
            windows=256,
            prepare=functools.partial(train_toy_teacher, seed=teacher_seed),
        )
        benches.append(bench)
        before_training(bench, TOY_AXES)
    bench = dataclasses.replace(benches[0], name="toy")
    rates = (1e-3, 3e-3, 1e-2)
    target = TOY_AXES["embed and mlp"]
    shape = target.resize(TOY_MODEL)
    compare(bench, target, TOY_STEPS, shape=shape, rates=rates, scratch_rates=rates, scratch=(1, 4, 8))
    for name, target in TOY_SHAPES.items():
        options: dict[str, Any] = {"target": target, "steps": TOY_STEPS, "rates": rates}
        pruned(bench, f"{name}, KL", lambda seed: Activations(), {"kl": ForwardKL()}, **options)


def source_code(out: Path) -> tuple[Path, Path]:
    """Six megabytes of the standard library's modules; every twentieth is held out."""
    train_file, held_out_file = out / "python.jsonl", out / "python-heldout.jsonl"
    if not held_out_file.exists():
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        texts = [file.read_text(encoding="utf-8", errors="ignore") for file in files]
        for file, chosen in (
            (train_file, [t for i, t in enumerate(texts) if i % 20]),
            (held_out_file, [t[:4000] for i, t in enumerate(texts) if i % 20 == 0]),
        ):
            write_texts(file, [text for text in chosen if text])
    return train_file, held_out_file


def train_toy_teacher(bench: Bench, *, seed: int) -> None:
    if not bench.teacher.exists():
        finish(
            dataclasses.replace(
                bench.config("", seed=seed, rate=3e-3, steps=1500),
                out=str(bench.teacher.parent),
                teacher=TeacherConfig(),
                student=StudentConfig(model=TOY_MODEL, tokenizer="bytes"),
                losses={"cross_entropy": CrossEntropy()},
                export="jaxdistill",
            )
        )


# What both do.


def before_training(bench: Bench, targets: Mapping[str, Target]) -> None:
    """Every way to choose, on each target, without training."""

    @functools.cache
    def model() -> Model:
        return open_model(bench.teacher)

    @functools.cache
    def scores(way: str, seed: int) -> Importance:
        if way == "worst":
            return worst_first(scores("importance", seed))
        scorers = {"importance": Activations(), "mask gradients": MaskGradients(), "weights": WeightMagnitude()}
        return scorers.get(way, RandomScores(seed=seed))(calibration(bench, model(), seed))

    for name, target in targets.items():
        for way in BEFORE:
            for seed in SEEDS if way in ("importance", "random") else SEEDS[:1]:

                def make(way=way, seed=seed, target=target) -> Row:
                    chosen = even_importance(model().config, target) if way == "even" else scores(way, seed)
                    start = held_out_numbers(bench, model(), choose(model().config, chosen, target))
                    return {"tokens": 0, "start": start, "end": start}

                bench.result(f"before: {name}: {way}", make, seed=seed)


def compare(
    bench: Bench,
    target: Target,
    steps: int,
    *,
    shape: ModelConfig,
    rates: Sequence[float],
    scratch_rates: Sequence[float],
    scratch: Sequence[int],
    scratch_seeds: Sequence[int] = SEEDS,
    trainable: tuple[str, ...] = ("*",),
) -> None:
    """Importance against random, distillation against cross-entropy, and both against a student from scratch.

    shape: of that student, which is as large as the teacher cut to the target."""
    kl, text = {"kl": ForwardKL()}, {"cross_entropy": CrossEntropy()}
    options: dict[str, Any] = {"target": target, "steps": steps, "rates": rates, "trainable": trainable}
    pruned(bench, "importance, KL", lambda seed: Activations(), kl, **options)
    pruned(bench, "random, KL", lambda seed: RandomScores(seed=seed), kl, **options)
    pruned(bench, "importance, cross-entropy", lambda seed: Activations(), text, **options)
    for times in scratch:
        bench.tuned(
            f"from scratch, cross-entropy, {times}x",
            scratch_rates,
            times * steps,
            lambda seed: {"student": StudentConfig(model=shape), "losses": text},
            seeds=scratch_seeds,
        )


def pruned(
    bench: Bench,
    way: str,
    scorer: Callable[[int], Scorer],
    losses: Mapping[str, Term],
    *,
    target: Target,
    steps: int,
    rates: Sequence[float],
    trainable: tuple[str, ...] = ("*",),
) -> None:
    """Students cut to the target by this scorer, which learn `trainable` of them. From scratch all of it learns."""

    def changes(seed: int) -> dict[str, Any]:
        student = StudentConfig(
            prune=target, scorer=scorer(seed), calibration_batches=CALIBRATION_BATCHES, trainable=trainable
        )
        return {"student": student, "losses": dict(losses)}

    bench.tuned(way, rates, steps, changes)


# Tables and pictures.


def benches_of(part: str) -> list[str]:
    return ["toy", *(f"toy-teacher-{seed}" for seed in SEEDS)] if part == "toy" else [part]


def table(results: Path, part: Part) -> str:
    """Markdown: KL by target and way before training; after it a line for each way. Means, and standard deviations."""
    found = rows_of(results, benches_of(part), tuned_by="cross_entropy_nats")
    before = before_rows(found)
    lines = [f"| KL before training | {' | '.join(before)} |", f"|---|{'---|' * len(before)}"]
    for way in BEFORE:
        cells = [spread([row["start"]["kl_nats"] for row in ways[way]]) for ways in before.values() if way in ways]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    lines += [
        "",
        "| | seeds | rate | tokens | KL before | KL after | cross-entropy after |",
        "|---|---|---|---|---|---|---|",
    ]
    for (_, way), rows in found.items():
        if not way.startswith("before"):
            numbers = [
                spread([row[when][key] for row in rows])
                for when, key in (("start", "kl_nats"), ("end", "kl_nats"), ("end", "cross_entropy_nats"))
            ]
            settings = [str(len(rows)), f"{rows[0]['rate']:g}", f"{rows[0]['tokens']:,}"]
            lines.append(f"| {' | '.join([way, *settings, *numbers])} |")
    return "\n".join(lines)


def draw(results: Path, pictures: Path) -> None:
    """Pictures of all results that there are."""
    plt = plotting()
    pictures.mkdir(parents=True, exist_ok=True)
    for name, parts, number, vocab in (
        ("smollm2", ("smollm2-75", "smollm2-50"), "kl_nats", 49152),
        ("toy", ("toy",), "cross_entropy_nats", TOY_MODEL.vocab),
    ):
        benches = [bench for part in parts for bench in benches_of(part)]
        found = rows_of(results, benches, tuned_by="cross_entropy_nats")
        before = before_rows(found)
        if before:
            figure, axes = plt.subplots(figsize=(7.2, 3.2), layout="constrained")
            draw_before(axes, before, math.log(vocab))
            figure.savefig(pictures / f"minitron-{name}-before.png", dpi=130)
        for part in parts:
            after = {way: rows for (bench, way), rows in found.items() if bench == part and "before" not in way}
            if after:
                figure, axes = plt.subplots(figsize=(7.2, 0.8 + 0.36 * len(after)), layout="constrained")
                draw_ways(axes, after, number, LABELS[number])
                figure.savefig(pictures / f"minitron-{part}-after.png", dpi=130)


def before_rows(found: Mapping[tuple[str, str], list[Row]]) -> dict[str, dict[str, list[Row]]]:
    """Rows without training by target and way, those of several teachers together."""
    before: dict[str, dict[str, list[Row]]] = {}
    for (_, name), rows in found.items():
        if name.startswith("before: "):
            _, target, way = name.split(": ")
            before.setdefault(target, {}).setdefault(way, []).extend(rows)
    return before


def draw_before(axes: Any, before: dict[str, dict[str, list[Row]]], uniform: float) -> None:
    """Bars by target and way, a dot for every row, and what a uniform guess would have."""
    width = 0.8 / len(BEFORE)
    for at, way in enumerate(BEFORE):
        for group, target in enumerate(before):
            values = [row["start"]["cross_entropy_nats"] for row in before[target].get(way, [])]
            x, label = group + (at - (len(BEFORE) - 1) / 2) * width, way if group == 0 else None
            axes.bar(x, statistics.fmean(values) if values else 0, width * 0.9, color=f"C{at}", label=label, alpha=0.75)
            axes.plot([x] * len(values), values, ".", color="black", markersize=3)
    axes.axhline(uniform, color="gray", linewidth=0.8, linestyle="--")
    axes.set_xlim(-0.75, len(before) - 0.5)
    axes.text(-0.73, uniform, "uniform guess", ha="left", va="bottom", color="gray")
    axes.set_ylim(0, 1.22 * axes.dataLim.ymax)  # room for the legend
    axes.set_xticks(range(len(before)), list(before))
    axes.set_ylabel("cross-entropy, nats per token")
    axes.set_title("After pruning, before training", loc="left")
    axes.legend(ncols=len(BEFORE), frameon=False, loc="upper center", fontsize=8)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
