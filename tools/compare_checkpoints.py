"""How two models differ: tensor by tensor, and in what they say about a text.

    python tools/compare_checkpoints.py ONE OTHER
    python tools/compare_checkpoints.py ONE OTHER --text "The capital of France is" --rows 20

ONE and OTHER are checkpoints of ours, Hugging Face directories or .gguf files, of any dtypes. Tensors are read one at a
time; for a text both models have to fit into memory. A NaN is equal to a NaN, and infinitely far from any number. The
exit status is 0 if the configurations and all tensors are equal, else 1.
"""

from __future__ import annotations

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxdistill.checkpoint.open import Model, open_model
from jaxdistill.jobs.convert import open_parts
from jaxdistill.models.decoder import Rows, apply, scores
from jaxdistill.models.parts import Parts, part_names

BLOCK = 1 << 20
"""So many numbers of a tensor are compared at once, or one row."""
POSITIONS = 32
"""Scores of so many positions are compared at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is compared."""

    one: tyro.conf.Positional[str]
    other: tyro.conf.Positional[str]
    text: str | None = None
    """Also compare the models' scores on this text."""
    rows: int = 40
    """So many tensors are listed, those that differ most first; 0 lists all."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of one tensor: the largest difference, and the root of the mean square in parts of the first one's."""

    name: str
    largest: float
    relative: float


def main(options: Options) -> int:
    with open_parts(options.one) as one, open_parts(options.other) as other:
        different = compare_shapes(one, other)
        found = [compare(one, other, name, expert) for name, expert in shared_parts(one, other)]
    for line in different:
        print(line)
    found.sort(key=lambda each: (-each.relative, each.name))
    unequal = [each for each in found if each.largest]
    print(f"{len(found) - len(unequal)} of {len(found)} tensors are equal")
    shown = unequal[: options.rows] if options.rows else unequal
    if shown:
        print(f"{'largest':>12}{'relative':>12}  tensor")
    for each in shown:
        print(f"{each.largest:>12.3g}{each.relative:>12.3g}  {each.name}")
    if len(unequal) > len(shown):
        print(f"… and {len(unequal) - len(shown)} more; --rows 0 lists all")
    if options.text is not None:
        for name, value in compare_scores(open_model(options.one), open_model(options.other), options.text).items():
            print(f"{name}: {value:.6g}")
    return 1 if unequal or different else 0


def compare_shapes(one: Parts, other: Parts) -> list[str]:
    """What the configurations do not share."""
    lines = [
        f"{field.name}: {getattr(one.config, field.name)} / {getattr(other.config, field.name)}"
        for field in dataclasses.fields(one.config)
        if field.name != "layers" and getattr(one.config, field.name) != getattr(other.config, field.name)
    ]
    pairs = zip(one.config.layers, other.config.layers, strict=False)
    lines += [f"layer {layer}: {a} / {b}" for layer, (a, b) in enumerate(pairs) if a != b]
    depths = len(one.config.layers), len(other.config.layers)
    return lines + ([f"{depths[0]} / {depths[1]} layers"] if depths[0] != depths[1] else [])


def shared_parts(one: Parts, other: Parts) -> list[tuple[str, int | None]]:
    """Parts that both have; of those that one has alone, and of other shapes, `compare_shapes` tells."""
    theirs = {*part_names(other.config)}
    return [part for part in part_names(one.config) if part in theirs]


def compare(one: Parts, other: Parts, name: str, expert: int | None) -> Difference:
    label = name if expert is None else f"{name}, expert {expert}"
    a, b = (parts.read(name, expert) for parts in (one, other))
    if a.shape != b.shape:
        return Difference(f"{label}: {a.shape} / {b.shape}", np.inf, np.inf)
    largest, gaps, sizes = 0.0, 0.0, 0.0
    rows = max(1, BLOCK * len(a) // max(1, a.size))
    for start in range(0, len(a), rows):
        x, y = (np.asarray(values[start : start + rows], np.float64) for values in (a, b))
        gap = gaps_of(x, y)
        largest = max(largest, float(gap.max(initial=0.0)))
        gaps += float(np.square(gap).sum())
        sizes += float(np.square(x, where=np.isfinite(x), out=np.zeros_like(x)).sum())
    return Difference(label, largest, float(np.sqrt(gaps / sizes if sizes else gaps / max(1, a.size))))


def gaps_of(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How far each number is from the other one; never NaN."""
    with np.errstate(invalid="ignore"):
        gap = np.abs(a - b)
    gap[(a == b) | (np.isnan(a) & np.isnan(b))] = 0
    gap[np.isnan(gap)] = np.inf
    return gap


def compare_scores(one: Model, other: Model, text: str) -> dict[str, float]:
    """Over the tokens of a text: how far scores are apart, and the mean KL of the second from the first, in nats."""
    if one.config.vocab != other.config.vocab:
        raise SystemExit(f"the models score {one.config.vocab} and {other.config.vocab} ids, which cannot be compared.")
    ids = one.tokenizer.encode(text).ids[None]
    if not ids.size:
        raise SystemExit("the text has no tokens; give a longer one.")
    if ids.max() >= one.config.vocab:
        raise SystemExit(f"the text has the token {ids.max()}, and the models score {one.config.vocab} ids.")
    rows = Rows(jnp.asarray(ids), jnp.arange(ids.shape[1])[None], jnp.ones_like(jnp.asarray(ids)))
    outputs = [jax.jit(lambda p, c=model.config: apply(c, p, rows))(model.params) for model in (one, other)]
    largest, divergence, same = 0.0, 0.0, 0
    for start in range(0, ids.shape[1], POSITIONS):
        a, b = (np.asarray(scores(o.hidden[0, start : start + POSITIONS], o.head), np.float64) for o in outputs)
        log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (a, b))
        largest = max(largest, float(np.abs(a - b).max()))
        divergence += float((np.exp(log_p) * (log_p - log_q)).sum())
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
    count = ids.shape[1]
    return {
        "tokens": count,
        "largest difference of scores": largest,
        "mean KL in nats": divergence / count,
        "same best token": same / count,
    }


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
