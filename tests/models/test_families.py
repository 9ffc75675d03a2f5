"""Configs of other formats: what is read, what is refused, and by which name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jaxdistill.models.cost import active_parameters
from jaxdistill.models.families import FAMILIES
from jaxdistill.models.families.family import ConfigError, Stored, from_stored, to_stored
from jaxdistill.models.families.llama import LLAMA
from jaxdistill.models.families.mixtral import MIXTRAL
from jaxdistill.models.schema import count_parameters, schema
from jaxdistill.specs import (
    Attention,
    GatedMLP,
    LayerSpec,
    LinearScaling,
    Llama3Scaling,
    MixtureOfExperts,
    ModelConfig,
    Rope,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_models"

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
"""The fields of a published model, written by transformers 4."""

SMOLLM2_CONFIG = ModelConfig(
    family="llama",
    vocab=49152,
    embed=576,
    layers=(
        LayerSpec(
            mixer=Attention(heads=9, kv_heads=3, head_dim=64, rope=Rope(theta=100_000.0)),
            ffn=GatedMLP(mlp=1536),
        ),
    )
    * 30,
    tied=True,
    norm_epsilon=1e-5,
    max_length=8192,
)

SMOLLM2_GGUF = {
    "general.architecture": "llama",
    "general.name": "anything",
    "llama.block_count": 30,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.rope.freq_base": 100000.0,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "llama.vocab_size": 49152,
    "llama.rope.dimension_count": 64,
    "tokenizer.ggml.model": "gpt2",
}

LLAMA3 = Llama3Scaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=8192)
LLAMA3_FIELDS = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def with_rope(config: ModelConfig, rope: Rope) -> ModelConfig:
    layer = dataclasses.replace(config.layers[0], mixer=dataclasses.replace(config.layers[0].mixer, rope=rope))
    return dataclasses.replace(config, layers=(layer,) * len(config.layers))


def without(fields: dict, *names: str) -> dict:
    return {k: v for k, v in fields.items() if k not in names}


def test_published_config_in_the_layout_of_transformers_4():
    assert LLAMA.from_hf(SMOLLM2) == SMOLLM2_CONFIG


def test_published_config_in_the_layout_of_transformers_5():
    fields = without(SMOLLM2, "rope_theta", "rope_scaling", "torch_dtype")
    fields |= {"dtype": "bfloat16", "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"}, "head_dim": 64}
    assert LLAMA.from_hf(fields) == SMOLLM2_CONFIG


def test_published_config_as_gguf_metadata():
    assert LLAMA.from_gguf(SMOLLM2_GGUF, {"token_embd.weight"}) == SMOLLM2_CONFIG


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({}, Rope(theta=10_000.0)),
        ({"rope_theta": 5e5}, Rope(theta=5e5)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, Rope(scaling=LinearScaling(factor=2.0))),
        ({"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.0}, "rope_theta": 7.0},
         Rope(theta=7.0, scaling=LinearScaling(factor=2.0))),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3_FIELDS}, "rope_theta": 5e5},
         Rope(theta=5e5, scaling=LLAMA3)),
        ({"rope_parameters": {"rope_type": "llama3", **LLAMA3_FIELDS, "rope_theta": 5e5}},
         Rope(theta=5e5, scaling=LLAMA3)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}, "rope_theta": 3.0}, Rope(theta=3.0)),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 3.0}, Rope(theta=3.0)),
        ({"rope_parameters": {"rope_theta": 3.0, "partial_rotary_factor": 1.0}}, Rope(theta=3.0)),
    ],
)  # fmt: skip
def test_rotary_embedding_of_either_layout(fields, rope):
    assert LLAMA.from_hf(without(SMOLLM2, "rope_theta", "rope_scaling") | fields) == with_rope(SMOLLM2_CONFIG, rope)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"a_field_from_the_future": 0}, "a_field_from_the_future"),
        ({"hidden_act": "xielu"}, "xielu"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "attention_factor": 1.2}}, "attention_factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "contradicts"),
    ],
)
def test_config_field_that_would_change_outputs_is_refused_by_name(fields, named):
    with pytest.raises(ConfigError, match=named):
        LLAMA.from_hf(SMOLLM2 | fields)


def test_all_refused_fields_are_named_at_once():
    with pytest.raises(ConfigError, match=r"attention_dropout.*pretraining_tp.*new_field"):
        LLAMA.from_hf(SMOLLM2 | {"attention_dropout": 0.1, "pretraining_tp": 2, "new_field": 1})


@pytest.mark.parametrize(
    ("fields", "tensors", "named"),
    [
        ({"llama.expert_count": 8}, (), "expert_count"),
        ({"llama.attention.sliding_window": 4096}, (), "sliding_window"),
        ({"llama.rope.scaling.type": "yarn"}, (), "yarn"),
        ({"llama.rope.dimension_count": 32}, (), "rope.dimension_count"),
        ({"llama.attention.head_count_kv": [3, 3]}, (), "head_count_kv"),
        ({"split.count": 2}, (), "2 parts"),
        ({}, ("rope_freqs.weight",), "rope_freqs.weight"),
    ],
)
def test_gguf_key_or_tensor_that_would_change_outputs_is_refused_by_name(fields, tensors, named):
    with pytest.raises(ConfigError, match=named):
        LLAMA.from_gguf(SMOLLM2_GGUF | fields, tensors)


def test_gguf_metadata_without_optional_keys():
    fields = without(SMOLLM2_GGUF, "llama.vocab_size", "llama.rope.freq_base", "llama.attention.head_count_kv")
    fields |= {"tokenizer.ggml.tokens": ["a", "b", "c"], "llama.rope.scaling.type": "linear"}
    fields |= {"llama.rope.scaling.factor": 0.30000001192092896 * 10}
    tensors = {"output.weight", "blk.0.attn_q.bias", "blk.0.ffn_up.bias"}
    config = LLAMA.from_gguf(fields, tensors)
    rope = Rope(theta=10_000.0, scaling=LinearScaling(factor=3.0))
    mixer = Attention(heads=9, kv_heads=9, head_dim=64, bias=True, output_bias=False, rope=rope)
    assert config.layers[7] == LayerSpec(mixer=mixer, ffn=GatedMLP(mlp=1536, bias=True))
    assert (config.vocab, config.tied) == (3, False)


@pytest.mark.parametrize("rope", [Rope(theta=3.5), Rope(scaling=LinearScaling(factor=2.0)), Rope(scaling=LLAMA3)])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_config_survives_writing_and_reading(rope, activation):
    config = with_rope(SMOLLM2_CONFIG, rope)
    layer = dataclasses.replace(config.layers[0], ffn=GatedMLP(mlp=100, activation=activation, bias=True))
    config = dataclasses.replace(config, layers=(layer,) * 3, tied=False, norm_epsilon=2e-6, max_length=77)
    fields = json.loads(json.dumps(LLAMA.to_hf(config)))
    assert LLAMA.from_hf(fields) == config
    # Readers of the old layout ignore rope_parameters, readers of the new one take it: both must find the same.
    assert LLAMA.from_hf(without(fields, "rope_parameters")) == config
    assert LLAMA.from_hf(without(fields, "rope_theta", "rope_scaling")) == config


@pytest.mark.parametrize("name", ["tied_wide_heads", "biases_linear", "llama3_rope"])
def test_written_config_equals_the_one_that_transformers_wrote(name):
    theirs = json.loads((GOLDEN / name / "config.json").read_text())
    ours = LLAMA.to_hf(LLAMA.from_hf(theirs))
    compared = set(ours) & set(theirs) - {"rope_scaling"}
    assert {"hidden_size", "rms_norm_eps", "tie_word_embeddings", "hidden_act"} <= compared
    assert {k: ours[k] for k in compared} == {k: theirs[k] for k in compared}


def test_model_that_llama_cannot_express_is_refused():
    mixer = SMOLLM2_CONFIG.layers[0].mixer
    for change, named in (({"bias": True}, "output_bias"), ({"heads": 12}, None), ({"heads": 15}, "multiple")):
        layer = dataclasses.replace(SMOLLM2_CONFIG.layers[0], mixer=dataclasses.replace(mixer, **change))
        config = dataclasses.replace(SMOLLM2_CONFIG, layers=(layer,))
        if named is None:
            assert LLAMA.to_hf(config)["num_attention_heads"] == 12
        else:
            with pytest.raises(ConfigError, match=named):
                LLAMA.to_hf(config)


def test_every_parameter_of_a_model_has_a_place_in_both_formats():
    mixer = Attention(heads=4, kv_heads=2, head_dim=6, bias=True, output_bias=True)
    layer = LayerSpec(mixer=mixer, ffn=GatedMLP(mlp=7, bias=True))
    config = ModelConfig(family="llama", vocab=11, embed=5, layers=(layer,) * 12, tied=False)
    expected_layer = {
        "self_attn.q_proj.weight": ("attn_q.weight", (24, 5)),
        "self_attn.q_proj.bias": ("attn_q.bias", (24,)),
        "self_attn.k_proj.weight": ("attn_k.weight", (12, 5)),
        "self_attn.k_proj.bias": ("attn_k.bias", (12,)),
        "self_attn.v_proj.weight": ("attn_v.weight", (12, 5)),
        "self_attn.v_proj.bias": ("attn_v.bias", (12,)),
        "self_attn.o_proj.weight": ("attn_output.weight", (5, 24)),
        "self_attn.o_proj.bias": ("attn_output.bias", (5,)),
        "mlp.gate_proj.weight": ("ffn_gate.weight", (7, 5)),
        "mlp.gate_proj.bias": ("ffn_gate.bias", (7,)),
        "mlp.up_proj.weight": ("ffn_up.weight", (7, 5)),
        "mlp.up_proj.bias": ("ffn_up.bias", (7,)),
        "mlp.down_proj.weight": ("ffn_down.weight", (5, 7)),
        "mlp.down_proj.bias": ("ffn_down.bias", (5,)),
        "input_layernorm.weight": ("attn_norm.weight", (5,)),
        "post_attention_layernorm.weight": ("ffn_norm.weight", (5,)),
    }
    expected = {
        "model.embed_tokens.weight": ("token_embd.weight", (11, 5)),
        "model.norm.weight": ("output_norm.weight", (5,)),
        "lm_head.weight": ("output.weight", (11, 5)),
    }
    for i in range(12):
        expected |= {f"model.layers.{i}.{hf}": (f"blk.{i}.{g}", shape) for hf, (g, shape) in expected_layer.items()}
    found = {}
    for name, spec in schema(config).items():
        sizes = dict(zip(spec.axes, spec.shape, strict=True))
        hf, gguf = LLAMA.hf_stored(name), LLAMA.gguf_stored(name)
        assert hf.shape(sizes) == gguf.shape(sizes)
        found[hf.name] = (gguf.name, hf.shape(sizes))
    assert found == expected


def test_projection_layout_by_hand():
    sizes = {"heads": 2, "head_dim": 2, "embed": 3}
    query = np.arange(12).reshape(4, 3)  # row h·2 + d: head h, dimension d
    ours = from_stored(LLAMA.hf_stored("layers.0.mixer.query.kernel"), ("embed", "heads", "head_dim"), sizes, query)
    assert ours.tolist() == [[[0, 3], [6, 9]], [[1, 4], [7, 10]], [[2, 5], [8, 11]]]
    output = np.arange(12).reshape(3, 4)
    ours = from_stored(LLAMA.hf_stored("layers.0.mixer.output.kernel"), ("heads", "head_dim", "embed"), sizes, output)
    assert ours.tolist() == [[[0, 4, 8], [1, 5, 9]], [[2, 6, 10], [3, 7, 11]]]


def test_llama_cpp_keeps_the_two_dimensions_of_a_rotation_together():
    stored = LLAMA.gguf_stored("layers.0.mixer.key.bias")
    # One head of six dimensions, of which i and i + 3 turn together: llama.cpp writes 0 3 1 4 2 5.
    ours = from_stored(stored, ("kv_heads", "head_dim"), {"kv_heads": 1, "head_dim": 6}, np.array([0, 3, 1, 4, 2, 5]))
    assert ours.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert LLAMA.gguf_stored("layers.0.mixer.value.bias").interleaved is None


@pytest.mark.parametrize("interleaved", [None, "b"])
def test_writing_a_tensor_undoes_reading_it(interleaved):
    stored = Stored("x", (("d",), ("a", "b"), ("c",)), interleaved)
    sizes = {"a": 3, "b": 4, "c": 2, "d": 5}
    tensor = np.random.default_rng(0).normal(size=(5, 12, 2))
    ours = from_stored(stored, ("c", "b", "a", "d"), sizes, tensor)
    assert ours.shape == (2, 4, 3, 5)
    np.testing.assert_array_equal(to_stored(stored, ("c", "b", "a", "d"), ours), tensor)


def test_table_is_keyed_by_the_model_types_of_its_families():
    assert FAMILIES == {"llama": LLAMA, "mixtral": MIXTRAL}
    assert (LLAMA.hf_architecture, MIXTRAL.hf_architecture) == ("LlamaForCausalLM", "MixtralForCausalLM")


MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
"""The fields of a published model."""


def test_a_published_mixtral():
    config = MIXTRAL.from_hf(MIXTRAL_8X7B)
    assert config.layers[0].ffn == MixtureOfExperts(experts=8, experts_per_token=2, mlp=14336)
    assert (config.layers[0].mixer.rope, config.embed, len(config.layers)) == (Rope(theta=1e6), 4096, 32)
    assert 46.70e9 < count_parameters(config) < 46.71e9  # as published: 46.7B, of which a token meets 12.9B
    assert 12.87e9 < active_parameters(config) < 12.89e9
    again = MIXTRAL.from_hf({**MIXTRAL.to_hf(config), "model_type": "mixtral"})
    assert again == config


def test_a_mixtral_without_its_fields_has_the_defaults_of_transformers():
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1}
    config = MIXTRAL.from_hf({"model_type": "mixtral", **sizes, "num_attention_heads": 8})
    assert config.layers[0].mixer == Attention(heads=8, kv_heads=8, head_dim=8, rope=Rope(theta=1e6))
    assert (config.layers[0].ffn.experts, config.tied, config.norm_epsilon) == (8, False, 1e-5)
    own_keys = MIXTRAL.from_hf(
        {"model_type": "mixtral", **sizes, "num_attention_heads": 4, "num_key_value_heads": None, "mlp_bias": False}
    )
    assert own_keys.layers[0].mixer.kv_heads == 4


@pytest.mark.parametrize(
    "change", [{"sliding_window": 4096}, {"router_jitter_noise": 0.1}, {"attention_bias": True}, {"mlp_bias": True}]
)
def test_what_a_mixtral_here_does_not_do_is_refused_by_name(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        MIXTRAL.from_hf(MIXTRAL_8X7B | change)


def test_layers_of_the_other_kind_are_not_written():
    mixture, llama = MIXTRAL.from_hf(MIXTRAL_8X7B), LLAMA.from_hf(SMOLLM2)
    with pytest.raises(ConfigError, match="Llama's have one gated MLP"):
        LLAMA.to_hf(mixture)
    with pytest.raises(ConfigError, match="Mixtral's have"):
        MIXTRAL.to_hf(llama)
    spec = dataclasses.replace(mixture.layers[0].ffn, renormalize=False)
    layer = dataclasses.replace(mixture.layers[0], ffn=spec)
    with pytest.raises(ConfigError, match="renormalized"):
        MIXTRAL.to_hf(dataclasses.replace(mixture, layers=(layer,)))
