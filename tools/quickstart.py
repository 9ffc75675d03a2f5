"""The whole way on one real model: fetch, convert, make a student, distil, evaluate, export, sample, report.

    make quickstart                        # about five minutes on two CPU cores
    python tools/quickstart.py --seconds 60 --out runs/short

Everything lands in --out: teacher/ (our checkpoint), train/ (the run; train/student is a Hugging Face directory),
evaluation.json, samples.json, report.html. Run again, it resumes what was interrupted and says what exists.
"""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
import time
from pathlib import Path
from typing import Any

import tyro

RECIPE = Path(__file__).parents[1] / "configs" / "quickstart.py"
PROMPT = "The history of the city begins with"
FULL_SECONDS = 300.0
"""The budget that the recipe's steps and the evaluation below are made for."""
DOMAIN_BYTES = 4_000
"""Of each of the six held-out domains, about 1,000 tokens."""
PIQA_ITEMS = 100
EVALUATED_TOKENS = 12_200
"""Of that text, and of both answers to those questions."""
EFFICIENCY = 0.5
"""What a step and an evaluation do of their floating-point operations at the matmul rate (docs/log.md)."""
OTHER_SECONDS = 40
"""To open, rank layers, compile, write and sample."""
PIQA_PROMPT = "Question: {question}\nAnswer:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quickstart:
    """Distil SmolLM2-135M-Instruct into a smaller student, and measure what was lost."""

    out: Path = Path("runs/quickstart")
    seconds: float = FULL_SECONDS
    """Time to take, downloads not counted. With less than the full five minutes, or on a slow machine, the student is
    trained for fewer steps; with less, the evaluation is smaller too."""


def main(options: Quickstart) -> None:
    from jaxdistill.assets import asset
    from jaxdistill.formats.paths import write_text
    from jaxdistill.report.page import write_report
    from jaxdistill.train.progress import Clock

    clock = Clock()
    with clock.measure("fetch"):
        paths = {name: asset(name) for name in ("smollm2", "boolq-passages", "heldout", "piqa")}
    began = time.perf_counter()
    with clock.measure("convert"):
        convert(paths["smollm2"], options.out / "teacher")
    config = plan(options, paths, spent=time.perf_counter() - began)
    from jaxdistill.train.loop import train

    result = train(config)
    clock.parts |= result.seconds
    if result.student is None:
        return  # stopped by a signal; the run has said so
    with clock.measure("evaluate"):
        models = open_models(options.out / "teacher", result)
        evaluation = evaluate(models, paths, share=share(options))
    print(f"\n{evaluation.table()}\n\n{verdict(evaluation)}\n")
    with clock.measure("sample"):
        samples = sample(models)
    for name, content in (
        ("evaluation.json", evaluation.to_dict()),
        ("samples.json", samples),
        ("times.json", clock.parts),
    ):
        write_text(options.out / name, json.dumps(content, indent=1) + "\n")
    page = write_report(options.out)
    print(f"time:\n{clock}\n\nstudent: {result.student}\nreport:  {page}")


def convert(source: Path, target: Path) -> None:
    """The GGUF as our checkpoint."""
    from jaxdistill.checkpoint.model import describe, is_model
    from jaxdistill.jobs.convert import convert_model

    if is_model(target):
        print(f"{target} exists: {describe(target)}")
    else:
        convert_model(str(source), str(target), to="jaxdistill", dtype="float32")


def plan(options: Quickstart, paths: dict[str, Path], *, spent: float) -> Any:
    """The recipe with this machine's paths, and as many of its steps as the time allows."""
    from jaxdistill.checkpoint.open import open_config
    from jaxdistill.models.flops import forward_flops, training_flops
    from jaxdistill.train.progress import matmul_rate

    config = runpy.run_path(str(RECIPE))["get_config"]()
    config = dataclasses.replace(
        config,
        out=str(options.out / "train"),
        teacher=dataclasses.replace(config.teacher, path=str(options.out / "teacher")),
        data=dataclasses.replace(config.data, path=str(paths["boolq-passages"])),
        held_out=dataclasses.replace(config.held_out, path=str(paths["heldout"])),
    )
    earlier = options.out / "train" / "config.json"
    if earlier.exists():  # a resumed run keeps the plan that it began with
        return dataclasses.replace(config, steps=json.loads(earlier.read_text())["steps"])
    teacher, length = open_config(options.out / "teacher"), config.data.length
    student = config.student.prune.resize(teacher)
    forward = forward_flops(teacher, length)
    step = config.data.batch_size * length * (forward + training_flops(student, length, frozen=["embedding.kernel"]))
    evaluation = share(options) * EVALUATED_TOKENS * (forward + 3 * forward_flops(student, length))
    evaluation += config.student.calibration_batches * config.data.batch_size * length * forward
    flops = (options.seconds - spent - OTHER_SECONDS) * EFFICIENCY * matmul_rate(seconds=1.0) - evaluation
    steps = max(2, min(config.steps, math.floor(flops / step)))
    if steps < config.steps:
        print(f"{steps} of the recipe's {config.steps} steps fit into {options.seconds:.0f} s on this machine")
    return dataclasses.replace(config, steps=steps)


def share(options: Quickstart) -> float:
    """How much of the full evaluation the time allows."""
    return min(1.0, options.seconds / FULL_SECONDS)


def open_models(teacher: Path, result: Any) -> dict[str, Any]:
    """Teacher, the same sizes chosen at random, the student before training, and after."""
    from jaxdistill.checkpoint.open import Model, open_model
    from jaxdistill.prune.baselines import random_importance
    from jaxdistill.prune.choose import choose
    from jaxdistill.prune.slice import prune_model

    original = open_model(teacher)
    target = runpy.run_path(str(RECIPE))["get_config"]().student.prune
    by_chance = choose(original.config, random_importance(original.config, seed=0), target)
    cut = {
        name: Model(*prune_model(original.config, original.params, plan), original.tokenizer)
        for name, plan in (("random", by_chance), ("pruned", result.plan))
    }
    return {"teacher": original, **cut, "distilled": open_model(result.student)}


def evaluate(models: dict[str, Any], paths: dict[str, Path], *, share: float) -> Any:
    """Bits per byte, KL and agreement by domain, and multiple choice; a share of the full sizes."""
    from jaxdistill.evaluate.choice import multiple_choice, read_items
    from jaxdistill.evaluate.results import Evaluation
    from jaxdistill.evaluate.scoring import Scoring
    from jaxdistill.evaluate.text import evaluate_text, excerpts
    from jaxdistill.jobs.stage import counted

    domains: dict[str, list[str]] = {}
    for line in paths["heldout"].read_text().splitlines():
        record = json.loads(line)
        domains.setdefault(record["type"], []).append(record["text"])
    chosen = {
        name: excerpts(texts, total_bytes=int(share * DOMAIN_BYTES), document_bytes=2200)
        for name, texts in domains.items()
    }
    items = read_items(paths["piqa"], prompt=PIQA_PROMPT, limit=math.ceil(share * PIQA_ITEMS))
    with counted("held-out text of six domains") as progress:
        text = evaluate_text(models, chosen, teacher="teacher", scoring=Scoring(batch_size=4), progress=progress)
    choices = {}
    for name, model in models.items():
        with counted(f"{len(items)} PIQA questions, {name}") as progress:
            choices[name] = {"PIQA": multiple_choice(model, items, progress=progress)}
    return Evaluation(text=text, choices=choices, teacher="teacher")


def verdict(evaluation: Any) -> str:
    """What importance was worth, and how much of what pruning lost came back."""
    bits = {name: evaluation.all_text(name).bits_per_byte for name in evaluation.models}
    closed = (bits["pruned"] - bits["distilled"]) / (bits["pruned"] - bits["teacher"])
    return (
        f"Cut at random the student needs {bits['random']:.2f} bits per byte, by importance {bits['pruned']:.2f}, and "
        f"the teacher {bits['teacher']:.2f}. Distillation closed {closed:.0%} of the gap between the pruned student "
        "and the teacher."
    )


def sample(models: dict[str, Any]) -> list[dict[str, str]]:
    """One prompt, continued by each model with the same randomness."""
    import jax

    from jaxdistill.generate import generate

    samples = []
    for name, model in models.items():
        ids = generate(
            model.config,
            model.params,
            [model.tokenizer.encode(PROMPT).ids.tolist()],
            max_new_tokens=48,
            temperature=0.7,
            top_p=0.9,
            stop=model.tokenizer.special.stop,
            key=jax.random.key(0),
        )[0]
        samples.append({"model": name, "prompt": PROMPT, "continuation": model.tokenizer.decode(ids)})
        print(f"{name}: {PROMPT}{samples[-1]['continuation']}\n")
    return samples


if __name__ == "__main__":
    main(tyro.cli(Quickstart, description=__doc__))
