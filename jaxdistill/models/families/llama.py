"""Llama: pre-norm, RMSNorm, grouped-query attention with rotary positions, gated MLP. SmolLM and Minitron are too.

Facts about files: `LlamaConfig` of transformers 4 and 5, the conversion to GGUF of llama.cpp (it interleaves the rows
of query and key).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxdistill.models.families.family import Family, TensorNames
from jaxdistill.models.families.gguf_common import ROPE_FACTORS, config_from_gguf
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
from jaxdistill.specs import GatedMLP, LayerSpec, ModelConfig


def from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """Our config from a config.json of either layout. Raises ConfigError naming every field that it cannot honour."""
    f = Fields(fields)
    bias = f.flag("attention_bias", False)
    mixer = attention_from_hf(f, bias=bias, output_bias=bias, rope=f.rope())
    ffn = GatedMLP(mlp=f.size("intermediate_size"), activation=f.activation(), bias=f.flag("mlp_bias", False))
    layers = [LayerSpec(mixer=mixer, ffn=ffn)] * f.depth()
    config = decoder_from_hf(f, "llama", layers, epsilon=1e-6, max_length=2048)
    # Some writers leave these of other families in.
    f.finish(required={"use_sliding_window": False})
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
        "mlp_bias": getattr(ffn, "bias", False),
    }


def linear(kind: str, ours: str, hf: str, gguf: str = "", interleaved: str | None = None) -> dict[str, TensorNames]:
    """A projection of a layer and its bias; files keep weights as [out, in]."""
    rows = {
        part: TensorNames(
            axes=axes,
            hf=f"model.layers.*.{hf}.{suffix}",
            gguf=gguf and f"blk.*.{gguf}.{suffix}",
            gguf_interleaved=interleaved,
        )
        for part, suffix, axes in (("kernel", "weight", kind), ("bias", "bias", kind.split()[0]))
    }
    return {f"layers.*.{ours}.{part}": row for part, row in rows.items()}


def norm(ours: str, hf: str, gguf: str = "", axes: str = "embed") -> dict[str, TensorNames]:
    """The scale and bias of a norm of a layer."""
    return {
        f"layers.*.{ours}.{part}": TensorNames(
            axes=axes, hf=f"model.layers.*.{hf}.{suffix}", gguf=gguf and f"blk.*.{gguf}.{suffix}"
        )
        for part, suffix in (("scale", "weight"), ("bias", "bias"))
    }


def member(
    name: str,
    architecture: str,
    from_hf: Callable[[Any, Mapping[str, Any]], ModelConfig],
    to_hf: Callable[[Any, ModelConfig], dict[str, Any]],
    tensors: Mapping[str, TensorNames],
) -> Family:
    """One of several families in a file, whose functions take its name first."""
    return Family(
        hf_architecture=architecture,
        from_hf=functools.partial(from_hf, name),
        to_hf=functools.partial(to_hf, name),
        tensors=tensors,
        ignored=IGNORED,
    )


TABLES = {
    "embedding.kernel": TensorNames(axes="vocab embed", hf="model.embed_tokens.weight", gguf="token_embd.weight"),
    "final_norm.scale": TensorNames(axes="embed", hf="model.norm.weight", gguf="output_norm.weight"),
    "final_norm.bias": TensorNames(axes="embed", hf="model.norm.bias"),
    "head.kernel": TensorNames(axes="vocab embed", hf="lm_head.weight", gguf="output.weight"),
}
ATTENTION = {
    **linear("heads*head_dim embed", "mixer.query", "self_attn.q_proj", "attn_q", "head_dim"),
    **linear("kv_heads*head_dim embed", "mixer.key", "self_attn.k_proj", "attn_k", "head_dim"),
    **linear("kv_heads*head_dim embed", "mixer.value", "self_attn.v_proj", "attn_v"),
    **linear("embed heads*head_dim", "mixer.output", "self_attn.o_proj", "attn_output"),
}
GATED = {
    **linear("mlp embed", "ffn.gate", "mlp.gate_proj", "ffn_gate"),
    **linear("mlp embed", "ffn.up", "mlp.up_proj", "ffn_up"),
    **linear("embed mlp", "ffn.down", "mlp.down_proj", "ffn_down"),
}
PRE_NORMS = {
    **norm("mixer.norm", "input_layernorm", "attn_norm"),
    **norm("ffn.norm", "post_attention_layernorm", "ffn_norm"),
}
IGNORED = (r".*\.rotary_emb\.inv_freq",)

LLAMA = Family(
    hf_architecture="LlamaForCausalLM",
    gguf_architecture="llama",
    from_hf=from_hf,
    to_hf=to_hf,
    from_gguf=functools.partial(config_from_gguf, "llama"),
    tensors={**TABLES, **ATTENTION, **GATED, **PRE_NORMS},
    ignored=(*IGNORED, re.escape(ROPE_FACTORS)),
)
