"""Nemotron-4 and Minitron 4B and 8B: LayerNorm of 1 + w with a bias, a squared ReLU without a gate, half of each head
rotated.

Facts about files: `NemotronConfig` of transformers 4 and 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxdistill.models.families.family import ConfigError, Family
from jaxdistill.models.families.hf_decoder import attention_from_hf, attentions, decoder_from_hf, decoder_to_hf
from jaxdistill.models.families.hf_fields import HF_ACTIVATIONS, Fields
from jaxdistill.models.families.hf_rope import rope_to_hf
from jaxdistill.models.families.llama import ATTENTION, IGNORED, PRE_NORMS, TABLES, linear
from jaxdistill.specs import LayerSpec, ModelConfig, Norm, PlainMLP


def from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """Our config from a config.json of either layout. Raises ConfigError naming every field that it cannot honour."""
    f = Fields(fields)
    bias, epsilon = f.flag("attention_bias", False), f.number("norm_eps", 1e-5)
    rope = f.rope(fraction=0.5, kinds=("default", "linear"))
    mixer = attention_from_hf(f, bias=bias, output_bias=bias, rope=rope)
    f.repeated("head_dim", mixer.head_dim, "kv_channels")
    f.repeated("partial_rotary_factor", rope.fraction, "rope_percent", "rope_percentage")
    ffn = PlainMLP(
        mlp=f.size("intermediate_size", 24576),
        activation=f.activation(default="relu2"),
        bias=f.flag("mlp_bias", False),
    )
    layers = [LayerSpec(mixer=mixer, ffn=ffn)] * f.depth(32)
    norm = Norm(kind="layer", one_plus=True, bias=True)
    config = decoder_from_hf(f, "nemotron", layers, epsilon=epsilon, max_length=4096, norm=norm)
    f.finish()
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read alike."""
    mixer, ffn = attentions(config)[0], config.layers[0].ffn
    if not isinstance(ffn, PlainMLP):
        raise ConfigError(f"the layers have {ffn}, and Nemotron's have an MLP without a gate.")
    fields = decoder_to_hf(config)
    epsilon, ropes = fields.pop("rms_norm_eps"), rope_to_hf(mixer.rope)
    fraction = 1.0 if mixer.rope is None else mixer.rope.fraction
    # Said even where it is 1: that is not the default here.
    ropes["rope_parameters"]["partial_rotary_factor"] = fraction
    return {
        **fields,
        **ropes,
        "attention_bias": mixer.bias,
        "hidden_act": HF_ACTIVATIONS[ffn.activation],
        "intermediate_size": ffn.mlp,
        "mlp_bias": ffn.bias,
        "norm_eps": epsilon,
        "partial_rotary_factor": fraction,
    }


NEMOTRON = Family(
    hf_architecture="NemotronForCausalLM",
    from_hf=from_hf,
    to_hf=to_hf,
    tensors={
        **TABLES,
        **ATTENTION,
        **PRE_NORMS,
        **linear("mlp embed", "ffn.up", "mlp.up_proj"),
        **linear("embed mlp", "ffn.down", "mlp.down_proj"),
    },
    ignored=IGNORED,
)
