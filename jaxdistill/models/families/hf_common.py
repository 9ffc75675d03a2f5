"""What config.json files of all families share: fields without influence on the outputs, and rotary embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxdistill.models.families.family import ConfigError, required_field
from jaxdistill.specs import LinearScaling, Llama3Scaling, Rope

_ORIGIN = """
    _name_or_path name_or_path architectures transformers_version dtype torch_dtype _commit_hash is_llama_config
    unsloth_version unsloth_fixed transformers.js_config initializer_range use_cache return_dict torchscript
    _attn_implementation attn_implementation _attn_implementation_autoset _flash_attn_2_enabled output_attentions
    output_hidden_states use_bfloat16 tf_legacy_loss gradient_checkpointing
"""
_GENERATION = """
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id tokenizer_class prefix
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
"""
_OTHER_TASKS = "id2label label2id num_labels problem_type finetuning_task task_specific_params"

HARMLESS = frozenset(" ".join((_ORIGIN, _GENERATION, _OTHER_TASKS)).split())
"""Fields that change nothing about the scores of a decoder: who wrote the file and how it is held in memory; ids and
settings for generation, which belong to the tokenizer and to whoever generates; heads for other tasks."""

REQUIRED: Mapping[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "pretraining_tp": 1,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "use_sliding_window": False,
}
"""Fields that are read only at this value, which is their default."""

ROPE_KINDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def rope_from_hf(fields: Mapping[str, Any]) -> Rope:
    """The rotary embedding of a config.json: `rope_parameters` (transformers 5), or `rope_theta`/`rope_scaling`.

    Where a file has both, as ours do, they must say the same. Kinds other than `ROPE_KINDS` are refused.
    """
    top = fields.get("rope_theta")
    found = [
        _rope(key, dict(fields[key]), top) for key in ("rope_parameters", "rope_scaling") if fields.get(key) is not None
    ] or [_rope("config.json", {}, top)]
    if top is not None:
        found.append(dataclasses.replace(found[0], theta=float(top)))
    if any(rope != found[0] for rope in found):
        raise ConfigError(
            f"config.json contradicts itself about the rotary embedding: {'; '.join(map(str, found))}. "
            "Keep rope_parameters alone, or rope_theta and rope_scaling alone."
        )
    return found[0]


def _rope(where: str, rope: dict[str, Any], top_theta: Any) -> Rope:
    rope = {k: v for k, v in rope.items() if v is not None}
    named = {rope.pop(key) for key in ("rope_type", "type") if key in rope} or {"default"}
    kind = named.pop()
    if named or kind not in ROPE_KINDS:
        raise ConfigError(
            f"{where} has the rotary embedding {' / '.join(map(str, sorted({kind, *named})))!r}; allowed are "
            f"{', '.join(ROPE_KINDS)}. Use a model with one of these."
        )
    theta = rope.pop("rope_theta", 10_000.0 if top_theta is None else top_theta)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{where} has a partial_rotary_factor; allowed is 1: the whole head is rotated.")
    if unknown := set(rope) - set(ROPE_KINDS[kind]):
        raise ConfigError(
            f"{where} has the fields {sorted(unknown)}, which the rotary embedding {kind!r} does not have; "
            f"allowed are {ROPE_KINDS[kind]}. Remove them, or correct rope_type."
        )
    theta = required_field(where, {"rope_theta": theta}, "rope_theta", float)
    match kind:
        case "linear":
            return Rope(theta=theta, scaling=LinearScaling(factor=required_field(where, rope, "factor", float)))
        case "llama3":
            scaling = Llama3Scaling(
                factor=required_field(where, rope, "factor", float),
                low_frequency_factor=required_field(where, rope, "low_freq_factor", float),
                high_frequency_factor=required_field(where, rope, "high_freq_factor", float),
                original_length=required_field(where, rope, "original_max_position_embeddings", int),
            )
            return Rope(theta=theta, scaling=scaling)
        case _:
            return Rope(theta=theta)


def rope_to_hf(rope: Rope) -> dict[str, Any]:
    """Both layouts at once: a reader of the old one would otherwise silently fall back to theta = 10,000."""
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
    # transformers before 4.43 knows the kind as "type".
    old = None if rope.scaling is None else {**kind, "type": kind["rope_type"]}
    return {"rope_parameters": {**kind, "rope_theta": rope.theta}, "rope_scaling": old, "rope_theta": rope.theta}
