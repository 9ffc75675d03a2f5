"""Is it worth matching likelihoods across tokenizers? The experiments behind docs/papers.md, ALM.

    python tools/experiments/alm.py unigram llama2      # SmolLM2-135M moved to other vocabularies, an hour each
    python tools/experiments/alm.py bytes               # and to bytes, about two hours on two cores
    python tools/experiments/alm.py student             # a small model with a tokenizer of its own learns from it
    python tools/experiments/alm.py unigram llama2 bytes student --draw docs/pictures

Every run adds a line to OUT/results.jsonl; the same command goes on where it was interrupted, inside a run too. What
docs/papers.md reports is kept in tools/experiments/alm.jsonl: `--results` with that file draws it, or adds to it.

Two numbers, both in bits per byte, which mean the same for every tokenizer: that of held-out text, and by how much a
student needs more than the teacher for text that the teacher wrote, sampled as it is. Their difference in
log-likelihood is an estimate of KL(teacher ‖ student), per byte. Learning rates are tuned alike for all methods: each
is tried with the same number of them on seed 0, and the one with the least bits per byte of held-out text is used for
the other seeds.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from common import (
    Bench,
    Row,
    domains_of_held_out_text,
    draw_ways,
    plotting,
    read_rows,
    read_texts,
    rows_of,
    spread,
    write_texts,
)

from jaxdistill.assets import asset
from jaxdistill.checkpoint.open import Model, open_model
from jaxdistill.data import DataConfig
from jaxdistill.evaluate import Scoring, evaluate_text
from jaxdistill.generate import generate
from jaxdistill.losses.alm import ALM
from jaxdistill.losses.hidden import HiddenMatch
from jaxdistill.losses.pairs import ULD, MinED
from jaxdistill.losses.terms import CrossEntropy
from jaxdistill.models.lora import Lora
from jaxdistill.retokenize import retokenize_model
from jaxdistill.specs import Attention, GatedMLP, LayerSpec, ModelConfig
from jaxdistill.tokenizers import load_tokenizer
from jaxdistill.train.config import StudentConfig, TeacherConfig

Part = Literal["unigram", "llama2", "bytes", "student"]
ALONE = {"teacher": TeacherConfig(), "losses": {"cross_entropy": CrossEntropy()}}
"""Next-token training on text."""
MATCHED = {"losses": {"alm": ALM(), "cross_entropy": CrossEntropy()}, "weighting": "gradient_magnitude"}
STATES = HiddenMatch(layers=((-1, -1),), distance="channelwise")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Which experiments to run, and where."""

    parts: tyro.conf.Positional[tuple[Part, ...]]
    out: Path = Path("runs/experiments/alm")
    results: Path | None = None
    """The file of results; OUT/results.jsonl if not given."""
    draw: Path | None = None
    """Draw what there is into this directory, too."""


def main(options: Options) -> None:
    results = options.results or options.out / "results.jsonl"
    for part in options.parts:
        if part == "student":
            small_student(options.out, results)
        else:
            transfer(options.out, results, part)
        print(f"\n{table(results, part)}\n")
    if options.draw is not None:
        draw(results, options.draw)


# SmolLM2-135M in other tokens.


def tokenizer_of(part: Part) -> str:
    """Unigram pieces of normalised text, byte pairs with a space before each word, or bytes."""
    names = {"unigram": "tokenizer.default", "llama2": "tokenizer.llama2", "student": "tokenizer.llama2"}
    return "bytes" if part == "bytes" else str(asset("tokenizers") / names[part])


def transfer(out: Path, results: Path, part: Part) -> None:
    """The same text, steps and rows for all methods, which begin with the same rows of the embedding. Adapters of all
    linears and the embedding learn."""
    in_bytes = part == "bytes"
    length, teacher_length, steps = (1024, 288, 24) if in_bytes else (256, 256, 40)
    bench = bench_of(part, out, results, length=length, batch_size=4)
    student = StudentConfig(tokenizer=tokenizer_of(part), suffixes=in_bytes, lora=Lora(), trainable=("embedding.*",))
    yardstick = Yardstick(bench)
    bench.result("before training", lambda: {"tokens": 0, "end": yardstick.numbers(begun(student))}, seed=0)
    matched = {**MATCHED, "losses": {**MATCHED["losses"], **({"states": STATES} if in_bytes else {})}}
    methods = {
        "ALM": matched,
        "next token": ALONE,
        "MinED": {"losses": {"mined": MinED()}},
        "ULD": {"losses": {"uld": ULD(weight=1.5), "cross_entropy": CrossEntropy()}},
    }
    if in_bytes:
        methods["ALM, without the old embedding"] = matched

    def changes(way: str, seed: int) -> dict[str, Any]:
        given = methods[way]
        alone = given is ALONE
        own = {"path": str(bench.teacher) if alone else None, "suffixes": in_bytes and "without" not in way}
        theirs = None if alone else teacher_length
        data = DataConfig(path=str(bench.text), length=length, teacher_length=theirs, batch_size=4, seed=seed)
        return {**given, "student": dataclasses.replace(student, **own), "data": data}

    for way in methods:
        bench.tuned(way, (5e-4, 2e-3), steps, functools.partial(changes, way), measure=yardstick.student)


def begun(student: StudentConfig) -> Model:
    """A student before it learns."""
    teacher, new = open_model(asset("smollm2")), load_tokenizer(str(student.tokenizer))
    shape, params, _ = retokenize_model(
        teacher.config, teacher.params, teacher.tokenizer, new, key=jax.random.key(0), suffixes=student.suffixes
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
PRETRAINING, FURTHER = 250, 100
"""Steps on the text alone, and after them of every method."""
WRITTEN = 1_200
"""Texts of the teacher to learn from; about as many tokens as there are in the further steps."""


def small_student(out: Path, results: Path) -> None:
    """A model that was trained on the text learns further: from the teacher's likelihoods on the same text, from that
    text, or from text that the teacher wrote."""
    bench = bench_of("student", out, results, length=256, batch_size=8)
    start = out / "small" / "student"
    if not start.exists():
        pretrain(bench, start.parent)
    yardstick = Yardstick(bench)
    bench.result("before training", lambda: {"tokens": 0, "end": yardstick.student(start)}, seed=0)
    own = StudentConfig(path=str(start))
    with_states = {**MATCHED, "losses": {**MATCHED["losses"], "states": STATES}}
    for way, given in {"ALM": MATCHED, "ALM and states": with_states, "next token": ALONE}.items():
        bench.tuned(
            way, (3e-4, 1e-3), FURTHER, lambda _, given=given: {**given, "student": own}, measure=yardstick.student
        )
    text = written_by_teacher(out / "written.jsonl", first_words(read_texts(bench.text), words=12), texts=WRITTEN)
    written = dataclasses.replace(bench, text=text)
    way = "next token of the teacher's text"
    written.tuned(way, (3e-4, 1e-3), FURTHER, lambda _: {**ALONE, "student": own}, measure=yardstick.student)


def pretrain(bench: Bench, out: Path) -> None:
    from jaxdistill.train.loop import train

    config = bench.config("", seed=0, rate=2e-3, steps=PRETRAINING, teacher=TeacherConfig(), losses=ALONE["losses"])
    data = dataclasses.replace(config.data, batch_size=16)
    student = StudentConfig(model=SMALL, tokenizer=tokenizer_of("student"))
    train(dataclasses.replace(config, out=str(out), data=data, student=student, export="jaxdistill"))


# What is measured.


def bench_of(part: Part, out: Path, results: Path, *, length: int, batch_size: int) -> Bench:
    return Bench(
        name=part,
        out=out,
        results=results,
        teacher=asset("smollm2"),
        text=asset("boolq-passages"),
        length=length,
        batch_size=batch_size,
        tuned_by="bits_per_byte",
    )


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """What any model is measured by."""

    bench: Bench

    def student(self, path: Path) -> dict[str, float]:
        return self.numbers(open_model(path))

    def numbers(self, model: Model) -> dict[str, float]:
        """Bits per byte of held-out text, and how many more than the teacher for the teacher's own."""
        of_teacher = dataclasses.replace(self.bench, name="teacher")
        teacher = of_teacher.result("teacher", lambda: {"end": self.bits(open_model(self.bench.teacher))}, seed=0)
        found = self.bits(model)
        return {"bits_per_byte": found["held-out"], "kl": found["written"] - teacher["end"]["written"]}

    def bits(self, model: Model) -> dict[str, float]:
        """Bits per byte of about 33,000 bytes of six held-out domains, and of 48 texts by the teacher."""
        domains = domains_of_held_out_text(document_bytes=900, domain_bytes=5_500)
        held_out = [text for texts in domains.values() for text in texts]
        file = written_by_teacher(self.bench.out / "measured.jsonl", first_words(held_out, words=5), texts=48)
        # Rows in which every text is whole.
        scoring = Scoring(length=1024 if model.config.vocab < 1000 else 384, batch_size=2)
        texts = {"held-out": held_out, "written": read_texts(file)}
        found = evaluate_text({"model": model}, texts, scoring=scoring)["model"]
        return {name: score.bits_per_byte for name, score in found.items()}


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
    """Rows by way, each with the numbers before training at its start."""
    found = rows_of(results, [part], tuned_by="bits_per_byte")
    ways = {way: rows for (_, way), rows in found.items()}
    before = ways.pop("before training", None)
    for row in (row for rows in ways.values() for row in rows):
        row["start"] = before[0]["end"] if before else row["end"]
    return ways


def table(results: Path, part: Part) -> str:
    """Markdown: a line for each way. Means over seeds, and standard deviations."""
    lines = ["| | seeds | rate | tokens | bits per byte | KL to the teacher |", "|---|---|---|---|---|---|"]
    teacher = [row for row in read_rows(results) if row["bench"] == "teacher"]
    if teacher:
        lines.append(f"| teacher | | | | {teacher[0]['end']['held-out']:.3f} | 0 |")
    ways = ways_of(results, part)
    for start in [rows[0]["start"] for rows in ways.values()][:1]:
        lines.append(f"| before training | | | 0 | {start['bits_per_byte']:.3f} | {start['kl']:.3f} |")
    for way, rows in ways.items():
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
            figure, both = plt.subplots(1, 2, figsize=(9, 0.9 + 0.4 * len(ways)), sharey=True, layout="constrained")
            for axes, (number, label) in zip(both, NUMBERS.items(), strict=True):
                draw_ways(axes, ways, number, label)
            both[0].invert_yaxis()  # both panels share the axis, and each turned it round
            both[1].set_title("")
            figure.savefig(pictures / f"alm-{part}.png", dpi=130)
            plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
