"""What aligning two tokenizers costs: chunks alone, next to a loop over tokens, and the whole way from text to rows.

    python tools/bench_align.py                       # 2,000 BoolQ passages, SmolLM2's tokenizer against three others

Tokens are those of both sides together. The best of `repeats` is taken for each 256 texts, so that other load on the
machine slows neither side of the ratio alone. The loop is plain Python that walks over both sides of each text once;
its result is compared. Rows: tokenize, align and pack into pairs of rows, with as many cores as the tokenizers'
libraries take.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from jaxdistill.align import Alignment, Placed, align
from jaxdistill.assets import asset
from jaxdistill.data import DataConfig, make_loader
from jaxdistill.tokenizers import Tokenizer, load_tokenizer

TEACHERS = {"llama2": "tokenizer.llama2", "unigram32k": "tokenizer.default", "bytes": None}
TOGETHER = 256
"""Texts aligned at once, as a loader does."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured on what."""

    data: Path | None = None
    """JSON Lines with "text"; None is BoolQ's passages, fetched when they are not there."""
    texts: int = 2000
    repeats: int = 7
    batches: int = 20
    """Batches of the loader that are timed."""


def main(options: Options) -> None:
    path = options.data or asset("boolq-passages")
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()[: options.texts]]
    student = load_tokenizer(asset("smollm2"))
    print(f"{len(texts):,} texts, tokens of both sides together per second; student smollm2")
    print(f"{'teacher':12} {'tokens':>10} {'align':>12} {'words':>12} {'loop':>12} {'align/loop':>10} {'rows':>10}")
    for name, file in TEACHERS.items():
        teacher = load_tokenizer("bytes" if file is None else asset("tokenizers") / file)
        found = measure_alignment([placed(tokenizer, texts) for tokenizer in (student, teacher)], options.repeats)
        rows = measure_rows(path, student, teacher, options.batches)
        speeds = " ".join(f"{found[way]:12,.0f}" for way in ("align", "words", "loop"))
        print(f"{name:12} {found['tokens']:10,.0f} {speeds} {found['align'] / found['loop']:10.1f} {rows:10,.0f}")


def placed(tokenizer: Tokenizer, texts: list[str]) -> list[Placed]:
    """All texts, some at a time, each with everything that alignment asks for."""
    groups = []
    for start in range(0, len(texts), TOGETHER):
        encodings = tokenizer.encode_batch(texts[start : start + TOGETHER])
        ends = np.concatenate([encoding.offsets[:, 1] for encoding in encodings])
        opens = np.zeros(len(ends), bool)
        groups.append(Placed(ends, np.ones(len(ends), bool), opens, np.array([len(each.ids) for each in encodings])))
    return groups


def measure_alignment(sides: list[list[Placed]], repeats: int) -> dict[str, float]:
    """Tokens, and tokens per second of each way."""
    groups = list(zip(*sides, strict=True))
    for group in groups:
        for ids, wanted in zip(align(*group), looped(*group), strict=True):
            np.testing.assert_array_equal(ids, wanted)
    ways: dict[str, Callable[[Placed, Placed], object]] = {
        "align": align,
        "words": functools.partial(align, chunks="words"),
        "loop": looped,
    }
    seconds = {name: sum(best_time(run, group, repeats) for group in groups) for name, run in ways.items()}
    tokens = sum(len(side.ends) for group in groups for side in group)
    return {"tokens": tokens} | {name: tokens / each for name, each in seconds.items()}


def best_time(run: Callable[[Placed, Placed], object], sides: tuple[Placed, ...], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run(*sides)
        times.append(time.perf_counter() - began)
    return min(times)


def looped(student: Placed, teacher: Placed) -> Alignment:
    """The minimal chunks of texts, one token after the other."""
    found, starts = ([], []), [0, 0]
    sides: list[Any] = [student, teacher]
    for counts in zip(*(side.counts.tolist() for side in sides), strict=True):
        text = []
        for side, (tokens, count) in enumerate(zip(sides, counts, strict=True)):
            held = slice(starts[side], starts[side] + count)
            text += [tokens.ends[held], tokens.inside[held]]
            starts[side] += count
        for ids, own in zip(found, looped_text(*text), strict=True):
            ids.append(own)
    return Alignment(*map(np.concatenate, found))


def looped_text(
    student_ends: np.ndarray, student_inside: np.ndarray, teacher_ends: np.ndarray, teacher_inside: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Goes on with the side that is behind; a chunk ends where both are at the same byte."""
    ends = student_ends.tolist(), teacher_ends.tolist()
    inside = student_inside.tolist(), teacher_inside.tolist()
    ids, at, taken, chunk, closed = ([], []), [0, 0], [0, 0], 1, 0
    counts = [len(ends[0]), len(ends[1])]
    while taken != counts:
        side = 0 if taken[0] < counts[0] and (at[0] <= at[1] or taken[1] == counts[1]) else 1
        index = taken[side]
        ids[side].append(chunk if inside[side][index] else 0)
        at[side] = ends[side][index]
        taken[side] += 1
        if at[0] == at[1] and at[0] > closed:
            chunk, closed = chunk + 1, at[0]
    return np.array(ids[0], np.int32), np.array(ids[1], np.int32)


def measure_rows(path: Path, student: Tokenizer, teacher: Tokenizer, batches: int) -> float:
    """Tokens of both sides per second, from text to batches of 8 pairs of rows."""
    longer = 4096 if teacher.vocab_size < 1000 else 1024
    loader = make_loader(
        DataConfig(path=str(path), length=512, teacher_length=longer), student, teacher_tokenizer=teacher
    )
    next(loader)
    began, before = time.perf_counter(), loader.statistics
    for _ in range(batches):
        next(loader)
    seconds, after = time.perf_counter() - began, loader.statistics
    loader.close()
    counted = [each.tokens + each.teacher_tokens for each in (before, after)]  # pyright: ignore[reportAttributeAccessIssue]
    return (counted[1] - counted[0]) / seconds


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
