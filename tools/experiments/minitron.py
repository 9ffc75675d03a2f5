"""Does importance matter, and is pruning with distillation worth it? The experiments behind docs/papers.md, Minitron.

    python tools/experiments/minitron.py toy          # a byte-level model on Python source, about half an hour
    python tools/experiments/minitron.py smollm2      # SmolLM2-135M at 75 % and 50 %, about four hours on two cores
    python tools/experiments/minitron.py toy smollm2 --draw docs/pictures

Every run leaves a file in OUT/results; the same command goes on where it was interrupted, inside a run too. Learning
rates are tuned alike for all methods: each is tried with the same number of them on seed 0, on the same held-out text,
and the best is used for the other seeds. A line of the final tables is a mean over seeds and their standard deviation.
"""

from __future__ import annotations

import dataclasses
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
from jaxdistill.losses.terms import CrossEntropy, ForwardKL, Term
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
from jaxdistill.train.setup import held_out_terms
from jaxdistill.types import as_batch

SEEDS = (0, 1, 2)
CALIBRATION_BATCHES = 16
Row = dict[str, Any]
"""What a run found: its name, its settings, held-out numbers at its start and end, seconds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Which experiments to run, and where."""

    parts: tyro.conf.Positional[tuple[Literal["toy", "smollm2"], ...]]
    out: Path = Path("runs/experiments/minitron")
    draw: Path | None = None
    """Draw what there is into this directory, too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """One teacher, its text, and where results go."""

    name: str
    out: Path
    teacher: Path
    text: Path
    held_out: Path
    length: int
    batch_size: int
    windows: int
    trainable: tuple[str, ...] = ("*",)
    """Of students that begin with the teacher's weights."""

    def result(self, name: str, make: Callable[[], Row]) -> Row:
        """The row of this name: from its file, or made and written."""
        file = self.out / "results" / f"{self.name}-{name}.json"
        if file.exists():
            return json.loads(file.read_text())
        began = time.perf_counter()
        print(f"--- {self.name}: {name}", flush=True)
        row = {"name": name, **make(), "seconds": round(time.perf_counter() - began, 1)}
        write_text(file, json.dumps(row, indent=1) + "\n")
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

    def trained(self, name: str, *, seed: int, rate: float, steps: int, **changes: Any) -> Row:
        """A run of `train`: held-out numbers before the first and after the last step."""
        config = self.config(name, seed=seed, rate=rate, steps=steps, **changes)

        def make() -> Row:
            train(config)
            lines = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
            held_out = {line["step"]: line["held_out"] for line in lines if "held_out" in line}
            row = {"seed": seed, "rate": rate, "tokens": steps * self.length * self.batch_size}
            row |= {"start": held_out[0], "end": held_out[steps]}
            shutil.rmtree(config.out)  # its checkpoints are gigabytes; what is wanted is in the row
            return row

        return self.result(name, make)

    def tuned(
        self,
        name: str,
        rates: Sequence[float],
        steps: int,
        changes: Callable[[int], dict],
        *,
        seeds: Sequence[int] = SEEDS,
    ) -> list[Row]:
        """A row for each seed, with the learning rate that was best on the first one."""
        first = [
            self.trained(f"{name}-{seeds[0]}-{rate:g}", seed=seeds[0], rate=rate, steps=steps, **changes(seeds[0]))
            for rate in rates
        ]
        best = min(first, key=lambda row: row["end"]["cross_entropy_nats"])
        rest = [
            self.trained(f"{name}-{seed}-{best['rate']:g}", seed=seed, rate=best["rate"], steps=steps, **changes(seed))
            for seed in seeds[1:]
        ]
        return [best, *rest]

    def calibration(self, model: Model, seed: int) -> Calibration:
        """The batches that `train` measures importance on, for this seed."""
        data = DataConfig(path=str(self.text), length=self.length, batch_size=self.batch_size, seed=seed)
        return calibrate(model.config, model.params, model.tokenizer, data, batches=CALIBRATION_BATCHES)

    def held_out_numbers(self, model: Model, plan: Any) -> dict[str, float]:
        """Cross-entropy, KL and agreement of the teacher cut to a plan."""
        shape, params = prune_model(model.config, model.params, plan)
        terms = held_out_terms(True)
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
    for part in options.parts:
        {"toy": toy, "smollm2": smollm2}[part](options.out)
        print(f"\n{table(options.out, part)}\n")
    if options.draw is not None:
        draw(options.out, options.draw)


# SmolLM2-135M.

SMOLLM2_TARGETS = {"50": Target(layers=16, mlp=896), "75": Target(layers=24, mlp=1232)}
"""67.3M and 100.7M of 134.5M parameters: depth and mlp width together."""
STEPS_60K = 59
"""Of 4 x 256 tokens: 60,416."""


def smollm2(out: Path) -> None:
    bench = Bench(
        name="smollm2",
        out=out,
        teacher=asset("smollm2"),
        text=asset("boolq-passages"),
        held_out=six_domains(out / "heldout.jsonl"),
        length=256,
        batch_size=4,
        windows=32,
        # Rows of rare tokens would drift in a short run, and the gradient of the table is a tenth of a step.
        trainable=("segments.*", "final_norm.*"),
    )
    before_training(bench, SMOLLM2_TARGETS)
    for ratio, target in SMOLLM2_TARGETS.items():
        rates, scratch_rates = (5e-4, 1e-3), (1e-3, 3e-3)
        # From scratch one seed: a run takes as long as six others, and ends nats away from them.
        compare(
            bench, ratio, target, STEPS_60K, rates=rates, scratch_rates=scratch_rates, scratch=(4,), scratch_seeds=(0,)
        )


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


def toy(out: Path) -> None:
    text, held_out = source_code(out)
    for teacher_seed in SEEDS:
        bench = Bench(
            name=f"toy{teacher_seed}",
            out=out,
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
    rates, scratch_rates = (1e-3, 3e-3), (1e-3, 3e-3)
    compare(
        bench, "44", TOY_AXES["embed and mlp"], TOY_STEPS, rates=rates, scratch_rates=scratch_rates, scratch=(1, 4, 8)
    )
    for shape, target in TOY_SHAPES.items():
        pruned(bench, f"{shape}-kl", target, TOY_STEPS, rates, lambda seed: Activations(), {"kl": ForwardKL()})


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


def before_training(bench: Bench, targets: Mapping[str, Target]) -> list[Row]:
    """Every way to choose, on each target, without training."""
    rows, opened = [], {}

    def model() -> Model:
        opened.setdefault("model", open_model(bench.teacher))
        return opened["model"]

    def scores(kind: str, seed: int, target: Target) -> Importance:
        given, calibration = model(), bench.calibration(model(), seed)
        ways: dict[str, Callable[[], Importance]] = {
            "importance": lambda: Activations()(calibration),
            "worst": lambda: worst_first(Activations()(calibration)),
            "mask gradients": lambda: MaskGradients()(calibration),
            "weights": lambda: WeightMagnitude()(calibration),
            "random": lambda: RandomScores(seed=seed)(calibration),
            "even": lambda: even_importance(given.config, target),
        }
        return ways[kind]()

    for axis, target in targets.items():
        for kind in ("importance", "random", "worst", "even", "mask gradients", "weights"):
            for seed in SEEDS if kind in ("importance", "random") else SEEDS[:1]:

                def make(kind=kind, seed=seed, target=target) -> Row:
                    plan = choose(model().config, scores(kind, seed, target), target)
                    start = bench.held_out_numbers(model(), plan)
                    return {"seed": seed, "tokens": 0, "start": start, "end": start}

                rows.append(bench.result(f"before-{axis}-{kind}-{seed}".replace(" ", "_"), make))
    return rows


def compare(
    bench: Bench,
    ratio: str,
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
    pruned(bench, f"{ratio}-importance-kl", target, steps, rates, lambda seed: Activations(), kl)
    pruned(bench, f"{ratio}-random-kl", target, steps, rates, lambda seed: RandomScores(seed=seed), kl)
    pruned(bench, f"{ratio}-importance-ce", target, steps, rates, lambda seed: Activations(), text)
    shape = target.resize(open_model(bench.teacher).config)
    for times in scratch:
        bench.tuned(
            f"{ratio}-scratch-ce-x{times}",
            scratch_rates,
            times * steps,
            lambda seed: {"student": StudentConfig(model=shape), "losses": text},
            seeds=scratch_seeds,
        )


def pruned(
    bench: Bench,
    name: str,
    target: Target,
    steps: int,
    rates: Sequence[float],
    scorer: Callable[[int], Scorer],
    losses: Mapping[str, Term],
) -> list[Row]:
    def changes(seed: int) -> dict[str, Any]:
        student = StudentConfig(
            prune=target, scorer=scorer(seed), calibration_batches=CALIBRATION_BATCHES, trainable=bench.trainable
        )
        return {"student": student, "losses": dict(losses)}

    return bench.tuned(name, rates, steps, changes)


# Tables and pictures.


def rows_of(out: Path, prefix: str) -> dict[str, list[Row]]:
    """Rows by what they have in common but the seed; of several learning rates the best of seed 0."""
    groups: dict[str, dict[int, list[Row]]] = {}
    for file in sorted((out / "results").glob(f"{prefix}-*.json")):
        row = json.loads(file.read_text())
        stem = row["name"].rsplit("-", 1)[0] if "rate" not in row else row["name"].split(f"-{row['seed']}-")[0]
        groups.setdefault(stem, {}).setdefault(row["seed"], []).append(row)
    return {
        name: [min(rows, key=lambda r: r["end"]["cross_entropy_nats"]) for rows in by_seed.values()]
        for name, by_seed in groups.items()
    }


def spread(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


def table(out: Path, part: str) -> str:
    """Markdown: one line for each way, means and standard deviations over seeds."""
    lines = [
        "| | seeds | rate | tokens | KL before | KL after | cross-entropy after |",
        "|---|---|---|---|---|---|---|",
    ]
    prefixes = [part] if part == "smollm2" else [part, *(f"{part}{seed}" for seed in SEEDS)]
    for prefix in prefixes:
        for name, rows in rows_of(out, prefix).items():
            numbers = [
                spread([row[when][key] for row in rows])
                for when, key in (("start", "kl_nats"), ("end", "kl_nats"), ("end", "cross_entropy_nats"))
            ]
            cells = [f"{prefix} {name}", str(len(rows)), str(rows[0].get("rate", "")), str(rows[0]["tokens"]), *numbers]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


WAYS = ("importance", "mask gradients", "even", "weights", "random", "worst")


def draw(out: Path, pictures: Path) -> None:
    """Pictures of all results that there are."""
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt  # pyright: ignore[reportMissingImports]

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    pictures.mkdir(parents=True, exist_ok=True)
    for part, number, vocab in (("smollm2", "kl_nats", 49152), ("toy", "cross_entropy_nats", TOY_MODEL.vocab)):
        before = before_rows(out, part)
        if before:
            figure, axes = plt.subplots(figsize=(7.2, 3.2), layout="constrained")
            draw_before(axes, before, math.log(vocab))
            figure.savefig(pictures / f"minitron-{part}-before.png", dpi=130)
        after = {name: rows for name, rows in rows_of(out, part).items() if not name.startswith("before")}
        if after:
            figure, axes = plt.subplots(figsize=(7.2, 0.8 + 0.36 * len(after)), layout="constrained")
            draw_after(axes, after, number)
            figure.savefig(pictures / f"minitron-{part}-after.png", dpi=130)


def before_rows(out: Path, part: str) -> dict[str, dict[str, list[Row]]]:
    """Rows without training by target and way; of the toy, those of all teachers."""
    found: dict[str, dict[str, list[Row]]] = {}
    for prefix in [part] if part == "smollm2" else [f"{part}{seed}" for seed in SEEDS]:
        for name, rows in rows_of(out, prefix).items():
            if name.startswith("before-"):
                _, target, way = name.split("-")
                found.setdefault(target.replace("_", " "), {}).setdefault(way.replace("_", " "), []).extend(rows)
    return found


def draw_before(axes: Any, before: dict[str, dict[str, list[Row]]], uniform: float) -> None:
    """Bars by target and way, a dot for every row, and what a uniform guess would have."""
    width = 0.8 / len(WAYS)
    for at, way in enumerate(WAYS):
        for group, target in enumerate(before):
            values = [row["start"]["cross_entropy_nats"] for row in before[target].get(way, [])]
            x, label = group + (at - (len(WAYS) - 1) / 2) * width, way if group == 0 else None
            axes.bar(x, statistics.fmean(values) if values else 0, width * 0.9, color=f"C{at}", label=label, alpha=0.75)
            axes.plot([x] * len(values), values, ".", color="black", markersize=3)
    axes.axhline(uniform, color="gray", linewidth=0.8, linestyle="--")
    axes.set_xlim(-0.75, len(before) - 0.5)
    axes.text(-0.73, uniform, "uniform guess", ha="left", va="bottom", color="gray")
    axes.set_ylim(0, 1.22 * axes.dataLim.ymax)  # room for the legend
    axes.set_xticks(range(len(before)), [f"{t} % of the parameters" if t.isdigit() else t for t in before])
    axes.set_ylabel("cross-entropy, nats per token")
    axes.set_title("After pruning, before training", loc="left")
    axes.legend(ncols=len(WAYS), frameon=False, loc="upper center", fontsize=8)


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
