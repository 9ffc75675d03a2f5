"""Llama: pre-norm, RMSNorm, grouped-query attention with rotary positions, gated MLP. SmolLM and Minitron are too.

Facts about files: `LlamaConfig` of transformers 4 and 5, the conversion to GGUF of llama.cpp (it interleaves the rows
of query and key).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from jaxdistill.models.families.family import (
    ConfigError,
    Family,
    TensorNames,
    check_fields,
    required_field,
    with_defaults,
)
from jaxdistill.models.families.gguf_common import config_from_gguf
from jaxdistill.models.families.hf_common import HARMLESS, REQUIRED, rope_from_hf, rope_to_hf
from jaxdistill.specs import FFN, Activation, Attention, GatedMLP, LayerSpec, ModelConfig

HF_DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
WHAT = "config.json"
HF_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
HF_ROPE = ("rope_parameters", "rope_scaling", "rope_theta")
HANDLED = {
    *("model_type", "intermediate_size", "num_key_value_heads", "head_dim"),
    *(*HF_SIZES, *HF_ROPE, *HARMLESS),
}
"""Fields that every family of Llama's kind reads, or may ignore."""
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
HF_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2"}


def from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """Our config from a config.json of either layout. Raises ConfigError naming every field that it cannot honour."""
    check_fields(WHAT, fields, handled=HANDLED | HF_DEFAULTS.keys(), required=REQUIRED)
    fields = with_defaults(fields, HF_DEFAULTS)
    ffn = GatedMLP(
        mlp=required_field(WHAT, fields, "intermediate_size", int),
        activation=activation_from_hf(fields),
        bias=required_field(WHAT, fields, "mlp_bias", bool),
    )
    return decoder_from_hf("llama", fields, ffn)


def activation_from_hf(fields: Mapping[str, Any]) -> Activation:
    if fields["hidden_act"] not in ACTIVATIONS:
        raise ConfigError(f"{WHAT} has hidden_act = {fields['hidden_act']!r}; allowed are {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[fields["hidden_act"]]


def decoder_from_hf(family: str, fields: Mapping[str, Any], ffn: FFN) -> ModelConfig:
    """A decoder of Llama's kind with this feed-forward network in every layer, from the fields that describe the rest.

    Defaults that depend on no other field are already there.
    """
    what = WHAT
    vocab, embed, depth, heads = (required_field(what, fields, name, int) for name in HF_SIZES)
    fields = with_defaults(fields, {"num_key_value_heads": heads, "head_dim": embed // heads})
    bias = required_field(what, fields, "attention_bias", bool)
    mixer = Attention(
        heads=heads,
        kv_heads=required_field(what, fields, "num_key_value_heads", int),
        head_dim=required_field(what, fields, "head_dim", int),
        bias=bias,
        output_bias=bias,
        rope=rope_from_hf(fields),
    )
    return ModelConfig(
        family=family,
        vocab=vocab,
        embed=embed,
        layers=(LayerSpec(mixer=mixer, ffn=ffn),) * depth,
        tied=required_field(what, fields, "tie_word_embeddings", bool),
        norm_epsilon=required_field(what, fields, "rms_norm_eps", float),
        max_length=required_field(what, fields, "max_position_embeddings", int),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read alike. Raises ConfigError for what Llama cannot be."""
    ffn = config.layers[0].ffn
    if not isinstance(ffn, GatedMLP):
        raise ConfigError(f"the layers have {ffn}, and Llama's have one gated MLP. Give the model the family mixtral.")
    return {
        **decoder_to_hf(config),
        "attention_bias": config.layers[0].mixer.bias,
        "hidden_act": HF_ACTIVATIONS[ffn.activation],
        "intermediate_size": ffn.mlp,
        "mlp_bias": ffn.bias,
    }


def decoder_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The fields of all but the feed-forward network and the attention's bias, alike in families of this kind."""
    mixer = config.layers[0].mixer
    if mixer.bias != mixer.output_bias:
        raise ConfigError(
            f"the attention has bias = {mixer.bias} and output_bias = {mixer.output_bias}; a config.json of "
            f"{config.family} has one attention_bias for both. Give the model both or neither."
        )
    if config.embed % mixer.heads:
        raise ConfigError(
            f"embed is {config.embed} and there are {mixer.heads} query heads; transformers loads a {config.family} "
            "only if the first is a multiple of the second. Choose such sizes when pruning."
        )
    return {
        "attention_dropout": 0.0,
        "head_dim": mixer.head_dim,
        "hidden_size": config.embed,
        "max_position_embeddings": config.max_length,
        "num_attention_heads": mixer.heads,
        "num_hidden_layers": len(config.layers),
        "num_key_value_heads": mixer.kv_heads,
        "rms_norm_eps": config.norm_epsilon,
        **rope_to_hf(mixer.rope),
        "tie_word_embeddings": config.tied,
        "vocab_size": config.vocab,
    }


def _linear(kind: str, ours: str, hf: str, gguf: str, interleaved: str | None = None) -> dict[str, TensorNames]:
    """A projection of a layer and its bias; files keep weights as [out, in]."""
    rows = {
        part: TensorNames(
            axes=axes, hf=f"model.layers.*.{hf}.{suffix}", gguf=f"blk.*.{gguf}.{suffix}", gguf_interleaved=interleaved
        )
        for part, suffix, axes in (("kernel", "weight", kind), ("bias", "bias", kind.split()[0]))
    }
    return {f"layers.*.{ours}.{part}": row for part, row in rows.items()}


LLAMA = Family(
    hf_architecture="LlamaForCausalLM",
    gguf_architecture="llama",
    from_hf=from_hf,
    to_hf=to_hf,
    from_gguf=functools.partial(config_from_gguf, "llama"),
    tensors={
        "embedding.kernel": TensorNames(axes="vocab embed", hf="model.embed_tokens.weight", gguf="token_embd.weight"),
        "layers.*.mixer.norm.scale": TensorNames(
            axes="embed", hf="model.layers.*.input_layernorm.weight", gguf="blk.*.attn_norm.weight"
        ),
        **_linear("heads*head_dim embed", "mixer.query", "self_attn.q_proj", "attn_q", "head_dim"),
        **_linear("kv_heads*head_dim embed", "mixer.key", "self_attn.k_proj", "attn_k", "head_dim"),
        **_linear("kv_heads*head_dim embed", "mixer.value", "self_attn.v_proj", "attn_v"),
        **_linear("embed heads*head_dim", "mixer.output", "self_attn.o_proj", "attn_output"),
        "layers.*.ffn.norm.scale": TensorNames(
            axes="embed", hf="model.layers.*.post_attention_layernorm.weight", gguf="blk.*.ffn_norm.weight"
        ),
        **_linear("mlp embed", "ffn.gate", "mlp.gate_proj", "ffn_gate"),
        **_linear("mlp embed", "ffn.up", "mlp.up_proj", "ffn_up"),
        **_linear("embed mlp", "ffn.down", "mlp.down_proj", "ffn_down"),
        "final_norm.scale": TensorNames(axes="embed", hf="model.norm.weight", gguf="output_norm.weight"),
        "head.kernel": TensorNames(axes="vocab embed", hf="lm_head.weight", gguf="output.weight"),
    },
    ignored=(r".*\.rotary_emb\.inv_freq",),
)
