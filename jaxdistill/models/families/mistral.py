"""Mistral: Llama with a window in every layer, in the first version; later ones have none.

Facts about files: `MistralConfig` of transformers 4 and 5. A file without `sliding_window` has one of 4,096.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxdistill.models.families.family import Family
from jaxdistill.models.families.hf_decoder import (
    attention_from_hf,
    attentions,
    decoder_from_hf,
    decoder_to_hf,
    gated_to_hf,
)
from jaxdistill.models.families.hf_fields import Fields
from jaxdistill.models.families.hf_rope import rope_to_hf
from jaxdistill.models.families.llama import ATTENTION, GATED, IGNORED, PRE_NORMS, TABLES
from jaxdistill.specs import GatedMLP, LayerSpec, ModelConfig


def from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """Our config from a config.json of either layout. Raises ConfigError naming every field that it cannot honour."""
    f = Fields(fields)
    mixer = attention_from_hf(f, kv_heads=8, rope=f.rope(), window=f.size_or_none("sliding_window", 4096))
    ffn = GatedMLP(mlp=f.size("intermediate_size", 14336), activation=f.activation())
    layers = [LayerSpec(mixer=mixer, ffn=ffn)] * f.depth(32)
    config = decoder_from_hf(f, "mistral", layers, epsilon=1e-6, max_length=131072)
    f.finish()
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read alike."""
    mixer, ffn = attentions(config)[0], config.layers[0].ffn
    return {**decoder_to_hf(config), **gated_to_hf(ffn), **rope_to_hf(mixer.rope), "sliding_window": mixer.window}


MISTRAL = Family(
    hf_architecture="MistralForCausalLM",
    from_hf=from_hf,
    to_hf=to_hf,
    tensors={**TABLES, **ATTENTION, **GATED, **PRE_NORMS},
    ignored=IGNORED,
)
