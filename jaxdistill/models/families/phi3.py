"""Phi-3 and Phi-4-mini: Llama whose projections lie in one tensor each, with LongRoPE and, in some, part of a head
rotated.

Facts about files: `Phi3Config` of transformers 4 and 5. LongRoPE divides frequencies by other factors in rows longer
than the original context; transformers looks at the largest position of a call, we at the length of rows (of the cache,
in generation), which a prompt does not change on the way.
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
    gated_to_hf,
)
from jaxdistill.models.families.hf_fields import Fields
from jaxdistill.models.families.hf_rope import rope_to_hf
from jaxdistill.models.families.llama import ATTENTION, GATED, IGNORED, PRE_NORMS, TABLES
from jaxdistill.specs import GatedMLP, LayerSpec, LongRope, ModelConfig

OLDER_NAMES = {"su": "longrope", "yarn": "longrope"}


def from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """Our config from a config.json of either layout. Raises ConfigError naming every field that it cannot honour."""
    f = Fields(fields)
    rope = f.rope(fraction=1.0, names=OLDER_NAMES, kinds=("default", "longrope"))
    mixer = attention_from_hf(f, rope=rope, window=f.size_or_none("sliding_window"))
    ffn = GatedMLP(mlp=f.size("intermediate_size", 8192), activation=f.activation())
    layers = [LayerSpec(mixer=mixer, ffn=ffn)] * f.depth(32)
    config = decoder_from_hf(f, "phi3", layers, epsilon=1e-5, max_length=4096)
    f.finish(required={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_bias": False})
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read alike."""
    mixer, ffn = attentions(config)[0], config.layers[0].ffn
    scaling = None if mixer.rope is None else mixer.rope.scaling
    original = scaling.original_length if isinstance(scaling, LongRope) else config.max_length
    return {
        **decoder_to_hf(config),
        **gated_to_hf(ffn),
        **rope_to_hf(mixer.rope),
        "original_max_position_embeddings": original,
        "sliding_window": mixer.window,
    }


def _fused(names: tuple[str, ...], hf: str) -> dict[str, TensorNames]:
    """Kernels whose rows follow one another in one tensor."""
    ours, whole = {**ATTENTION, **GATED}, tuple(f"layers.*.{name}.kernel" for name in names)
    return {name: TensorNames(axes=ours[name].axes, hf=f"model.layers.*.{hf}.weight", fused=whole) for name in whole}


PHI3 = Family(
    hf_architecture="Phi3ForCausalLM",
    from_hf=from_hf,
    to_hf=to_hf,
    tensors={
        **TABLES,
        **ATTENTION,
        **GATED,
        **PRE_NORMS,
        **_fused(("mixer.query", "mixer.key", "mixer.value"), "self_attn.qkv_proj"),
        **_fused(("ffn.gate", "ffn.up"), "mlp.gate_up_proj"),
    },
    ignored=IGNORED,
)
