"""Qwen3-MoE: Qwen3 with mixtures of experts in the layers that its config names, and gated MLPs in the others.

Facts about files: `Qwen3MoeConfig` of transformers 4 and 5. Shares are renormalised where `norm_topk_prob` says so.
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
    mixture_of,
)
from jaxdistill.models.families.hf_fields import HF_ACTIVATIONS, Fields
from jaxdistill.models.families.hf_rope import rope_to_hf
from jaxdistill.models.families.llama import ATTENTION, GATED, IGNORED, PRE_NORMS, TABLES
from jaxdistill.models.families.mixtral import TRAINING, experts
from jaxdistill.models.families.qwen import HEAD_NORMS
from jaxdistill.specs import GatedMLP, LayerSpec, MixtureOfExperts, ModelConfig


def from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """Our config from a config.json of either layout. Raises ConfigError naming every field that it cannot honour."""
    f = Fields(fields)
    bias = f.flag("attention_bias", False)
    window = f.size_or_none("sliding_window", 4096)
    window = window if f.flag("use_sliding_window", False) else None
    options = {"bias": bias, "output_bias": bias, "qk_norm": "head", "window": window}
    mixer = attention_from_hf(f, kv_heads=4, rope=f.rope(), **options)
    activation = f.activation()
    mixture = MixtureOfExperts(
        experts=f.size("num_experts", f.size("num_local_experts", 128)),  # of transformers 4 and 5
        experts_per_token=f.size("num_experts_per_tok", 8),
        mlp=f.size("moe_intermediate_size", 768),
        activation=activation,
        renormalize=f.flag("norm_topk_prob", False),
    )
    dense = GatedMLP(mlp=f.size("intermediate_size", 6144), activation=activation)
    every, plain = f.size("decoder_sparse_step", 1), f.items("mlp_only_layers", int)
    layers = [
        LayerSpec(mixer=mixer, ffn=dense if layer in plain or (layer + 1) % every else mixture)
        for layer in range(f.depth(24))
    ]
    config = decoder_from_hf(f, "qwen3_moe", layers, epsilon=1e-6, max_length=32768)
    f.finish(ignored=(*TRAINING, "max_window_layers"))
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read alike."""
    mixer, ffn = attentions(config)[0], mixture_of(config)
    dense = [(i, x.ffn) for i, x in enumerate(config.layers) if isinstance(x.ffn, GatedMLP)]
    return {
        **decoder_to_hf(config),
        **rope_to_hf(mixer.rope),
        "attention_bias": mixer.bias,
        "decoder_sparse_step": 1,
        "hidden_act": HF_ACTIVATIONS[ffn.activation],
        "intermediate_size": dense[0][1].mlp if dense else 6144,
        "mlp_only_layers": [layer for layer, _ in dense],
        "moe_intermediate_size": ffn.mlp,
        "norm_topk_prob": ffn.renormalize,
        "num_experts": ffn.experts,
        "num_local_experts": ffn.experts,
        "num_experts_per_tok": ffn.experts_per_token,
        "sliding_window": mixer.window,
        "use_sliding_window": mixer.window is not None,
    }


NAMES = {ours: f"mlp.experts.@.{ours}_proj" for ours in ("gate", "up", "down")}
QWEN3_MOE = Family(
    hf_architecture="Qwen3MoeForCausalLM",
    from_hf=from_hf,
    to_hf=to_hf,
    tensors={**TABLES, **ATTENTION, **PRE_NORMS, **HEAD_NORMS, **experts("mlp.gate", NAMES)},
    dense=GATED,
    ignored=IGNORED,
)
