"""Mixtral: Llama with a mixture of experts in every layer, two of eight for each token.

Facts about files: `MixtralConfig` of transformers 4 and 5, whose checkpoints keep every expert's three matrices apart
(w1 gate, w3 up, w2 down). GGUF files of mixtures are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxdistill.models.families.family import Family, TensorNames
from jaxdistill.models.families.hf_decoder import (
    attention_from_hf,
    attentions,
    decoder_from_hf,
    decoder_to_hf,
    mixture_of,
)
from jaxdistill.models.families.hf_fields import HF_ACTIVATIONS, Fields
from jaxdistill.models.families.hf_rope import rope_to_hf
from jaxdistill.models.families.llama import ATTENTION, IGNORED, PRE_NORMS, TABLES
from jaxdistill.specs import LayerSpec, MixtureOfExperts, ModelConfig

TRAINING = ("router_aux_loss_coef", "output_router_logits")
"""Of a loss that transformers adds in training."""


def from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """Our config from a config.json of either layout. Raises ConfigError naming every field that it cannot honour."""
    f = Fields(fields)
    mixer = attention_from_hf(f, kv_heads=8, rope=f.rope(theta=1e6), window=f.size_or_none("sliding_window"))
    ffn = MixtureOfExperts(
        experts=f.size("num_local_experts", 8),
        experts_per_token=f.size("num_experts_per_tok", 2),
        mlp=f.size("intermediate_size"),
        activation=f.activation(),
    )
    layers = [LayerSpec(mixer=mixer, ffn=ffn)] * f.depth()
    config = decoder_from_hf(f, "mixtral", layers, epsilon=1e-5, max_length=131072)
    f.finish(required={"router_jitter_noise": 0.0, "attention_bias": False, "mlp_bias": False}, ignored=TRAINING)
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read alike."""
    mixer, ffn = attentions(config)[0], mixture_of(config)
    return {
        **decoder_to_hf(config),
        **rope_to_hf(mixer.rope),
        "hidden_act": HF_ACTIVATIONS[ffn.activation],
        "intermediate_size": ffn.mlp,
        "num_experts_per_tok": ffn.experts_per_token,
        "num_local_experts": ffn.experts,
        "router_jitter_noise": 0.0,
        "sliding_window": mixer.window,
    }


def experts(router: str, names: Mapping[str, str]) -> dict[str, TensorNames]:
    """A router, and the matrices of experts: ours → names with "@" for the expert."""
    return {
        "layers.*.ffn.router.kernel": TensorNames(axes="experts embed", hf=f"model.layers.*.{router}.weight"),
        **{
            f"layers.*.ffn.{ours}.kernel": TensorNames(axes=axes, hf=f"model.layers.*.{names[ours]}.weight")
            for ours, axes in (
                ("gate", "experts mlp embed"),
                ("up", "experts mlp embed"),
                ("down", "experts embed mlp"),
            )
        },
    }


MIXTRAL = Family(
    hf_architecture="MixtralForCausalLM",
    from_hf=from_hf,
    to_hf=to_hf,
    tensors={
        **TABLES,
        **ATTENTION,
        **PRE_NORMS,
        **experts(
            "block_sparse_moe.gate",
            {ours: f"block_sparse_moe.experts.@.{w}" for ours, w in (("gate", "w1"), ("up", "w3"), ("down", "w2"))},
        ),
    },
    ignored=IGNORED,
)
