"""What the experiments share: runs that are made once and kept as rows of a file, tuned alike, told and drawn alike."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jaxdistill.assets import asset
from jaxdistill.data import DataConfig
from jaxdistill.evaluate.text import excerpts
from jaxdistill.formats.paths import write_text
from jaxdistill.optimizer import AdamW, WarmupCosine
from jaxdistill.train.config import CheckpointConfig, HeldOutConfig, LogConfig, TeacherConfig, TrainConfig
from jaxdistill.train.loop import train

Part = TypeVar("Part", bound=str)

SEEDS = (0, 1, 2)
Row = dict[str, Any]
"""What a run found: its bench, way, seed and rate; positions of its rows; numbers at its start and end, and by step of
held-out text on the way (`along`); its loss by step (`curve`)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Places:
    """Where runs and results are; a file of experiments adds the parts that can be run."""

    out: Path
    results: Path | None = None
    """The file of results; OUT/results.jsonl if not given."""
    draw: Path | None = None
    """Draw what there is into this directory, too."""


def run_parts(
    places: Places,
    parts: Sequence[Part],
    *,
    run: Callable[[Path, Path, Part], None],
    table: Callable[[Path, Part], str],
    draw: Callable[[Path, Path], None],
) -> None:
    """Runs parts of an experiment and prints their tables. run: with the directory of runs and the file of results."""
    results = places.results or places.out / "results.jsonl"
    for part in parts:
        run(places.out, results, part)
        print(f"\n{table(results, part)}\n")
    if places.draw is not None:
        draw(results, places.draw)


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
    """Rows of held-out text on which `train` measures before the first step, and after each quarter of the steps."""
    tuned_by: str = "cross_entropy_nats"
    """The number at a run's end that learning rates are chosen by."""
    settings: str = ""
    """A fingerprint of what rows depend on besides their key; a row of other settings is not taken for this one's."""
    prepare: Callable[[Bench], None] = lambda bench: None
    """Makes what has to be there before a row is made; not called where all rows are there."""

    def result(self, way: str, make: Callable[[], Row], *, seed: int, rate: float | None = None) -> Row:
        """The row of this way, seed and rate: from the file of results, or made and added to it."""
        key = {"bench": self.name, "way": way, "seed": seed, "rate": rate}
        key |= {"settings": self.settings} if self.settings else {}
        for row in read_rows(self.results):
            if key.items() <= row.items():
                return row
        self.prepare(self)
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
                path=None if self.held_out is None else str(self.held_out),
                every=max(1, steps // 4),
                windows=self.windows,
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
        """A run of `train`: held-out numbers before the first and after the last step; them and the loss on the way.

        measure: what else is found of the student that was written. The run's directory goes when its row is safe.
        """
        changes |= {} if measure is None else {"export": "jaxdistill"}
        config = self.config(f"{way}-{seed}-{rate:g}", seed=seed, rate=rate, steps=steps, **changes)
        run = Path(config.out)

        def make() -> Row:
            finish(config)
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            held_out = {line["step"]: line["held_out"] for line in lines if "held_out" in line}
            curve = [(line["step"], round(line["loss"], 4)) for line in lines if line.get("loss") is not None]
            along = [(step, round(found["bits_per_byte"], 4)) for step, found in held_out.items()]
            start, end = ({}, {}) if self.held_out is None else (held_out[0], held_out[steps])
            end |= {} if measure is None else measure(run / "student")
            tokens = steps * config.data.length * config.data.batch_size
            return {"tokens": tokens, "start": start, "end": end, "along": along, "curve": curve}

        row = self.result(way, make, seed=seed, rate=rate)
        shutil.rmtree(run, ignore_errors=True)  # its checkpoints are gigabytes; what is wanted is in the row
        return row

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
            self.trained(way, seed=seeds[0], rate=rate, steps=steps, measure=measure, **changes(seeds[0]))
            for rate in rates
        ]
        best = best_rate(runs, self.tuned_by)
        for seed in seeds[1:]:
            self.trained(way, seed=seed, rate=best, steps=steps, measure=measure, **changes(seed))


def finish(config: TrainConfig) -> None:
    """Trains to the last step, or leaves the program where it was stopped."""
    if train(config).step < config.steps:
        raise SystemExit("stopped; the same command goes on")


def best_rate(rows: Sequence[Row], number: str) -> Any:
    """The learning rate of the row with the least of this number at its end."""
    ends = [row["end"][number] for row in rows]
    return rows[ends.index(min(end for end in ends if not math.isnan(end)))]["rate"]


def read_rows(results: Path) -> list[Row]:
    """All rows; a line that was cut off while it was written is none."""
    lines = results.read_text().splitlines() if results.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def rows_of(results: Path, benches: Sequence[str], *, tuned_by: str) -> dict[tuple[str, str], list[Row]]:
    """Rows by bench and way, one for each seed: those of the learning rate that is best on the first seed, and of the
    settings that the bench was last run with."""
    groups: dict[tuple[str, str], list[Row]] = {}
    rows = [row for row in read_rows(results) if row["bench"] in benches]
    latest = {row["bench"]: row.get("settings") for row in rows}
    for row in rows:
        if row.get("settings") == latest[row["bench"]]:
            groups.setdefault((row["bench"], row["way"]), []).append(row)

    def chosen(rows: list[Row]) -> list[Row]:
        best = best_rate([row for row in rows if row["seed"] == SEEDS[0]], tuned_by)
        return sorted((row for row in rows if row["rate"] == best), key=lambda row: row["seed"])

    return {name: chosen(rows) for name, rows in groups.items()}


def spread(values: Sequence[float]) -> str:
    """The mean, and the standard deviation where there are several."""
    mean = statistics.fmean(values)
    return f"{mean:.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


# Texts.


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


def in_turn(domains: Mapping[str, Sequence[str]]) -> list[str]:
    """One text of every domain, then the next of each, as long as there are some."""
    longest = max(map(len, domains.values()))
    return [texts[i] for i in range(longest) for texts in domains.values() if i < len(texts)]


def read_texts(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


def write_texts(file: Path, texts: Sequence[str]) -> Path:
    write_text(file, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def fingerprint(*values: Any) -> str:
    """A few characters that differ where values do."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]


# Pictures.


def plotting() -> Any:
    """pyplot, set up to write files."""
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt  # pyright: ignore[reportMissingImports]

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def draw_ways(axes: Any, ways: Mapping[str, Sequence[Row]], number: str, label: str) -> None:
    """A line for each way, the first on top: where its seeds began (open) and ended (full)."""
    for at, rows in enumerate(ways.values()):
        for row in rows:
            start, end = row["start"].get(number, row["end"][number]), row["end"][number]
            axes.plot([start, end], [-at, -at], color="lightgray", linewidth=1, zorder=1)
            axes.plot(start, -at, "o", markerfacecolor="white", markeredgecolor=f"C{at % 10}")
            axes.plot(end, -at, "o", color=f"C{at % 10}")
        mean = statistics.fmean(row["end"][number] for row in rows)
        axes.annotate(f"{mean:.3f}", (mean, -at), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
    places = [-at for at in range(len(ways))]
    axes.set_yticks(places, [f"{name} ({rows[0]['tokens']:,} tokens)" for name, rows in ways.items()])
    axes.set_xlabel(label)
    axes.set_title("Open: before training. Full: after", loc="left")
    axes.margins(y=0.1)
