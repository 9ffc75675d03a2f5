"""Decoders as config.json files describe them: what all families have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxdistill.models.families.family import MAX_EXPERTS, ConfigError, required_field
from jaxdistill.models.families.hf_fields import FULL, HF_ACTIVATIONS, SLIDING, Fields
from jaxdistill.models.families.hf_rope import WHAT
from jaxdistill.specs import FFN, Attention, GatedMLP, LayerSpec, MixtureOfExperts, ModelConfig


def attention_from_hf(f: Fields, *, kv_heads: int | None = None, head_dim: int | None = None, **more: Any) -> Attention:
    """Attention as all families describe it. kv_heads, head_dim: where the fields are absent; None is as many as query
    heads, and embed / heads. more: what else its spec has."""
    heads = f.size("num_attention_heads")
    default_dim = head_dim or f.size("hidden_size") // heads
    name = "num_key_value_heads"
    groups = f.get(name, kv_heads)
    return Attention(
        heads=heads,
        kv_heads=heads if groups is None else required_field(WHAT, {name: groups}, name, int),
        head_dim=f.size("head_dim", max(default_dim, 1)),
        **more,
    )


def decoder_from_hf(
    f: Fields,
    family: str,
    layers: Sequence[LayerSpec],
    *,
    epsilon: float,
    max_length: int,
    tied: bool = False,
    **more: Any,
) -> ModelConfig:
    """A decoder of these layers, from the fields that describe the rest; epsilon, max_length, tied: their defaults."""
    _check_experts(layers)
    return ModelConfig(
        family=family,
        vocab=f.size("vocab_size"),
        embed=f.size("hidden_size"),
        layers=tuple(layers),
        tied=f.flag("tie_word_embeddings", tied),
        norm_epsilon=f.number("rms_norm_eps", epsilon),
        max_length=f.size("max_position_embeddings", max_length),
        **more,
    )


def _check_experts(layers: Sequence[LayerSpec]) -> None:
    """Bounded as layers are, since every expert gets a description before a tensor is read."""
    counts = [spec.ffn.experts for spec in layers if isinstance(spec.ffn, MixtureOfExperts)]
    if sum(counts) > MAX_EXPERTS:
        raise ConfigError(
            f"{WHAT} has {max(counts)} experts (num_local_experts, num_experts) in each of {len(counts)} layers; at "
            f"most {MAX_EXPERTS} in all layers together are read. Correct it."
        )


def attentions(config: ModelConfig) -> list[Attention]:
    """Every layer's attention. Raises ConfigError where one has none."""
    found = [spec.mixer for spec in config.layers if spec.mixer is not None]
    if len(found) < len(config.layers):
        raise ConfigError("a layer has no attention, and this family's have.")
    return found


def decoder_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The fields that all families have, of the first layer where layers may differ."""
    mixer = attentions(config)[0]
    return {
        "attention_dropout": 0.0,
        "head_dim": mixer.head_dim,
        "hidden_size": config.embed,
        "max_position_embeddings": config.max_length,
        "num_attention_heads": mixer.heads,
        "num_hidden_layers": len(config.layers),
        "num_key_value_heads": mixer.kv_heads,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "vocab_size": config.vocab,
    }


def gated_to_hf(ffn: FFN | None, activation: str = "hidden_act") -> dict[str, Any]:
    """The fields of a gated MLP. Raises ConfigError for what is none."""
    if not isinstance(ffn, GatedMLP):
        raise ConfigError(f"the layers have {ffn}, and this family's have one gated MLP.")
    return {activation: HF_ACTIVATIONS[ffn.activation], "intermediate_size": ffn.mlp}


def mixture_of(config: ModelConfig) -> MixtureOfExperts:
    """What the layers with a mixture have. Raises ConfigError where there is none."""
    found = [spec.ffn for spec in config.layers if isinstance(spec.ffn, MixtureOfExperts)]
    if not found:
        raise ConfigError(f"the layers have {config.layers[0].ffn}, and this family's have a mixture of experts.")
    return found[0]


def layer_types_to_hf(config: ModelConfig) -> list[str]:
    return [FULL if mixer.window is None else SLIDING for mixer in attentions(config)]


def window_of(config: ModelConfig) -> int | None:
    """The window of the layers that have one."""
    return next((mixer.window for mixer in attentions(config) if mixer.window is not None), None)


def check_heads_divide(config: ModelConfig) -> None:
    """Refuses what transformers would not load."""
    heads = attentions(config)[0].heads
    if config.embed % heads:
        raise ConfigError(
            f"embed is {config.embed} and there are {heads} query heads; transformers loads a {config.family} "
            "only if the first is a multiple of the second. Choose such sizes when pruning."
        )
