"""Rotary embeddings as config.json files describe them: `rope_parameters` of transformers 5, or `rope_theta` and
`rope_scaling` before it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdistill.models.families.family import ConfigError, positive, required_field
from jaxdistill.specs import LinearScaling, Llama3Scaling, LongRope, Rope, Scaling, YarnScaling

WHAT = "config.json"
ROPE_KINDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
}


def rope_from_hf(
    fields: Mapping[str, Any],
    *,
    theta: float = 10_000.0,
    fraction: float | None = None,
    original: int | None = None,
    names: Mapping[str, str] | None = None,
    kinds: Sequence[str] = tuple(ROPE_KINDS),
) -> Rope:
    """The rotary embedding of a config.json: `rope_parameters` (transformers 5), or `rope_theta`/`rope_scaling`.

    theta, fraction: where the file does not say; without a fraction the family rotates whole heads. original: of a
    family that keeps original_max_position_embeddings beside these fields, where the file does not say it there; one
    among them is not read. names: older names of kinds. Where a file has both layouts, as ours do, they must say the
    same. Other kinds than these are refused.
    """
    top = fields.get("rope_theta")
    both = [
        (key, required_field(WHAT, fields, key, dict))
        for key in ("rope_parameters", "rope_scaling")
        if fields.get(key) is not None
    ]
    outer = {key: fields.get(key) for key in ("max_position_embeddings", "original_max_position_embeddings")}
    if outer["original_max_position_embeddings"] is None:
        outer["original_max_position_embeddings"] = original
    part = fields.get("partial_rotary_factor")
    outer["partial_rotary_factor"] = (fraction or 1.0) if part is None else part
    found = [
        _rope(key, rope, theta if top is None else top, outer, names or {}, kinds) for key, rope in both or [(WHAT, {})]
    ]
    if top is not None:
        found.append(dataclasses.replace(found[0], theta=positive(WHAT, fields, "rope_theta")))
    if fraction is None and found[0].fraction != 1.0:
        raise ConfigError(
            f"{WHAT} has partial_rotary_factor = {found[0].fraction}; allowed is 1: this family rotates whole heads."
        )
    if any(rope != found[0] for rope in found):
        raise ConfigError(
            f"config.json contradicts itself about the rotary embedding: {'; '.join(map(str, found))}. "
            "Keep rope_parameters alone, or rope_theta and rope_scaling alone."
        )
    return found[0]


def _rope(
    where: str,
    rope: dict[str, Any],
    theta: Any,
    outer: Mapping[str, Any],
    names: Mapping[str, str],
    kinds: Sequence[str],
) -> Rope:
    rope = {k: v for k, v in rope.items() if v is not None}
    given = [str(rope.pop(key)) for key in ("rope_type", "type") if key in rope]
    named = {names.get(kind, kind) for kind in given} or {"default"}
    kind = named.pop()
    if named or kind not in kinds:
        raise ConfigError(
            f"{where} has the rotary embedding {' / '.join(map(str, sorted({kind, *named})))!r}; allowed are "
            f"{', '.join(kinds)}. Use a model with one of these."
        )
    theta = positive(where, {"rope_theta": rope.pop("rope_theta", theta)}, "rope_theta")
    part = {"partial_rotary_factor": rope.pop("partial_rotary_factor", outer["partial_rotary_factor"])}
    fraction = required_field(where, part, "partial_rotary_factor", float)
    if not 0 < fraction <= 1:
        raise ConfigError(f"{where} has partial_rotary_factor = {fraction}; it is a share, above 0 and at most 1.")
    if unknown := set(rope) - set(ROPE_KINDS[kind]):
        raise ConfigError(
            f"{where} has the fields {sorted(unknown)}, which the rotary embedding {kind!r} does not have; "
            f"allowed are {ROPE_KINDS[kind]}. Remove them, or correct rope_type."
        )
    # Some families keep it beside the others.
    original = outer["original_max_position_embeddings"]
    if original is not None and "original_max_position_embeddings" in ROPE_KINDS[kind]:
        rope["original_max_position_embeddings"] = original
    return Rope(theta=theta, fraction=fraction, scaling=_scaling(where, kind, rope, outer))


def _scaling(where: str, kind: str, rope: dict[str, Any], outer: Mapping[str, Any]) -> Scaling | None:
    def number(name: str, default: float | None = None) -> float:
        return positive(where, {name: rope.get(name, default)}, name)

    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(factor=number("factor"))
    length = outer["max_position_embeddings"]
    original = required_field(
        where, {"original_max_position_embeddings": length, **rope}, "original_max_position_embeddings", int
    )
    if kind == "llama3":
        return Llama3Scaling(
            factor=number("factor"),
            low_frequency_factor=number("low_freq_factor"),
            high_frequency_factor=number("high_freq_factor"),
            original_length=original,
        )
    if kind == "yarn":
        factor = number("factor")
        return YarnScaling(
            factor=factor,
            original_length=original,
            beta_fast=number("beta_fast", 32.0),
            beta_slow=number("beta_slow", 1.0),
            attention_factor=number("attention_factor", _yarn_attention(where, factor, rope)),
            truncate=required_field(where, {"truncate": rope.get("truncate", True)}, "truncate", bool),
        )
    extended = {"max_position_embeddings": original if length is None else length}
    factor = number("factor", required_field(WHAT, extended, "max_position_embeddings", int) / original)
    return LongRope(
        short=_numbers(where, rope, "short_factor"),
        long=_numbers(where, rope, "long_factor"),
        original_length=original,
        attention_factor=number("attention_factor", longrope_attention(factor, original)),
    )


def longrope_attention(factor: float, original: int) -> float:
    """LongRoPE's attention factor where a file does not say it, for a context that is so many times the original."""
    return math.sqrt(1 + math.log(factor) / math.log(max(original, 2))) if factor > 1 else 1.0


def _yarn_attention(where: str, factor: float, rope: Mapping[str, Any]) -> float:
    def scale(times: float) -> float:
        return 0.1 * times * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(positive(where, rope, "mscale")) / scale(positive(where, rope, "mscale_all_dim"))
    return scale(1.0)


def _numbers(where: str, rope: Mapping[str, Any], name: str) -> tuple[float, ...]:
    found = rope.get(name)
    if not isinstance(found, list):
        raise ConfigError(f"{where} has {name} = {found!s:.80}; a list of positive numbers is needed. Correct it.")
    return tuple(positive(where, {f"{name}[{i}]": x}, f"{name}[{i}]") for i, x in enumerate(found))


def rope_to_hf(rope: Rope | None) -> dict[str, Any]:
    """Both layouts at once: a reader of the old one would otherwise silently fall back to theta = 10,000."""
    if rope is None:
        raise ConfigError("a layer does not rotate its queries and keys, and this family's do.")
    match rope.scaling:
        case None:
            kind: dict[str, Any] = {"rope_type": "default"}
        case LinearScaling() as s:
            kind = {"rope_type": "linear", "factor": s.factor}
        case Llama3Scaling() as s:
            kind = {
                "rope_type": "llama3",
                "factor": s.factor,
                "low_freq_factor": s.low_frequency_factor,
                "high_freq_factor": s.high_frequency_factor,
                "original_max_position_embeddings": s.original_length,
            }
        case YarnScaling() as s:
            kind = {
                "rope_type": "yarn",
                "factor": s.factor,
                "original_max_position_embeddings": s.original_length,
                "attention_factor": s.attention_factor,
                "beta_fast": s.beta_fast,
                "beta_slow": s.beta_slow,
                "truncate": s.truncate,
            }
        case LongRope() as s:
            kind = {
                "rope_type": "longrope",
                "original_max_position_embeddings": s.original_length,
                "attention_factor": s.attention_factor,
                "short_factor": list(s.short),
                "long_factor": list(s.long),
            }
    part = {} if rope.fraction == 1.0 else {"partial_rotary_factor": rope.fraction}
    # transformers before 4.43 knows the kind as "type".
    old = None if rope.scaling is None else {**kind, "type": kind["rope_type"]}
    return {
        "rope_parameters": {**kind, **part, "rope_theta": rope.theta},
        "rope_scaling": old,
        "rope_theta": rope.theta,
        **part,
    }
