"""Configs of other formats: what is read, what is refused, and by which name."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from jaxdistill.models.cost import active_parameters
from jaxdistill.models.export import check_exportable
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
    Norm,
    Rope,
    YarnScaling,
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


def unread(name: str) -> np.ndarray:
    raise AssertionError(f"{name} was read")


def without(fields: dict, *names: str) -> dict:
    return {k: v for k, v in fields.items() if k not in names}


def test_published_config_in_the_layout_of_transformers_4():
    assert LLAMA.from_hf(SMOLLM2) == SMOLLM2_CONFIG


def test_published_config_in_the_layout_of_transformers_5():
    fields = without(SMOLLM2, "rope_theta", "rope_scaling", "torch_dtype")
    fields |= {"dtype": "bfloat16", "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"}, "head_dim": 64}
    assert LLAMA.from_hf(fields) == SMOLLM2_CONFIG


def test_published_config_as_gguf_metadata():
    assert LLAMA.from_gguf(SMOLLM2_GGUF, {"token_embd.weight"}, unread) == SMOLLM2_CONFIG


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
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "short_factor": [1.0]}}, "short_factor"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "short_factor"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "proportional"),
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
        ({}, ("rope_factors_long.weight",), "rope_factors_long.weight"),
    ],
)
def test_gguf_key_or_tensor_that_would_change_outputs_is_refused_by_name(fields, tensors, named):
    with pytest.raises(ConfigError, match=named):
        LLAMA.from_gguf(SMOLLM2_GGUF | fields, tensors, unread)


def test_gguf_metadata_without_optional_keys():
    fields = without(SMOLLM2_GGUF, "llama.vocab_size", "llama.rope.freq_base", "llama.attention.head_count_kv")
    fields |= {"tokenizer.ggml.tokens": ["a", "b", "c"], "llama.rope.scaling.type": "linear"}
    fields |= {"llama.rope.scaling.factor": 0.30000001192092896 * 10}
    tensors = {"output.weight", "blk.0.attn_q.bias", "blk.0.ffn_up.bias"}
    config = LLAMA.from_gguf(fields, tensors, unread)
    rope = Rope(theta=10_000.0, scaling=LinearScaling(factor=3.0))
    mixer = Attention(heads=9, kv_heads=9, head_dim=64, bias=True, output_bias=False, rope=rope)
    assert config.layers[7] == LayerSpec(mixer=mixer, ffn=GatedMLP(mlp=1536, bias=True))
    assert (config.vocab, config.tied) == (3, False)


LLAMA_32_GGUF = {
    "llama.block_count": 16,
    "llama.context_length": 131072,
    "llama.embedding_length": 2048,
    "llama.feed_forward_length": 8192,
    "llama.attention.head_count": 32,
    "llama.attention.head_count_kv": 8,
    "llama.attention.key_length": 64,
    "llama.attention.value_length": 64,
    "llama.rope.freq_base": 500000.0,
    "llama.rope.dimension_count": 64,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "llama.vocab_size": 128256,
}
"""Of Llama 3.2 1B."""


def llama3_factors(factor: float, *, original: int = 8192) -> np.ndarray:
    """By how much the rule of Llama 3.1 divides each frequency of Llama 3.2 1B, as float32."""
    found = []
    for i in range(32):
        turns = np.float32(original * 500_000.0 ** (-i / 32) / (2 * math.pi))
        kept = (turns - 1) / np.float32(3)
        found.append(1.0 if turns > 4 else factor if turns < 1 else 1 / (kept + (1 - kept) / factor))
    return np.array(found, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0, 3.3])
def test_gguf_files_of_llama_3_1_to_3_3_hold_factors_of_their_frequencies(factor):
    factors = llama3_factors(factor)
    assert len({*factors.tolist()}) > 4  # some are on the ramp
    config = LLAMA.from_gguf(LLAMA_32_GGUF, {"rope_freqs.weight"}, {"rope_freqs.weight": factors}.__getitem__)
    assert config.layers[0].mixer.rope == Rope(theta=5e5, scaling=dataclasses.replace(LLAMA3, factor=factor))
    assert count_parameters(config) == 1_235_814_400


@pytest.mark.parametrize(
    ("factors", "fields"),
    [
        (llama3_factors(32.0, original=8000), {}),
        (llama3_factors(32.0) * np.linspace(1, 1.01, 32, dtype=np.float32), {}),
        (llama3_factors(32.0)[:16], {}),
        (np.full(32, np.nan, np.float32), {}),
        (np.zeros(32, np.float32), {}),
        (llama3_factors(32.0), {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}),
    ],
)
def test_other_factors_in_a_gguf_file_are_refused(factors, fields):
    with pytest.raises(ConfigError, match=r"rope_freqs.weight = .*Llama 3.1 to 3.3.*config.json"):
        LLAMA.from_gguf(LLAMA_32_GGUF | fields, {"rope_freqs.weight"}, {"rope_freqs.weight": factors}.__getitem__)


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


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bias": True}, "output_bias=False.* and would be .*output_bias=True"),
        ({"heads": 12}, None),
        ({"heads": 15}, "multiple"),
        ({"window": 5}, "window=5"),
        ({"qk_norm": "head"}, "qk_norm='head'"),
        ({"scale": 0.1}, "scale=0.1"),
        ({"rope": None}, "does not rotate"),
        ({"rope": Rope(fraction=0.5)}, "rotates whole heads"),
    ],
)
def test_attention_that_llama_cannot_express_is_refused(change, named):
    layer = SMOLLM2_CONFIG.layers[0]
    layer = dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, **change))
    config = dataclasses.replace(SMOLLM2_CONFIG, layers=(layer,))
    if named is None:
        assert check_exportable(config)["num_attention_heads"] == 12
    else:
        with pytest.raises(ConfigError, match=named):
            check_exportable(config)


@pytest.mark.parametrize("change", [{"soft_cap": 30.0}, {"norm": Norm(one_plus=True)}, {"norm": Norm(kind="layer")}])
def test_what_llama_has_no_field_for_is_refused(change):
    with pytest.raises(ConfigError, match=f"{next(iter(change))} is .* and would be"):
        check_exportable(dataclasses.replace(SMOLLM2_CONFIG, **change))


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
        hf, gguf = LLAMA.hf_stored(config, name), LLAMA.gguf_stored(config, name)
        assert hf.shape(sizes) == gguf.shape(sizes)
        found[hf.name] = (gguf.name, hf.shape(sizes))
    assert found == expected


def test_projection_layout_by_hand():
    sizes = {"heads": 2, "head_dim": 2, "embed": 3}
    query = np.arange(12).reshape(4, 3)  # row h·2 + d: head h, dimension d
    stored = LLAMA.hf_stored(SMOLLM2_CONFIG, "layers.0.mixer.query.kernel")
    ours = from_stored(stored, ("embed", "heads", "head_dim"), sizes, query)
    assert ours.tolist() == [[[0, 3], [6, 9]], [[1, 4], [7, 10]], [[2, 5], [8, 11]]]
    output = np.arange(12).reshape(3, 4)
    stored = LLAMA.hf_stored(SMOLLM2_CONFIG, "layers.0.mixer.output.kernel")
    ours = from_stored(stored, ("heads", "head_dim", "embed"), sizes, output)
    assert ours.tolist() == [[[0, 4, 8], [1, 5, 9]], [[2, 6, 10], [3, 7, 11]]]


def test_llama_cpp_keeps_the_two_dimensions_of_a_rotation_together():
    stored = LLAMA.gguf_stored(SMOLLM2_CONFIG, "layers.0.mixer.key.bias")
    # One head of six dimensions, of which i and i + 3 turn together: llama.cpp writes 0 3 1 4 2 5.
    ours = from_stored(stored, ("kv_heads", "head_dim"), {"kv_heads": 1, "head_dim": 6}, np.array([0, 3, 1, 4, 2, 5]))
    assert ours.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert LLAMA.gguf_stored(SMOLLM2_CONFIG, "layers.0.mixer.value.bias").interleaved is None


@pytest.mark.parametrize("interleaved", [None, "b"])
def test_writing_a_tensor_undoes_reading_it(interleaved):
    stored = Stored("x", (("d",), ("a", "b"), ("c",)), interleaved)
    sizes = {"a": 3, "b": 4, "c": 2, "d": 5}
    tensor = np.random.default_rng(0).normal(size=(5, 12, 2))
    ours = from_stored(stored, ("c", "b", "a", "d"), sizes, tensor)
    assert ours.shape == (2, 4, 3, 5)
    np.testing.assert_array_equal(to_stored(stored, ("c", "b", "a", "d"), ours), tensor)


PUBLISHED = {
    # Mistral 7B v0.1
    "mistral": ({
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "hidden_act": "silu",
    }, 7_241_732_096),
    # Qwen2.5 0.5B
    "qwen2": ({
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "sliding_window": 32768, "max_window_layers": 24, "use_sliding_window": False,
        "use_mrope": False, "tie_word_embeddings": True, "hidden_act": "silu", "attention_dropout": 0.0,
    }, 494_032_768),
    # Qwen3 0.6B
    "qwen3": ({
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
        "max_window_layers": 28, "rms_norm_eps": 1e-6, "rope_theta": 1000000, "rope_scaling": None,
        "sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": True, "attention_bias": False,
    }, 596_049_920),
    # Gemma 2B
    "gemma": ({
        "vocab_size": 256000, "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
        "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "gelu", "attention_bias": False,
    }, 2_506_172_416),
    # Gemma 2 2B
    "gemma2": ({
        "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "cache_implementation": "hybrid",
    }, 2_614_341_888),
    # Gemma 2 9B
    "gemma2 9B": ({
        "vocab_size": 256000, "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_size": 4096,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "cache_implementation": "hybrid", "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "attention_bias": False,
    }, 9_241_705_984),
    # Gemma 3 1B
    "gemma3_text": ({
        "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "max_position_embeddings": 32768,
        "query_pre_attn_scalar": 256, "sliding_window": 512, "sliding_window_pattern": 6,
        "rope_local_base_freq": 10000, "rope_theta": 1000000, "rope_scaling": None, "attn_logit_softcapping": None,
        "final_logit_softcapping": None, "hidden_activation": "gelu_pytorch_tanh",
    }, 999_885_952),
    # Phi-3-mini with a long context (its factors are left out)
    "phi3": ({
        "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "sliding_window": 262144, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_bias": False,
        "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
    }, 3_821_079_552),
    # Phi-4-mini (its factors are left out)
    "phi3 4-mini": ({
        "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 24, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "sliding_window": 262144, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attention_bias": False, "mlp_bias": False, "lm_head_bias": False, "full_attn_mod": 1,
        "interpolate_factor": 1, "tie_word_embeddings": True,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
    }, 3_836_021_760),
    # OLMo 2 1B
    "olmo2": ({
        "vocab_size": 100352, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "rope_theta": 500000, "tie_word_embeddings": False,
    }, 1_484_916_736),
    # Minitron 4B
    "nemotron": ({
        "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 9216, "num_hidden_layers": 32,
        "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 4096,
        "norm_eps": 1e-5, "partial_rotary_factor": 0.5, "rope_theta": 10000, "hidden_act": "relu2",
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
    }, 4_190_509_056),
    # SmolLM3 3B
    "smollm3": ({
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 65536, "rms_norm_eps": 1e-6,
        "rope_theta": 5000000.0, "rope_scaling": None, "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9, "layer_types": ["full_attention"] * 36, "max_window_layers": 28,
        "use_sliding_window": False, "sliding_window": None, "attention_bias": False, "mlp_bias": False,
        "pretraining_tp": 2,
    }, 3_075_098_624),
    # Qwen3 30B A3B
    "qwen3_moe": ({
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 40960,
        "max_window_layers": 48, "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8, "rope_theta": 1000000.0,
        "rope_scaling": None, "sliding_window": None, "use_sliding_window": False, "output_router_logits": False,
        "router_aux_loss_coef": 0.001, "tie_word_embeddings": False,
    }, 30_532_122_624),
}  # fmt: skip
"""Fields of published models as transformers 4 wrote them, and how many parameters their pages say they have; by
family, and what else it takes to tell them apart."""


LONG = PUBLISHED["phi3"][0]["rope_scaling"]
WINDOWED = ["full_attention"] * 27 + ["sliding_attention"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_published_number_of_parameters(name):
    fields, parameters = PUBLISHED[name]
    family = FAMILIES[name.split()[0]]
    config = family.from_hf(fields)
    assert config.family == name.split()[0]
    assert count_parameters(config) == parameters
    assert family.from_hf(json.loads(json.dumps(check_exportable(config)))) == config


def test_every_family_has_a_published_model():
    assert {*FAMILIES} == {"llama", "mixtral", *(name.split()[0] for name in PUBLISHED)}


def test_windows_and_rotations_of_gemma_3():
    config = FAMILIES["gemma3_text"].from_hf(PUBLISHED["gemma3_text"][0])
    kinds = [(spec.mixer.window, spec.mixer.rope.theta) for spec in config.layers]
    assert kinds == ([(512, 1e4)] * 5 + [(None, 1e6)]) * 4 + [(512, 1e4)] * 2
    assert config.homogeneous


def test_windows_of_the_last_layers_of_qwen_2():
    fields, _ = PUBLISHED["qwen2"]
    config = FAMILIES["qwen2"].from_hf(fields | {"use_sliding_window": True, "max_window_layers": 20})
    assert [spec.mixer.window for spec in config.layers] == [None] * 20 + [32768] * 4
    kinds = ["sliding_attention"] * 3 + ["full_attention"] * 21
    config = FAMILIES["qwen2"].from_hf(fields | {"use_sliding_window": True, "layer_types": kinds})
    assert [spec.mixer.window for spec in config.layers] == [32768] * 3 + [None] * 21
    assert FAMILIES["qwen2"].from_hf(check_exportable(config)) == config


def test_attention_factors_of_longer_contexts():
    """Of YaRN 0.1 ln s + 1, of LongRoPE √(1 + ln s / ln original), unless a file says them."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    found = LLAMA.from_hf(SMOLLM2 | {"rope_scaling": yarn}).layers[0].mixer.rope.scaling
    assert found == YarnScaling(factor=4.0, original_length=32768, attention_factor=0.1 * math.log(4) + 1)
    both = LLAMA.from_hf(SMOLLM2 | {"rope_scaling": yarn | {"mscale": 1.0, "mscale_all_dim": 1.0}})
    assert both.layers[0].mixer.rope.scaling.attention_factor == 1.0
    long = FAMILIES["phi3"].from_hf(PUBLISHED["phi3"][0]).layers[0].mixer.rope.scaling
    assert long.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    given = FAMILIES["phi3"].from_hf(
        PUBLISHED["phi3"][0] | {"rope_scaling": PUBLISHED["phi3"][0]["rope_scaling"] | {"attention_factor": 1.5}}
    )
    assert given.layers[0].mixer.rope.scaling.attention_factor == 1.5


@pytest.mark.parametrize(
    ("name", "fields", "named"),
    [
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {"use_mrope": True}, "use_mrope"),
        ("qwen2", {"layer_types": ["linear_attention"] * 24}, "linear_attention"),
        ("qwen3", {"layer_types": ["full_attention"]}, "one for each of 28"),
        ("qwen3", {"layer_types": WINDOWED}, r"no window.* use_sliding_window is False"),
        ("qwen3", {"layer_types": WINDOWED, "use_sliding_window": True}, "sliding_window is None"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 36}, "no window"),
        ("gemma", {"hidden_act": "silu"}, "gelu_pytorch_tanh"),
        ("gemma", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu'; allowed: gelu_pytorch_tanh"),
        ("gemma", {"sliding_window_size": 4096}, "sliding_window_size"),
        ("gemma2", {"sliding_window": None}, "no window"),
        ("gemma2 9B", {"sliding_window_size": 4095}, "sliding_window_size = 4095, and sliding_window is 4096"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_theta": 7.0}}}, "rope_local_base_freq"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "longrope"),
        ("phi3", {"rope_scaling": LONG | {"short_factor": [True] * 48}}, r"short_factor\[0\] = True"),
        ("phi3", {"rope_scaling": LONG | {"short_factor": [1.0] * 47 + [math.inf]}}, r"short_factor\[47\] = inf"),
        ("phi3", {"rope_scaling": LONG | {"long_factor": [0.0] * 48}}, r"long_factor\[0\] = 0.0"),
        ("phi3 4-mini", {"full_attn_mod": 2}, "full_attn_mod"),
        ("phi3 4-mini", {"interpolate_factor": 4}, "interpolate_factor"),
        ("phi3 4-mini", {"lm_head_bias": True}, "lm_head_bias"),
        ("phi3 4-mini", {"mlp_bias": True}, "mlp_bias"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv"),
        ("nemotron", {"partial_rotary_factor": 0.0}, "partial_rotary_factor"),
        ("nemotron", {"kv_channels": 64}, "kv_channels = 64, and head_dim is 128"),
        ("nemotron", {"rope_percent": 1.0}, "rope_percent = 1.0, and partial_rotary_factor is 0.5"),
        ("nemotron", {"rope_percentage": True}, "rope_percentage"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size"),
        ("qwen3_moe", {"num_experts": 2**31 - 1}, "num_experts.* at most 100000"),
        ("qwen3_moe", {"num_experts": 2084}, "2084 experts .* each of 48 layers"),
    ],
)  # fmt: skip
def test_what_a_family_does_not_do_is_refused_by_name(name, fields, named):
    with pytest.raises(ConfigError, match=named):
        FAMILIES[name.split()[0]].from_hf(PUBLISHED[name][0] | fields)


@pytest.mark.parametrize(
    ("name", "fields", "named"),
    [
        # Part of a head, but not in pairs: 3 of 6 dimensions, of which transformers rotates 4.
        ("nemotron", {"head_dim": 6}, "is 3 rotated"),
        ("phi3", {"rope_scaling": LONG | {"short_factor": [3.0]}}, r"'short_factor': 1, .* 48 are needed"),
        ("phi3", {"rope_scaling": LONG | {"long_factor": [3.0] * 49}}, r"'long_factor': 49\}; 48 are needed"),
    ],
)
def test_rotations_that_cannot_be_are_refused(name, fields, named):
    with pytest.raises(ValueError, match=named):
        FAMILIES[name].from_hf(PUBLISHED[name][0] | fields)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("nemotron", {"kv_channels": 128, "rope_percent": 0.5, "rope_percentage": 0.5}),
        ("nemotron", {"kv_channels": None, "rope_percent": None}),
        ("gemma", {"hidden_activation": "gelu_pytorch_tanh"}),
        ("gemma", {"hidden_activation": None}),
    ],
)
def test_other_names_of_a_field_change_nothing(name, fields):
    family, published = FAMILIES[name], PUBLISHED[name][0]
    assert family.from_hf(published | fields) == family.from_hf(published)


@pytest.mark.parametrize("given", [{}, {"original_max_position_embeddings": 8192}])
def test_the_original_context_of_a_phi_is_not_among_the_fields_of_its_scaling(given):
    """transformers has a default beside them, and takes it before what is among them."""
    fields = without(PUBLISHED["phi3"][0], "original_max_position_embeddings")
    rope = FAMILIES["phi3"].from_hf(fields | {"rope_scaling": LONG | given}).layers[0].mixer.rope
    assert rope == FAMILIES["phi3"].from_hf(PUBLISHED["phi3"][0]).layers[0].mixer.rope
    assert rope.scaling.original_length == 4096


def test_the_scaling_of_a_phi_is_written_for_transformers_4_too():
    """It takes three fields and no other; an attention factor of its own is for transformers 5 alone."""
    config = FAMILIES["phi3"].from_hf(PUBLISHED["phi3"][0])
    written = check_exportable(config)
    assert written["rope_scaling"] == {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    own = FAMILIES["phi3"].from_hf(PUBLISHED["phi3"][0] | {"rope_scaling": LONG | {"attention_factor": 1.5}})
    assert check_exportable(own)["rope_scaling"]["attention_factor"] == 1.5


def test_a_phi_that_transformers_would_count_other_factors_for_is_not_written():
    config = FAMILIES["phi3"].from_hf(PUBLISHED["phi3"][0])
    with pytest.raises(ConfigError, match=r"48 factors.* embed 1536 and 32 query heads .* only with 24"):
        check_exportable(dataclasses.replace(config, embed=1536))


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_a_gemma_without_windows_is_written_with_one_all_the_same(name):
    """transformers makes its mask before it looks for layers with one."""
    fields = PUBLISHED[name][0] | {"layer_types": ["full_attention"] * 26}
    config = FAMILIES[name].from_hf(fields)
    assert {spec.mixer.window for spec in config.layers} == {None}
    assert check_exportable(config)["sliding_window"] == 4096


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
    "change",
    [{"router_jitter_noise": 0.1}, {"attention_bias": True}, {"mlp_bias": True}, {"num_local_experts": 2**31 - 1}],
)
def test_what_a_mixtral_here_does_not_do_is_refused_by_name(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        MIXTRAL.from_hf(MIXTRAL_8X7B | change)


def test_layers_of_the_other_kind_are_not_written():
    mixture, llama = MIXTRAL.from_hf(MIXTRAL_8X7B), LLAMA.from_hf(SMOLLM2)
    with pytest.raises(ConfigError, match="this family's have one gated MLP"):
        LLAMA.to_hf(mixture)
    with pytest.raises(ConfigError, match="this family's have a mixture"):
        MIXTRAL.to_hf(llama)
    spec = dataclasses.replace(mixture.layers[0].ffn, renormalize=False)
    layer = dataclasses.replace(mixture.layers[0], ffn=spec)
    with pytest.raises(ConfigError, match="renormalize=False"):
        check_exportable(dataclasses.replace(mixture, layers=(layer,)))
