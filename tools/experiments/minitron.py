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
import json
import math
import shutil
import statistics
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

from jaxdistill.assets import asset
from jaxdistill.checkpoint.open import Model, open_model
from jaxdistill.data import DataConfig, eval_batches, source_at
from jaxdistill.evaluate.text import excerpts
from jaxdistill.formats.paths import write_text
from jaxdistill.losses.chunked import default_chunk
from jaxdistill.losses.terms import CrossEntropy, ForwardKL, Term, TopOneAgreement
from jaxdistill.models.decoder import apply
from jaxdistill.optimizer import AdamW, WarmupCosine
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
    CheckpointConfig,
    HeldOutConfig,
    LogConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from jaxdistill.train.loop import train
from jaxdistill.types import as_batch

SEEDS = (0, 1, 2)
CALIBRATION_BATCHES = 16
BEFORE = ("importance", "mask gradients", "even", "weights", "random", "worst")
"""Ways to choose what is kept."""
Part = Literal["toy", "smollm2-50", "smollm2-75"]
Row = dict[str, Any]
"""What a run found: its bench, way, seed and rate; tokens; held-out numbers at its start and end; its curve."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Which experiments to run, and where."""

    parts: tyro.conf.Positional[tuple[Part, ...]]
    out: Path = Path("runs/experiments/minitron")
    results: Path | None = None
    """The file of results; OUT/results.jsonl if not given."""
    draw: Path | None = None
    """Draw what there is into this directory, too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """One teacher, its text, and where results go."""

    name: str
    out: Path
    results: Path
    teacher: Path
    text: Path
    held_out: Path
    length: int
    batch_size: int
    windows: int
    trainable: tuple[str, ...] = ("*",)
    """Of students that begin with the teacher's weights."""

    def result(self, way: str, make: Callable[[], Row], *, seed: int, rate: float | None = None) -> Row:
        """The row of this way, seed and rate: from the file of results, or made and added to it."""
        key = {"bench": self.name, "way": way, "seed": seed, "rate": rate}
        for row in read_rows(self.results):
            if key.items() <= row.items():
                return row
        began = time.perf_counter()
        print(f"--- {self.name}: {way}, seed {seed}{f', rate {rate:g}' if rate else ''}", flush=True)
        row = {**key, **make(), "seconds": round(time.perf_counter() - began, 1)}
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with self.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def config(self, name: str, *, seed: int, rate: float, steps: int, **changes: Any) -> TrainConfig:
        given: dict[str, Any] = {
            "out": str(self.out / "runs" / f"{self.name}-{name}"),
            "teacher": TeacherConfig(path=str(self.teacher)),
            "data": DataConfig(path=str(self.text), length=self.length, batch_size=self.batch_size, seed=seed),
            "optimizer": AdamW(learning_rate=WarmupCosine(peak=rate, warmup=0.1), weight_decay=0.0),
            "steps": steps,
            "held_out": HeldOutConfig(path=str(self.held_out), every=1 << 20, windows=self.windows),
            "checkpoints": CheckpointConfig(every=max(60, steps // 4)),
            "log": LogConfig(every=20, tensorboard=False),
            "export": "none",
            "seed": seed,
        }
        return TrainConfig(**{**given, **changes})

    def trained(self, way: str, *, seed: int, rate: float, steps: int, **changes: Any) -> Row:
        """A run of `train`: held-out numbers before the first and after the last step, and the loss on the way."""
        config = self.config(f"{way}-{seed}-{rate:g}", seed=seed, rate=rate, steps=steps, **changes)

        def make() -> Row:
            if train(config).step < steps:
                raise SystemExit("stopped; the same command goes on")
            lines = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
            held_out = {line["step"]: line["held_out"] for line in lines if "held_out" in line}
            curve = [(line["step"], round(line["loss"], 4)) for line in lines if line.get("loss") is not None]
            shutil.rmtree(config.out)  # its checkpoints are gigabytes; what is wanted is in the row
            tokens = steps * self.length * self.batch_size
            return {"tokens": tokens, "start": held_out[0], "end": held_out[steps], "curve": curve}

        return self.result(way, make, seed=seed, rate=rate)

    def tuned(
        self,
        way: str,
        rates: Sequence[float],
        steps: int,
        changes: Callable[[int], dict],
        *,
        seeds: Sequence[int] = SEEDS,
    ) -> None:
        """A run for each seed, with the learning rate that was best on the first one."""
        first = [self.trained(way, seed=seeds[0], rate=rate, steps=steps, **changes(seeds[0])) for rate in rates]
        best = min(first, key=lambda row: row["end"]["cross_entropy_nats"])["rate"]
        for seed in seeds[1:]:
            self.trained(way, seed=seed, rate=best, steps=steps, **changes(seed))

    def calibration(self, model: Model, seed: int) -> Calibration:
        """The batches that `train` measures importance on, for this seed."""
        data = DataConfig(path=str(self.text), length=self.length, batch_size=self.batch_size, seed=seed)
        return calibrate(model.config, model.params, model.tokenizer, data, batches=CALIBRATION_BATCHES)

    def held_out_numbers(self, model: Model, plan: Any) -> dict[str, float]:
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
        for rows in self.held_out_rows(model):
            found = jax.device_get(step(params, model.params, as_batch(rows, vocab=model.config.vocab)))
            sums = {name: mean + sums[name] if name in sums else mean for name, mean in found.items()}
        names = {"cross_entropy": "cross_entropy_nats", "kl": "kl_nats", "agreement": "agreement"}
        return {names[name]: float(mean.value) for name, mean in sums.items()}

    def held_out_rows(self, model: Model) -> list[dict[str, np.ndarray]]:
        return eval_batches(
            source_at(str(self.held_out)),
            model.tokenizer,
            length=self.length,
            batch_size=self.batch_size,
            max_windows=self.windows,
        )


def main(options: Options) -> None:
    results = options.results or options.out / "results.jsonl"
    for part in options.parts:
        if part == "toy":
            toy(options.out, results)
        else:
            smollm2(options.out, results, part.removeprefix("smollm2-"))
        print(f"\n{table(results, part)}\n")
    if options.draw is not None:
        draw(results, options.draw)


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
        # Rows of rare tokens would drift in a short run, and the gradient of the table is a tenth of a step.
        trainable=("segments.*", "final_norm.*"),
    )
    target = SMOLLM2_TARGETS[share]
    before_training(bench, {f"{share} % of the parameters": target})
    # From scratch one seed: a run takes as long as six others, and ends nats away from them.
    compare(bench, target, STEPS_60K, rates=(5e-4, 1e-3), scratch_rates=(1e-3, 3e-3), scratch=(4,), scratch_seeds=(0,))


def six_domains(file: Path) -> Path:
    """1,400 bytes of each of the six held-out domains in turn, so that 32 windows see all of them."""
    domains: dict[str, list[str]] = {}
    for line in asset("heldout").read_text().splitlines():
        record = json.loads(line)
        domains.setdefault(record["type"], []).append(record["text"])
    chosen = [excerpts(texts, total_bytes=6_000, document_bytes=1_500) for texts in domains.values()]
    turns = [texts[i] for i in range(max(map(len, chosen))) for texts in chosen if i < len(texts)]
    write_text(file, "".join(json.dumps({"text": text}) + "\n" for text in turns))
    return file


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
        )
        train_toy_teacher(bench, teacher_seed)
        before_training(bench, TOY_AXES)
    bench = dataclasses.replace(bench, name="toy", teacher=out / "toy-teacher-0" / "student")
    rates = (1e-3, 3e-3, 1e-2)
    target = TOY_AXES["embed and mlp"]
    compare(bench, target, TOY_STEPS, rates=rates, scratch_rates=rates, scratch=(1, 4, 8))
    for shape, target in TOY_SHAPES.items():
        pruned(bench, f"{shape}, KL", target, TOY_STEPS, rates, lambda seed: Activations(), {"kl": ForwardKL()})


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
            write_text(file, "".join(json.dumps({"text": text}) + "\n" for text in chosen if text))
    return train_file, held_out_file


def train_toy_teacher(bench: Bench, seed: int) -> None:
    if not bench.teacher.exists():
        train(
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
        return scorers.get(way, RandomScores(seed=seed))(bench.calibration(model(), seed))

    for name, target in targets.items():
        for way in BEFORE:
            for seed in SEEDS if way in ("importance", "random") else SEEDS[:1]:

                def make(way=way, seed=seed, target=target) -> Row:
                    chosen = even_importance(model().config, target) if way == "even" else scores(way, seed)
                    start = bench.held_out_numbers(model(), choose(model().config, chosen, target))
                    return {"tokens": 0, "start": start, "end": start}

                bench.result(f"before: {name}: {way}", make, seed=seed)


def compare(
    bench: Bench,
    target: Target,
    steps: int,
    *,
    rates: Sequence[float],
    scratch_rates: Sequence[float],
    scratch: Sequence[int],
    scratch_seeds: Sequence[int] = SEEDS,
) -> None:
    """Importance against random, distillation against cross-entropy, and both against a student from scratch."""
    kl, text = {"kl": ForwardKL()}, {"cross_entropy": CrossEntropy()}
    pruned(bench, "importance, KL", target, steps, rates, lambda seed: Activations(), kl)
    pruned(bench, "random, KL", target, steps, rates, lambda seed: RandomScores(seed=seed), kl)
    pruned(bench, "importance, cross-entropy", target, steps, rates, lambda seed: Activations(), text)
    shape = target.resize(open_model(bench.teacher).config)
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
    target: Target,
    steps: int,
    rates: Sequence[float],
    scorer: Callable[[int], Scorer],
    losses: Mapping[str, Term],
) -> None:
    def changes(seed: int) -> dict[str, Any]:
        student = StudentConfig(
            prune=target, scorer=scorer(seed), calibration_batches=CALIBRATION_BATCHES, trainable=bench.trainable
        )
        return {"student": student, "losses": dict(losses)}

    bench.tuned(way, rates, steps, changes)


# Tables and pictures.


def read_rows(results: Path) -> list[Row]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def rows_of(results: Path, benches: Sequence[str]) -> dict[tuple[str, str], list[Row]]:
    """Rows by bench and way, one for each seed: those of the learning rate that is best on the first seed."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in read_rows(results):
        if row["bench"] in benches:
            groups.setdefault((row["bench"], row["way"]), []).append(row)

    def chosen(rows: list[Row]) -> list[Row]:
        tuned = [row for row in rows if row["seed"] == SEEDS[0]]
        best = min(tuned, key=lambda row: row["end"]["cross_entropy_nats"])["rate"]
        return sorted((row for row in rows if row["rate"] == best), key=lambda row: row["seed"])

    return {name: chosen(rows) for name, rows in groups.items()}


def benches_of(part: str) -> list[str]:
    return ["toy", *(f"toy-teacher-{seed}" for seed in SEEDS)] if part == "toy" else [part]


def spread(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


def table(results: Path, part: Part) -> str:
    """Markdown: KL by target and way before training; after it a line for each way. Means, and standard deviations."""
    found = rows_of(results, benches_of(part))
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
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt  # pyright: ignore[reportMissingImports]

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    pictures.mkdir(parents=True, exist_ok=True)
    for name, parts, number, vocab in (
        ("smollm2", ("smollm2-75", "smollm2-50"), "kl_nats", 49152),
        ("toy", ("toy",), "cross_entropy_nats", TOY_MODEL.vocab),
    ):
        found = rows_of(results, [bench for part in parts for bench in benches_of(part)])
        before = before_rows(found)
        if before:
            figure, axes = plt.subplots(figsize=(7.2, 3.2), layout="constrained")
            draw_before(axes, before, math.log(vocab))
            figure.savefig(pictures / f"minitron-{name}-before.png", dpi=130)
        for part in parts:
            after = {way: rows for (bench, way), rows in found.items() if bench == part and "before" not in way}
            if after:
                figure, axes = plt.subplots(figsize=(7.2, 0.8 + 0.36 * len(after)), layout="constrained")
                draw_after(axes, after, number)
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


def draw_after(axes: Any, after: dict[str, list[Row]], number: str) -> None:
    """A line for each way: where its seeds began (open) and ended (full)."""
    for at, rows in enumerate(after.values()):
        for row in rows:
            axes.plot([row["start"][number], row["end"][number]], [at, at], color="lightgray", linewidth=1, zorder=1)
            axes.plot(row["start"][number], at, "o", markerfacecolor="white", markeredgecolor=f"C{at % 10}")
            axes.plot(row["end"][number], at, "o", color=f"C{at % 10}")
        mean = statistics.fmean(row["end"][number] for row in rows)
        axes.annotate(f"{mean:.3f}", (mean, at), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
    axes.set_yticks(range(len(after)), [f"{name} ({rows[0]['tokens']:,} tokens)" for name, rows in after.items()])
    axes.set_xlabel("KL to the teacher, nats per token" if number == "kl_nats" else "cross-entropy, nats per byte")
    axes.set_title("Open: before training. Full: after", loc="left")
    axes.invert_yaxis()
    axes.margins(y=0.08)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
