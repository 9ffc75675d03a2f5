"""What the experiments share: runs that are made once and kept as rows of a file, tuned alike, told and drawn alike."""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdistill.assets import asset
from jaxdistill.data import DataConfig
from jaxdistill.evaluate.text import excerpts
from jaxdistill.formats.paths import write_text
from jaxdistill.optimizer import AdamW, WarmupCosine
from jaxdistill.train.config import CheckpointConfig, HeldOutConfig, LogConfig, TeacherConfig, TrainConfig
from jaxdistill.train.loop import train

SEEDS = (0, 1, 2)
Row = dict[str, Any]
"""What a run found: its bench, way, seed and rate; tokens; numbers at its start and end; its curve."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """One teacher, its text, and where results go."""

    name: str
    out: Path
    results: Path
    teacher: Path
    text: Path
    length: int
    batch_size: int
    held_out: Path | None = None
    windows: int = 32
    """Rows of held-out text on which `train` measures before the first and after the last step."""
    tuned_by: str = "cross_entropy_nats"
    """The number at a run's end that learning rates are chosen by."""

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
            "held_out": HeldOutConfig(
                path=None if self.held_out is None else str(self.held_out), every=1 << 20, windows=self.windows
            ),
            "checkpoints": CheckpointConfig(every=max(60, steps // 4)),
            "log": LogConfig(every=20, tensorboard=False),
            "export": "none",
            "seed": seed,
        }
        return TrainConfig(**{**given, **changes})

    def trained(
        self,
        way: str,
        *,
        seed: int,
        rate: float,
        steps: int,
        measure: Callable[[Path], dict[str, float]] | None = None,
        **changes: Any,
    ) -> Row:
        """A run of `train`: held-out numbers before the first and after the last step, and the loss on the way.

        measure: what else is found of the student that was written.
        """
        changes |= {} if measure is None else {"export": "jaxdistill"}
        config = self.config(f"{way}-{seed}-{rate:g}", seed=seed, rate=rate, steps=steps, **changes)

        def make() -> Row:
            if train(config).step < steps:
                raise SystemExit("stopped; the same command goes on")
            run = Path(config.out)
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            held_out = {line["step"]: line["held_out"] for line in lines if "held_out" in line}
            curve = [(line["step"], round(line["loss"], 4)) for line in lines if line.get("loss") is not None]
            end = {**held_out.get(steps, {}), **({} if measure is None else measure(run / "student"))}
            shutil.rmtree(run)  # its checkpoints are gigabytes; what is wanted is in the row
            tokens = steps * config.data.length * config.data.batch_size
            return {"tokens": tokens, "start": held_out.get(0, {}), "end": end, "curve": curve}

        return self.result(way, make, seed=seed, rate=rate)

    def tuned(
        self,
        way: str,
        rates: Sequence[float],
        steps: int,
        changes: Callable[[int], dict],
        *,
        seeds: Sequence[int] = SEEDS,
        measure: Callable[[Path], dict[str, float]] | None = None,
    ) -> None:
        """A run for each seed, with the learning rate that was best on the first one."""
        runs = [
            self.trained(way, seed=seeds[0], rate=r, steps=steps, measure=measure, **changes(seeds[0])) for r in rates
        ]
        best = best_rate(runs, self.tuned_by)
        for seed in seeds[1:]:
            self.trained(way, seed=seed, rate=best, steps=steps, measure=measure, **changes(seed))


def best_rate(rows: Sequence[Row], number: str) -> Any:
    """The learning rate of the row with the least of this number at its end."""
    return min(rows, key=lambda row: row["end"][number])["rate"]


def read_rows(results: Path) -> list[Row]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def rows_of(results: Path, benches: Sequence[str], *, tuned_by: str) -> dict[tuple[str, str], list[Row]]:
    """Rows by bench and way, one for each seed: those of the learning rate that is best on the first seed."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in read_rows(results):
        if row["bench"] in benches:
            groups.setdefault((row["bench"], row["way"]), []).append(row)

    def chosen(rows: list[Row]) -> list[Row]:
        best = best_rate([row for row in rows if row["seed"] == SEEDS[0]], tuned_by)
        return sorted((row for row in rows if row["rate"] == best), key=lambda row: row["seed"])

    return {name: chosen(rows) for name, rows in groups.items()}


def spread(values: Sequence[float]) -> str:
    """The mean, and the standard deviation where there are several."""
    mean = statistics.fmean(values)
    return f"{mean:.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


def domains_of_held_out_text(*, document_bytes: int, domain_bytes: int) -> dict[str, list[str]]:
    """The beginnings of the first documents of each of the six held-out domains."""
    domains: dict[str, list[str]] = {}
    for line in asset("heldout").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        domains.setdefault(record["type"], []).append(record["text"])
    return {
        name: excerpts(texts, total_bytes=domain_bytes, document_bytes=document_bytes)
        for name, texts in domains.items()
    }


def read_texts(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


def write_texts(file: Path, texts: Sequence[str]) -> Path:
    write_text(file, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def draw_ways(axes: Any, ways: Mapping[str, Sequence[Row]], number: str, label: str) -> None:
    """A line for each way: where its seeds began (open) and ended (full)."""
    for at, rows in enumerate(ways.values()):
        for row in rows:
            start, end = row["start"].get(number, row["end"][number]), row["end"][number]
            axes.plot([start, end], [at, at], color="lightgray", linewidth=1, zorder=1)
            axes.plot(start, at, "o", markerfacecolor="white", markeredgecolor=f"C{at % 10}")
            axes.plot(end, at, "o", color=f"C{at % 10}")
        mean = statistics.fmean(row["end"][number] for row in rows)
        axes.annotate(f"{mean:.3f}", (mean, at), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
    axes.set_yticks(range(len(ways)), [f"{name} ({rows[0]['tokens']:,} tokens)" for name, rows in ways.items()])
    axes.set_xlabel(label)
    axes.set_title("Open: before training. Full: after", loc="left")
    axes.invert_yaxis()
    axes.margins(y=0.08)


def plotting() -> Any:
    """pyplot, set up to write files."""
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt  # pyright: ignore[reportMissingImports]

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt
