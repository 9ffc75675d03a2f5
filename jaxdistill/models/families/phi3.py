"""Phi-3 and Phi-4-mini: Llama whose projections lie in one tensor each, with LongRoPE and, in some, part of a head
rotated.

Facts about files: `Phi3Config` of transformers 4 and 5. LongRoPE divides frequencies by other factors in rows longer
than the original context; transformers looks at the largest position of a call, we at the length of rows (of the cache,
in generation), which a prompt does not change on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxdistill.models.families.family import ConfigError, Family, TensorNames
from jaxdistill.models.families.hf_decoder import (
    attention_from_hf,
    attentions,
    decoder_from_hf,
    decoder_to_hf,
    gated_to_hf,
)
from jaxdistill.models.families.hf_fields import Fields
from jaxdistill.models.families.hf_rope import longrope_attention, rope_to_hf
from jaxdistill.models.families.llama import ATTENTION, GATED, IGNORED, PRE_NORMS, TABLES
from jaxdistill.specs import GatedMLP, LayerSpec, LongRope, ModelConfig

OLDER_NAMES = {"su": "longrope", "yarn": "longrope"}
REQUIRED = {
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_bias": False},
    **{"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False},
}
"""Fields that are read only at this value; those of the second row are in the files of Phi-4-mini."""


def from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """Our config from a config.json of either layout. Raises ConfigError naming every field that it cannot honour."""
    f = Fields(fields)
    rope = f.rope(fraction=1.0, original=4096, names=OLDER_NAMES, kinds=("default", "longrope"))
    mixer = attention_from_hf(f, rope=rope, window=f.size_or_none("sliding_window"))
    ffn = GatedMLP(mlp=f.size("intermediate_size", 8192), activation=f.activation())
    layers = [LayerSpec(mixer=mixer, ffn=ffn)] * f.depth(32)
    config = decoder_from_hf(f, "phi3", layers, epsilon=1e-5, max_length=4096)
    f.finish(required=REQUIRED)
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read alike; only 5, if its attention factor is not the one that follows
    from its lengths."""
    mixer, ffn = attentions(config)[0], config.layers[0].ffn
    original, ropes = config.max_length, rope_to_hf(mixer.rope)
    if mixer.rope is not None and isinstance(scaling := mixer.rope.scaling, LongRope):
        original = scaling.original_length
        _check_factors(config, mixer.heads, mixer.rope.fraction, len(scaling.short))
        if scaling.attention_factor == longrope_attention(config.max_length / original, original):
            # Transformers 4 takes exactly these, and 5 these before those of rope_parameters.
            ropes["rope_scaling"] = {key: ropes["rope_scaling"][key] for key in ("type", "short_factor", "long_factor")}
    return {
        **decoder_to_hf(config),
        **gated_to_hf(ffn),
        **ropes,
        "original_max_position_embeddings": original,
        "sliding_window": mixer.window,
    }


def _check_factors(config: ModelConfig, heads: int, fraction: float, factors: int) -> None:
    """Refuses what transformers would not load: it counts them as if embed were heads * head_dim."""
    needed = int(config.embed // heads * fraction) // 2
    if factors != needed:
        raise ConfigError(
            f"LongRoPE has {factors} factors, and with embed {config.embed} and {heads} query heads transformers loads "
            f"a phi3 only with {needed}. Keep embed / heads when pruning."
        )


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
