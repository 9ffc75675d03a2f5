"""Is it worth matching likelihoods across tokenizers? The experiments behind docs/papers.md, ALM.

    python tools/experiments/alm.py unigram llama2      # SmolLM2-135M moved to other vocabularies
    python tools/experiments/alm.py bytes               # and to bytes
    python tools/experiments/alm.py student             # a small model with a tokenizer of its own learns from it
    python tools/experiments/alm.py unigram llama2 bytes student --draw docs/pictures    # hours: see docs/log.md

Every run adds a line to OUT/results.jsonl; the same command goes on where it was interrupted, inside a run too. What
docs/papers.md reports is kept in tools/experiments/alm.jsonl: `--results` with that file draws it, or adds to it.

Two numbers, both in bits per byte and of the same bytes whatever the tokenizer: that of held-out text, and by how much
a student needs more than the teacher for what the teacher wrote, sampled as it is, up to the first line break. Their
difference in log-likelihood is an estimate of KL(teacher ‖ student), per byte. Every text begins with a few words that
are read and not counted. Learning rates are tuned alike for all methods: each is tried with the same number of them on
seed 0, and the one with the least bits per byte of text that is used for nothing else is taken for the other seeds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import unicodedata
from collections.abc import Mapping, Sequence
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
    fingerprint,
    finish,
    in_turn,
    plotting,
    read_rows,
    read_texts,
    rows_of,
    run_parts,
    spread,
    write_texts,
)

from jaxdistill.assets import asset
from jaxdistill.checkpoint.open import Model, open_model
from jaxdistill.data import DataConfig
from jaxdistill.evaluate import Scoring
from jaxdistill.evaluate.scoring import score, whole_piece
from jaxdistill.generate import generate
from jaxdistill.losses.alm import ALM
from jaxdistill.losses.hidden import HiddenMatch
from jaxdistill.losses.pairs import ULD, MinED
from jaxdistill.losses.terms import CrossEntropy
from jaxdistill.models.lora import Lora
from jaxdistill.retokenize import retokenize_model
from jaxdistill.specs import Attention, GatedMLP, LayerSpec, ModelConfig
from jaxdistill.tokenizers import Tokenizer, load_tokenizer
from jaxdistill.train.config import StudentConfig, TeacherConfig

Part = Literal["unigram", "llama2", "bytes", "student"]
ALONE = {"teacher": TeacherConfig(), "losses": {"cross_entropy": CrossEntropy()}}
"""Next-token training on text."""
MATCHED = {"losses": {"alm": ALM(), "cross_entropy": CrossEntropy()}, "weighting": "gradient_magnitude"}
BEFORE, PLAIN = "before training", ", without the old embedding"
"""Of ways: a student as it begins, and one of bytes that does not read the old embedding."""
STATES = HiddenMatch(point="final_normed", distance="channelwise")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Places):
    """Which experiments to run, and where."""

    parts: tyro.conf.Positional[tuple[Part, ...]]
    out: Path = Path("runs/experiments/alm")


def main(options: Options) -> None:
    run_parts(options, options.parts, run=experiment, table=table, draw=draw)


def experiment(out: Path, results: Path, part: Part) -> None:
    if part == "student":
        small_student(out, results)
    else:
        transfer(out, results, part)


# SmolLM2-135M in other tokens.


def tokenizer_of(part: Part) -> str:
    """Unigram pieces of normalised text, byte pairs with a space before each word, or bytes."""
    names = {"unigram": "tokenizer.default", "llama2": "tokenizer.llama2", "student": "tokenizer.llama2"}
    return "bytes" if part == "bytes" else str(asset("tokenizers") / names[part])


def transfer(out: Path, results: Path, part: Part) -> None:
    """The same text, steps and rows for all methods, which begin with the same rows of the embedding. Adapters of all
    linears and the embedding learn. Rows are filled to about nine tenths; a text that one of the two sides has no room
    for is cut on both, which takes less than a hundredth. Bytes are too dear for all seeds."""
    in_bytes = part == "bytes"
    length, teacher_length, steps = (1024, 288, 16) if in_bytes else (256, 288, 30)
    rates = (5e-4, 2e-3) if in_bytes else (2e-4, 5e-4)
    bench = bench_of(part, out, results, length=length, batch_size=4, steps=steps)
    student = StudentConfig(tokenizer=tokenizer_of(part), suffixes=in_bytes, lora=Lora(), trainable=("embedding.*",))
    methods = {
        "ALM": MATCHED,
        **({"ALM and states": with_states(MATCHED), f"ALM{PLAIN}": MATCHED} if in_bytes else {}),
        "next token": ALONE,
        "MinED": {"losses": {"mined": MinED()}},
        "ULD": {"losses": {"uld": ULD(weight=1.5), "cross_entropy": CrossEntropy()}},
    }

    def changes(way: str, seed: int) -> dict[str, Any]:
        given = methods[way]
        alone = given is ALONE
        own = {"path": str(bench.teacher) if alone else None, "suffixes": in_bytes and PLAIN not in way}
        theirs = None if alone else teacher_length
        data = DataConfig(path=str(bench.text), length=length, teacher_length=theirs, batch_size=4, seed=seed)
        return {**given, "student": dataclasses.replace(student, **own), "data": data}

    yardstick = Yardstick(bench)
    for end in ("", PLAIN) if in_bytes else ("",):

        def before(suffixes: bool = in_bytes and not end) -> dict[str, Any]:
            return {"tokens": 0, "end": yardstick.numbers(begun(student, suffixes=suffixes))}

        bench.result(BEFORE + end, before, seed=0)
    for way in methods:
        given = functools.partial(changes, way)
        bench.tuned(way, rates, steps, given, seeds=SEEDS[:1] if in_bytes else SEEDS, measure=yardstick.student)


def with_states(method: dict[str, Any]) -> dict[str, Any]:
    """The method with the last hidden states matched as well."""
    return {**method, "losses": {**method["losses"], "states": STATES}}


def begun(student: StudentConfig, *, suffixes: bool) -> Model:
    """A student before it learns, as a run with seed 0 has it."""
    teacher, new = open_model(asset("smollm2")), load_tokenizer(str(student.tokenizer))
    key = jax.random.fold_in(jax.random.key(0), 1)
    shape, params, _ = retokenize_model(
        teacher.config, teacher.params, teacher.tokenizer, new, key=key, suffixes=suffixes
    )
    return Model(shape, params, new)


# A small model of its own.

SMALL = ModelConfig(
    family="llama",
    vocab=32_000,
    embed=256,
    layers=(LayerSpec(mixer=Attention(heads=4, kv_heads=2, head_dim=64), ffn=GatedMLP(mlp=704)),) * 6,
    tied=True,
)
"""12.6M parameters, with Llama 2's tokenizer."""
PRETRAINING, FURTHER = 250, 80
"""Steps on the text alone, and after them of every method."""
WRITTEN = 960
"""Texts of the teacher to learn from; about as many tokens as there are in the further steps."""


def small_student(out: Path, results: Path) -> None:
    """A model that was trained on the text learns further: from the teacher's likelihoods on the same text, from that
    text, or from text that the teacher wrote."""
    start, text = out / "small" / "student", out / "written.jsonl"

    def prepare(bench: Bench) -> None:
        if not start.exists():
            pretrain(bench, start.parent)
        written_by_teacher(text, first_words(read_texts(bench.text), words=12), texts=WRITTEN, rows=64)

    bench = bench_of("student", out, results, length=256, batch_size=8, steps=FURTHER)
    bench = dataclasses.replace(bench, prepare=prepare)
    yardstick = Yardstick(bench)
    bench.result(BEFORE, lambda: {"tokens": 0, "end": yardstick.student(start)}, seed=0)
    # What the teacher wrote ends where it was cut off.
    written = DataConfig(path=str(text), length=bench.length, batch_size=bench.batch_size, append_eos=False)
    methods = {
        "ALM": MATCHED,
        "ALM and states": with_states(MATCHED),
        "next token": ALONE,
        "next token of the teacher's text": {**ALONE, "data": written},
    }
    for way, given in methods.items():

        def changes(seed: int, given=given) -> dict[str, Any]:
            own = {"data": dataclasses.replace(given["data"], seed=seed)} if "data" in given else {}
            return {**given, **own, "student": StudentConfig(path=str(start))}

        bench.tuned(way, (3e-4, 1e-3), FURTHER, changes, measure=yardstick.student)


def pretrain(bench: Bench, out: Path) -> None:
    config = bench.config("", seed=0, rate=2e-3, steps=PRETRAINING, teacher=TeacherConfig(), losses=ALONE["losses"])
    data = dataclasses.replace(config.data, batch_size=16)
    student = StudentConfig(model=SMALL, tokenizer=tokenizer_of("student"))
    finish(dataclasses.replace(config, out=str(out), data=data, student=student, export="jaxdistill"))


# What is measured.

WINDOWS = 4_096
"""Positions of held-out text that are measured on the way."""
READ_WORDS = 5
"""Of every text that is measured, which the teacher continued, or did not."""


def bench_of(part: Part, out: Path, results: Path, *, length: int, batch_size: int, steps: int) -> Bench:
    return Bench(
        name=part,
        out=out,
        results=results,
        teacher=asset("smollm2"),
        text=asset("boolq-passages"),
        held_out=held_out_text(out),
        windows=WINDOWS // length,
        length=length,
        batch_size=batch_size,
        tuned_by="tuning_bits_per_byte",
        settings=fingerprint(measured_texts(out), length, batch_size, steps),
    )


@functools.cache
def measured_texts(out: Path) -> dict[str, list[str]]:
    """Five held-out domains of prose, half of their documents for tuning alone, and texts by the teacher. White space
    is collapsed and characters are normalised, so that every tokenizer can spell the texts; those that the unigram
    model has no pieces for are left out."""
    domains = domains_of_held_out_text(document_bytes=900, domain_bytes=11_000)
    found = in_turn({name: texts for name, texts in domains.items() if name != "github-code"})
    found = spelled_alike([" ".join(unicodedata.normalize("NFKC", text).split()) for text in found])
    file = written_by_teacher(out / "measured.jsonl", first_words(found, words=READ_WORDS), texts=96)
    written = spelled_alike([text.splitlines()[0] for text in read_texts(file)])
    texts = {"tuning": found[0::2], "held-out": found[1::2], "written": written}
    return {name: [text for text in each if len(text.split()) > 2 * READ_WORDS] for name, each in texts.items()}


def held_out_text(out: Path) -> Path:
    """The held-out texts as a file for `train`, which measures on the beginning of it."""
    file = out / "held_out.jsonl"
    return file if file.exists() else write_texts(file, measured_texts(out)["held-out"])


def spelled_alike(texts: Sequence[str]) -> list[str]:
    """The texts that the tokenizer that normalises gives back as they are."""
    tokenizer = load_tokenizer(tokenizer_of("unigram"))
    return [text for text in texts if tokenizer.decode(tokenizer.encode(text).ids.tolist()) == text]


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """What any model is measured by."""

    bench: Bench

    def student(self, path: Path) -> dict[str, float]:
        return self.numbers(open_model(path))

    def numbers(self, model: Model) -> dict[str, float]:
        """Bits per byte of held-out text, of text for tuning, and how many more than the teacher for its own."""
        settings = fingerprint(measured_texts(self.bench.out))
        of_teacher = dataclasses.replace(self.bench, name="teacher", settings=settings)
        teacher = of_teacher.result("teacher", lambda: {"end": self.bits(open_model(self.bench.teacher))}, seed=0)
        found = self.bits(model)
        return {
            "bits_per_byte": found["held-out"],
            "tuning_bits_per_byte": found["tuning"],
            "kl": found["written"] - teacher["end"]["written"],
        }

    def bits(self, model: Model) -> dict[str, float]:
        """Bits per byte of the measured texts, without the words that they begin with."""
        texts = measured_texts(self.bench.out)
        counted = [[behind_first_words(model.tokenizer, text) for text in each] for each in texts.values()]
        pieces = [
            whole_piece(ids, supervised, group=group)
            for group, each in enumerate(counted)
            for ids, supervised, _ in each
        ]
        scoring = Scoring(length=1 << (max(map(len, pieces)) - 1).bit_length(), batch_size=2)
        nats = score({"model": model}, pieces, groups=len(texts), scoring=scoring)["model"]["nats"]
        sizes = [sum(size for *_, size in each) for each in counted]
        return {name: float(nats[i]) / math.log(2) / sizes[i] for i, name in enumerate(texts)}


def behind_first_words(tokenizer: Tokenizer, text: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Tokens of a text, which of them lie behind its first words, and how many bytes that is. Words begin with their
    space, so that no token lies on both sides."""
    read = len(" ".join(text.split(" ")[:READ_WORDS]).encode())
    encoding = tokenizer.encode(text)
    supervised = encoding.offsets[:, 0] >= read
    spelled = int((encoding.offsets[supervised, 1] - encoding.offsets[supervised, 0]).sum())
    size = len(text.encode()) - read
    if spelled != size:
        raise SystemExit(f"{spelled} of {size} bytes are spelled behind the first words of {text[:80]!r}")
    return encoding.ids, supervised, size


def first_words(texts: Sequence[str], *, words: int) -> list[str]:
    return [" ".join(text.split()[:words]) for text in texts if len(text.split()) > words]


def written_by_teacher(file: Path, prompts: Sequence[str], *, texts: int, tokens: int = 160, rows: int = 48) -> Path:
    """Texts that the teacher sampled, each with its prompt; made once."""
    if file.exists():
        return file
    teacher = open_model(asset("smollm2"))
    chosen = [prompts[i % len(prompts)] for i in range(texts)]
    found: list[str] = []
    for first in range(0, texts, rows):
        given = [teacher.tokenizer.encode(prompt).ids.tolist() for prompt in chosen[first : first + rows]]
        made = generate(
            teacher.config,
            teacher.params,
            given,
            max_new_tokens=tokens,
            stop=teacher.tokenizer.special.stop,
            key=jax.random.key(first),
        )
        found += [teacher.tokenizer.decode([*prompt, *new]) for prompt, new in zip(given, made, strict=True)]
        print(f"the teacher wrote {len(found)} of {texts} texts", flush=True)
    return write_texts(file, found)


# Tables and pictures.

NUMBERS = {"bits_per_byte": "held-out text, bits per byte", "kl": "KL to the teacher, bits per byte of its text"}


def ways_of(results: Path, part: Part) -> dict[str, list[Row]]:
    """Rows by way, each with the numbers before training at its start: seed 0's, in which rows of the embedding that
    nothing is known of are drawn."""
    found = rows_of(results, [part], tuned_by="tuning_bits_per_byte")
    before = {way: rows[0]["end"] for (_, way), rows in found.items() if way.startswith(BEFORE)}

    def with_start(row: Row) -> Row:
        return {**row, "start": before[BEFORE + (PLAIN if PLAIN in row["way"] else "")]}

    return {way: [with_start(row) for row in rows] for (_, way), rows in found.items() if not way.startswith(BEFORE)}


def table(results: Path, part: Part) -> str:
    """Markdown: a line for each way. Means over seeds, and standard deviations."""
    lines = ["| | seeds | rate | positions | bits per byte | KL to the teacher |", "|---|---|---|---|---|---|"]
    latest = {(row["bench"], row["way"]): row for row in read_rows(results)}
    lines.append(f"| teacher | | | | {latest['teacher', 'teacher']['end']['held-out']:.3f} | 0 |")
    for (bench, way), row in latest.items():
        if bench == part and way.startswith(BEFORE):
            lines.append(f"| {row['way']} | | | 0 | {row['end']['bits_per_byte']:.3f} | {row['end']['kl']:.3f} |")
    for way, rows in ways_of(results, part).items():
        numbers = [spread([row["end"][number] for row in rows]) for number in NUMBERS]
        settings = [str(len(rows)), f"{rows[0]['rate']:g}", f"{rows[0]['tokens']:,}"]
        lines.append(f"| {' | '.join([way, *settings, *numbers])} |")
    return "\n".join(lines)


def draw(results: Path, pictures: Path) -> None:
    """A picture of each part that there are results of."""
    plt = plotting()
    pictures.mkdir(parents=True, exist_ok=True)
    for part in ("unigram", "llama2", "bytes", "student"):
        ways = ways_of(results, part)
        if ways:
            figure = plt.figure(figsize=(9, 3.6 + 0.4 * len(ways)), layout="constrained")
            grid = figure.add_gridspec(2, 2, height_ratios=[0.9 + 0.4 * len(ways), 2.7])
            left = figure.add_subplot(grid[0, 0])
            right = figure.add_subplot(grid[0, 1], sharey=left)
            for axes, (number, label) in zip((left, right), NUMBERS.items(), strict=True):
                draw_ways(axes, ways, number, label)
                axes.margins(x=0.12)
            right.set_title("", loc="left")
            right.tick_params(labelleft=False)
            draw_along(figure.add_subplot(grid[1, :]), ways)
            figure.savefig(pictures / f"alm-{part}.png", dpi=130)
            plt.close(figure)


def draw_along(axes: Any, ways: Mapping[str, Sequence[Row]]) -> None:
    """The first rows of the held-out text by step, the words that they begin with counted as well: a thin line for each
    seed of each way. A start far above all that follows is out of the picture."""
    measured = [value for rows in ways.values() for row in rows for _, value in row["along"][1:]]
    margin = 0.1 * (max(measured) - min(measured))
    axes.set_ylim(min(measured) - margin, max(measured) + margin)
    for at, rows in enumerate(ways.values()):
        for row in rows:
            axes.plot(*zip(*row["along"], strict=True), color=f"C{at}", linewidth=1)
    axes.set_xlabel("steps")
    axes.set_ylabel("bits per byte")
    axes.set_title("On the way, on the first rows of the held-out text (colours as above)", loc="left")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
