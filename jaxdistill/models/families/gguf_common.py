"""GGUF metadata to our config, for architectures of grouped-query attention and gated MLPs.

Facts about files: the key list of the ggml project and what llama.cpp's converters write.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jaxdistill.models.attention import rope_frequencies
from jaxdistill.models.families.family import (
    ConfigError,
    ReadTensor,
    check_fields,
    depth_of,
    positive,
    required_field,
    with_defaults,
)
from jaxdistill.specs import Attention, GatedMLP, LayerSpec, LinearScaling, Llama3Scaling, ModelConfig, Rope

HANDLED = (
    *("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length", "rope.freq_base"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor"),
)
HARMLESS = ("tensor_data_layout", "rope.scaling.original_context_length", "rope.scaling.finetuned")
"""Fields that change nothing: llama.cpp's layout note, and lengths that "none" and "linear" scaling do not use."""

REQUIRED = {"expert_count": 0, "expert_used_count": 0}

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor by whose entries rotary frequencies are divided."""

LLAMA_31 = Llama3Scaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=8192)
"""The rule of Llama 3.1 to 3.3, in some of them with another factor."""

NO_RULE = "which do not say by which rule. Use the safetensors checkpoint of this model: its config.json does."


def config_from_gguf(
    family: str, metadata: Mapping[str, Any], tensors: Collection[str], read: ReadTensor
) -> ModelConfig:
    """Our config from GGUF metadata; ties and biases show in which tensors are there.

    family: ours, and the architecture's name in the keys. read: reads a tensor. Raises ConfigError naming every field
    that it cannot honour.
    """
    what, prefix = f"the GGUF metadata under {family}", f"{family}."
    fields = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    check_fields(what, fields, handled={*HANDLED, *HARMLESS}, required=REQUIRED)
    if factors := sorted(n for n in tensors if n.startswith("rope_") and n != ROPE_FACTORS):
        raise ConfigError(f"the GGUF file scales its rotary frequencies by {factors}, {NO_RULE}")
    if metadata.get("split.count", 1) != 1:
        raise ConfigError(
            f"the GGUF file is one of {metadata['split.count']} parts; whole files are read. "
            "Join them with llama.cpp's llama-gguf-split --merge."
        )
    embed, heads = (required_field(what, fields, name, int) for name in ("embedding_length", "attention.head_count"))
    defaults = {
        "attention.head_count_kv": heads,
        "attention.key_length": embed // heads,
        "rope.freq_base": 10_000.0,
        "vocab_size": len(metadata.get("tokenizer.ggml.tokens", ())),
    }
    fields = with_defaults(fields, defaults)
    head_dim = required_field(what, fields, "attention.key_length", int)
    for name in ("attention.value_length", "rope.dimension_count"):
        if fields.get(name, head_dim) != head_dim:
            raise ConfigError(f"{what} has {name} = {fields[name]}; allowed is {head_dim}, the length of a key.")
    rope = _rope(what, fields)
    if ROPE_FACTORS in tensors:
        rope = _llama3(rope, head_dim, read(ROPE_FACTORS))
    mixer = Attention(
        heads=heads,
        kv_heads=required_field(what, fields, "attention.head_count_kv", int),
        head_dim=head_dim,
        bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        rope=rope,
    )
    ffn = GatedMLP(mlp=required_field(what, fields, "feed_forward_length", int), bias="blk.0.ffn_up.bias" in tensors)
    return ModelConfig(
        family=family,
        vocab=required_field(what, fields, "vocab_size", int),
        embed=embed,
        layers=(LayerSpec(mixer=mixer, ffn=ffn),) * depth_of(what, fields, "block_count"),
        tied="output.weight" not in tensors,
        norm_epsilon=_decimal(required_field(what, fields, "attention.layer_norm_rms_epsilon", float)),
        max_length=required_field(what, fields, "context_length", int),
    )


def _rope(what: str, fields: Mapping[str, Any]) -> Rope:
    theta = _decimal(positive(what, fields, "rope.freq_base"))
    match fields.get("rope.scaling.type", "none"):
        case "none":
            return Rope(theta=theta)
        case "linear":
            factor = _decimal(positive(what, fields, "rope.scaling.factor"))
            return Rope(theta=theta, scaling=LinearScaling(factor=factor))
        case other:
            raise ConfigError(f"{what} has rope.scaling.type = {other!r}; allowed are 'none' and 'linear'.")


def _llama3(rope: Rope, head_dim: int, factors: np.ndarray) -> Rope:
    """The rule behind factors, which files do not say: that of Llama 3.1 to 3.3, if it gives these factors. What long
    wavelengths are divided by is the largest of them."""
    if rope.scaling is None and factors.shape == (head_dim // 2,) and 1 <= np.max(factors) < np.inf:
        scaling = dataclasses.replace(LLAMA_31, factor=_decimal(np.max(factors)))
        scaled = dataclasses.replace(rope, scaling=scaling)
        plain, divided = (rope_frequencies(one, head_dim, length=1) for one in (rope, scaled))
        # Writers compute the ramp in float32.
        if np.allclose(plain / divided, factors, rtol=1e-4, atol=0):
            return scaled
    shown = np.array2string(factors.reshape(-1), threshold=6, precision=6)
    raise ConfigError(
        f"the GGUF file divides its rotary frequencies by {ROPE_FACTORS} = {shown} of shape {factors.shape}; allowed "
        f"are the {head_dim // 2} factors of Llama 3.1 to 3.3 without another scaling: these are others, {NO_RULE}"
    )


def _decimal(value: float) -> float:
    """The shortest decimal that is this float32: GGUF keeps 1e-05 as 9.99999974e-06."""
    return float(str(np.float32(value)))
