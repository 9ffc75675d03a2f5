"""Qwen2: Llama with biases on query, key and value. Qwen3: norms of every query and key head instead. Either may have a
window in its last layers.

Facts about files: `Qwen2Config` and `Qwen3Config` of transformers 4 and 5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jaxdistill.models.families.hf_decoder import (
    attention_from_hf,
    attentions,
    decoder_from_hf,
    decoder_to_hf,
    gated_to_hf,
    layer_types_to_hf,
    window_of,
)
from jaxdistill.models.families.hf_fields import FULL, SLIDING, Fields
from jaxdistill.models.families.hf_rope import rope_to_hf
from jaxdistill.models.families.llama import ATTENTION, GATED, PRE_NORMS, TABLES, member, norm
from jaxdistill.specs import GatedMLP, LayerSpec, ModelConfig

Name = Literal["qwen2", "qwen3"]


def from_hf(family: Name, fields: Mapping[str, Any]) -> ModelConfig:
    """Our config from a config.json of either layout. Raises ConfigError naming every field that it cannot honour."""
    f = Fields(fields)
    if family == "qwen2":
        mixer = attention_from_hf(f, kv_heads=32, bias=True, rope=f.rope())
    else:
        bias = f.flag("attention_bias", False)
        options = {"bias": bias, "output_bias": bias, "qk_norm": "head"}
        mixer = attention_from_hf(f, kv_heads=32, head_dim=128, rope=f.rope(), **options)
    ffn = GatedMLP(mlp=f.size("intermediate_size", 22016), activation=f.activation())
    layers = [LayerSpec(mixer=dataclasses.replace(mixer, window=window), ffn=ffn) for window in windows(f)]
    config = decoder_from_hf(f, family, layers, epsilon=1e-6, max_length=32768)
    f.finish(required={"use_mrope": False})
    return config


def windows(f: Fields) -> list[int | None]:
    """Every layer's window: the last ones have one, where it is switched on."""
    depth = f.depth(32)
    window, first = f.size_or_none("sliding_window", 4096), f.count("max_window_layers", 28)
    if not f.flag("use_sliding_window", False):
        window = None
    kinds = f.layer_types(depth, window, lambda layer: SLIDING if window is not None and layer >= first else FULL)
    return [window if kind == SLIDING else None for kind in kinds]


def windows_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The fields of windows; older readers know a number of layers without one, newer ones a kind for every layer."""
    window, kinds = window_of(config), layer_types_to_hf(config)
    full = next((layer for layer, kind in enumerate(kinds) if kind == SLIDING), len(kinds))
    return {
        "layer_types": kinds,
        "max_window_layers": full,
        "sliding_window": window,
        "use_sliding_window": window is not None,
    }


def to_hf(family: Name, config: ModelConfig) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read alike."""
    mixer, ffn = attentions(config)[0], config.layers[0].ffn
    fields = {**decoder_to_hf(config), **gated_to_hf(ffn), **rope_to_hf(mixer.rope), **windows_to_hf(config)}
    return fields if family == "qwen2" else {**fields, "attention_bias": mixer.bias}


HEAD_NORMS = {
    **norm("mixer.query_norm", "self_attn.q_norm", axes="head_dim"),
    **norm("mixer.key_norm", "self_attn.k_norm", axes="head_dim"),
}
TENSORS = {**TABLES, **ATTENTION, **GATED, **PRE_NORMS}
QWEN2 = member("qwen2", "Qwen2ForCausalLM", from_hf, to_hf, TENSORS)
QWEN3 = member("qwen3", "Qwen3ForCausalLM", from_hf, to_hf, {**TENSORS, **HEAD_NORMS})
