"""OLMo 2: norms of what layers add instead of what they read, and of all query and all key heads together.

Facts about files: `Olmo2Config` of transformers 4 and 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxdistill.models.families.family import Family
from jaxdistill.models.families.hf_decoder import (
    attention_from_hf,
    attentions,
    check_heads_divide,
    decoder_from_hf,
    decoder_to_hf,
    gated_to_hf,
)
from jaxdistill.models.families.hf_fields import Fields
from jaxdistill.models.families.hf_rope import rope_to_hf
from jaxdistill.models.families.llama import ATTENTION, GATED, IGNORED, TABLES, norm
from jaxdistill.specs import GatedMLP, LayerSpec, ModelConfig


def from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """Our config from a config.json of either layout. Raises ConfigError naming every field that it cannot honour."""
    f = Fields(fields)
    bias = f.flag("attention_bias", False)
    mixer = attention_from_hf(f, bias=bias, output_bias=bias, rope=f.rope(), qk_norm="all")
    ffn = GatedMLP(mlp=f.size("intermediate_size", 11008), activation=f.activation())
    layers = [LayerSpec(mixer=mixer, ffn=ffn, norms="post")] * f.depth(32)
    config = decoder_from_hf(f, "olmo2", layers, epsilon=1e-5, max_length=2048)
    f.finish()
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read alike."""
    check_heads_divide(config)
    mixer, ffn = attentions(config)[0], config.layers[0].ffn
    return {
        **decoder_to_hf(config),
        **gated_to_hf(ffn),
        **rope_to_hf(mixer.rope),
        "attention_bias": mixer.bias,
    }


OLMO2 = Family(
    hf_architecture="Olmo2ForCausalLM",
    from_hf=from_hf,
    to_hf=to_hf,
    tensors={
        **TABLES,
        **ATTENTION,
        **GATED,
        **norm("mixer.post_norm", "post_attention_layernorm"),
        **norm("ffn.post_norm", "post_feedforward_layernorm"),
        **norm("mixer.query_norm", "self_attn.q_norm", axes="heads*head_dim"),
        **norm("mixer.key_norm", "self_attn.k_norm", axes="kv_heads*head_dim"),
    },
    ignored=IGNORED,
)
