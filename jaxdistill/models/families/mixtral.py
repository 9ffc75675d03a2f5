"""Mixtral: Llama with a mixture of experts in every layer, two of eight for each token.

Facts about files: `MixtralConfig` of transformers 4 and 5, whose checkpoints keep every expert's three matrices apart
(w1 gate, w3 up, w2 down). GGUF files of mixtures are not read.
"""

from __future__ import annotations

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
from jaxdistill.models.families.hf_common import REQUIRED
from jaxdistill.models.families.llama import (
    HANDLED,
    HF_ACTIVATIONS,
    LLAMA,
    WHAT,
    activation_from_hf,
    decoder_from_hf,
    decoder_to_hf,
)
from jaxdistill.specs import MixtureOfExperts, ModelConfig

HF_DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
HF_TRAINING = ("router_aux_loss_coef", "output_router_logits")
"""Of a loss that transformers adds in training."""
HF_REQUIRED = {"router_jitter_noise": 0.0, "attention_bias": False, "mlp_bias": False}
HF_ROPE_THETA = 1e6


def from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """Our config from a config.json of either layout. Raises ConfigError naming every field that it cannot honour."""
    handled = HANDLED | HF_DEFAULTS.keys() | set(HF_TRAINING)
    check_fields(WHAT, fields, handled=handled, required={**REQUIRED, **HF_REQUIRED})
    # Where the field is null, every query head has keys and values of its own.
    fields = {"num_key_value_heads": 8, **with_defaults(fields, HF_DEFAULTS), "attention_bias": False}
    rope = fields.get("rope_parameters") or {}
    if "rope_theta" not in rope and fields.get("rope_theta") is None:
        fields["rope_theta"] = HF_ROPE_THETA
    ffn = MixtureOfExperts(
        experts=required_field(WHAT, fields, "num_local_experts", int),
        experts_per_token=required_field(WHAT, fields, "num_experts_per_tok", int),
        mlp=required_field(WHAT, fields, "intermediate_size", int),
        activation=activation_from_hf(fields),
    )
    return decoder_from_hf("mixtral", fields, ffn)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read alike. Raises ConfigError for what Mixtral cannot be."""
    ffn, mixer = config.layers[0].ffn, config.layers[0].mixer
    if not isinstance(ffn, MixtureOfExperts) or not ffn.renormalize or mixer.bias or mixer.output_bias:
        raise ConfigError(
            f"the layers have {mixer} and {ffn}; Mixtral's have attention without bias and a mixture of experts whose "
            "shares are renormalized. Keep such a model as a checkpoint of ours."
        )
    return {
        **decoder_to_hf(config),
        "hidden_act": HF_ACTIVATIONS[ffn.activation],
        "intermediate_size": ffn.mlp,
        "num_experts_per_tok": ffn.experts_per_token,
        "num_local_experts": ffn.experts,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
    }


MIXTRAL = Family(
    hf_architecture="MixtralForCausalLM",
    gguf_architecture=None,
    from_hf=from_hf,
    to_hf=to_hf,
    from_gguf=None,
    tensors={
        **{name: row for name, row in LLAMA.tensors.items() if not name.startswith("layers.*.ffn.") or "norm" in name},
        "layers.*.ffn.router.kernel": TensorNames(
            axes="experts embed", hf="model.layers.*.block_sparse_moe.gate.weight"
        ),
        **{
            f"layers.*.ffn.{ours}.kernel": TensorNames(
                axes=axes, hf=f"model.layers.*.block_sparse_moe.experts.@.{theirs}.weight"
            )
            for ours, theirs, axes in (
                ("gate", "w1", "experts mlp embed"),
                ("up", "w3", "experts mlp embed"),
                ("down", "w2", "experts embed mlp"),
            )
        },
    },
    ignored=LLAMA.ignored,
)
