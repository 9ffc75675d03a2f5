"""SmolLM3: Llama in which every fourth layer does not rotate queries and keys.

Facts about files: `SmolLM3Config` of transformers 4 and 5; `no_rope_layers` is 1 where a layer does rotate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxdistill.models.families.family import ConfigError, Family
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
from jaxdistill.models.families.llama import ATTENTION, GATED, IGNORED, PRE_NORMS, TABLES
from jaxdistill.specs import GatedMLP, LayerSpec, ModelConfig


def from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """Our config from a config.json of either layout. Raises ConfigError naming every field that it cannot honour."""
    f = Fields(fields)
    depth, bias = f.depth(36), f.flag("attention_bias", False)
    mixer = attention_from_hf(f, kv_heads=4, bias=bias, output_bias=bias, rope=f.rope(theta=2e6))
    ffn = GatedMLP(mlp=f.size("intermediate_size", 11008), activation=f.activation(), bias=f.flag("mlp_bias", False))
    every = f.size("no_rope_layer_interval", 4)
    rotating = f.items("no_rope_layers", int, [int((layer + 1) % every != 0) for layer in range(depth)])
    if len(rotating) != depth or not {*rotating} <= {0, 1}:
        raise ConfigError(f"config.json has no_rope_layers {rotating}; allowed are 0 and 1, one for each of {depth}.")
    window = f.size_or_none("sliding_window")
    window = window if f.flag("use_sliding_window", False) else None
    kinds = f.layer_types(depth, window, lambda layer: SLIDING if window is not None and not rotating[layer] else FULL)
    layers = [
        LayerSpec(
            mixer=dataclasses.replace(
                mixer, rope=mixer.rope if rotates else None, window=window if kind == SLIDING else None
            ),
            ffn=ffn,
        )
        for rotates, kind in zip(rotating, kinds, strict=True)
    ]
    config = decoder_from_hf(f, "smollm3", layers, epsilon=1e-6, max_length=32768, tied=True)
    f.finish(ignored=("max_window_layers", "pretraining_tp"))  # in published files, and read by nobody
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read alike."""
    mixer, ffn = attentions(config)[0], config.layers[0].ffn
    window = window_of(config)
    return {
        **decoder_to_hf(config),
        **gated_to_hf(ffn),
        **rope_to_hf(next((mixer.rope for mixer in attentions(config) if mixer.rope is not None), None)),
        "attention_bias": mixer.bias,
        "layer_types": layer_types_to_hf(config),
        "mlp_bias": getattr(ffn, "bias", False),
        "no_rope_layers": [int(mixer.rope is not None) for mixer in attentions(config)],
        "sliding_window": window,
        "use_sliding_window": window is not None,
    }


SMOLLM3 = Family(
    hf_architecture="SmolLM3ForCausalLM",
    from_hf=from_hf,
    to_hf=to_hf,
    tensors={**TABLES, **ATTENTION, **GATED, **PRE_NORMS},
    ignored=IGNORED,
)
