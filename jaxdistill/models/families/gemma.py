"""Gemma 1, 2 and 3 (text): embeddings scaled by the root of their width, norms of 1 + w, a GELU gate, a tied head.

Gemma 2 adds norms of what layers add, windows in every other layer and caps of scores; Gemma 3 windows in five of six
layers, which rotate by another base, and norms of query and key heads instead of caps.

Facts about files: `GemmaConfig`, `Gemma2Config` and `Gemma3TextConfig` of transformers 4 and 5.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxdistill.models.families.family import ConfigError, required_field
from jaxdistill.models.families.hf_decoder import (
    attention_from_hf,
    attentions,
    check_heads_divide,
    decoder_from_hf,
    decoder_to_hf,
    gated_to_hf,
    layer_types_to_hf,
    window_of,
)
from jaxdistill.models.families.hf_fields import FULL, SLIDING, Fields
from jaxdistill.models.families.hf_rope import WHAT, rope_from_hf, rope_to_hf
from jaxdistill.models.families.llama import ATTENTION, GATED, PRE_NORMS, TABLES, member, norm
from jaxdistill.models.families.qwen import HEAD_NORMS
from jaxdistill.specs import Attention, GatedMLP, LayerSpec, ModelConfig, Norm, Rope

Name = Literal["gemma", "gemma2", "gemma3_text"]
DEFAULTS: Mapping[Name, Mapping[str, Any]] = {
    "gemma": {"kv_heads": 16, "depth": 28, "mlp": 24576, "max_length": 8192},
    "gemma2": {"kv_heads": 4, "depth": 26, "mlp": 9216, "max_length": 8192, "every": 2, "caps": (50.0, 30.0)},
    "gemma3_text": {"kv_heads": 4, "depth": 26, "mlp": 9216, "max_length": 131072, "every": 6, "caps": (None, None)},
}
"""Where a file does not say: every which layer has no window, and the caps of attention's and the head's scores."""
LOCAL_THETA, GLOBAL_THETA = 10_000.0, 1_000_000.0
"""Of Gemma 3, where a file does not say."""
WINDOW = 4096
"""Of Gemma 2 and 3, where a file does not say; transformers wants one even if no layer has it."""


def from_hf(family: Name, fields: Mapping[str, Any]) -> ModelConfig:
    """Our config from a config.json of either layout. Raises ConfigError naming every field that it cannot honour."""
    f, default = Fields(fields), DEFAULTS[family]
    bias = f.flag("attention_bias", False)
    options = {"kv_heads": default["kv_heads"], "head_dim": 256, "bias": bias, "output_bias": bias}
    attention = functools.partial(attention_from_hf, f, **options)
    more = {"norm": Norm(one_plus=True), "embed_scale": f.size("hidden_size") ** 0.5, "tied": True}
    depth, mlp = f.depth(default["depth"]), f.size("intermediate_size", default["mlp"])
    if family == "gemma":
        _check_gelu(f)
        ffn = GatedMLP(mlp=mlp, activation="gelu_tanh")
        layers = [LayerSpec(mixer=attention(rope=f.rope()), ffn=ffn)] * depth
    else:
        ffn = GatedMLP(mlp=mlp, activation=f.activation("hidden_activation", "gelu_pytorch_tanh"))
        layers = _layers(f, family, attention, ffn, depth)
        more["soft_cap"] = f.number_or_none("final_logit_softcapping", default["caps"][1])
    config = decoder_from_hf(f, family, layers, epsilon=1e-6, max_length=default["max_length"], **more)
    f.finish(ignored=("hidden_act",))  # Gemma 2 and 3 have their own field
    return config


def _layers(f: Fields, family: Name, attention: Callable[..., Attention], ffn: GatedMLP, depth: int) -> list[LayerSpec]:
    """Layers with and without a window, in turn."""
    default, third = DEFAULTS[family], family == "gemma3_text"
    every = default["every"]
    if third:  # of transformers 4 and 5
        every = f.size("sliding_window_pattern", f.size("_sliding_window_pattern", every))
    ropes = _ropes(f) if third else dict.fromkeys((FULL, SLIDING), f.rope())
    window = f.size_or_none("sliding_window", WINDOW)
    f.repeated("sliding_window", window, "sliding_window_size")
    windows = {FULL: None, SLIDING: window}
    options = {
        "scale": f.number("query_pre_attn_scalar", 256.0) ** -0.5,
        "soft_cap": f.number_or_none("attn_logit_softcapping", default["caps"][0]),
        "qk_norm": "head" if third else None,
    }
    kinds = {
        kind: LayerSpec(mixer=attention(rope=ropes[kind], window=windows[kind], **options), ffn=ffn, norms="both")
        for kind in (FULL, SLIDING)
    }
    found = f.layer_types(depth, window, lambda layer: SLIDING if (layer + 1) % every else FULL)
    return [kinds[kind] for kind in found]


def _check_gelu(f: Fields) -> None:
    """The first files say "gelu" for its approximation in hidden_act. The newer field means what it says, to versions
    of transformers that read it."""
    approximation = "gelu_pytorch_tanh"
    for name, allowed in (("hidden_act", (approximation, "gelu")), ("hidden_activation", (approximation,))):
        if (found := f.get(name)) is not None and found not in allowed:
            raise ConfigError(f"config.json has {name} = {found!r}; allowed: {' and '.join(allowed)}. Correct it.")


def _ropes(f: Fields) -> dict[str, Rope]:
    """Of the layers without a window and of those with one: side by side in newer files."""
    names = ("rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings")
    given = {name: f.get(name) for name in names}
    local = f.number_or_none("rope_local_base_freq")
    both = required_field(WHAT, {"rope_parameters": given["rope_parameters"] or {}}, "rope_parameters", dict)
    if not {FULL, SLIDING} & {*both}:
        full = rope_from_hf(given, theta=GLOBAL_THETA)
        return {FULL: full, SLIDING: Rope(theta=LOCAL_THETA if local is None else local)}
    found = {
        FULL: rope_from_hf({**given, "rope_parameters": both.get(FULL)}, theta=GLOBAL_THETA),
        SLIDING: rope_from_hf({"rope_parameters": both.get(SLIDING)}, theta=LOCAL_THETA if local is None else local),
    }
    if local is not None and found[SLIDING].theta != local:
        raise ConfigError(
            f"config.json contradicts itself: rope_local_base_freq is {local} and rope_parameters have "
            f"{found[SLIDING]} for {SLIDING}. Keep rope_parameters alone."
        )
    return found


def to_hf(family: Name, config: ModelConfig) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read alike."""
    mixers, ffn = attentions(config), config.layers[0].ffn
    first = mixers[0]
    fields = {**decoder_to_hf(config), "attention_bias": first.bias}
    if family == "gemma":
        return {**fields, **gated_to_hf(ffn), **gated_to_hf(ffn, "hidden_activation"), **rope_to_hf(first.rope)}
    check_heads_divide(config)
    scale = first.head_dim**-0.5 if first.scale is None else first.scale
    fields |= {
        **gated_to_hf(ffn, "hidden_activation"),
        "attn_logit_softcapping": first.soft_cap,
        "final_logit_softcapping": config.soft_cap,
        "layer_types": layer_types_to_hf(config),
        "query_pre_attn_scalar": round(scale**-2),
        "sliding_window": window_of(config) or WINDOW,
    }
    ropes = rope_to_hf(next((mixer for mixer in mixers if mixer.window is None), first).rope)
    if family == "gemma2":
        return fields | ropes
    local = rope_to_hf(next((mixer.rope for mixer in mixers if mixer.window is not None), Rope(theta=LOCAL_THETA)))
    both = {FULL: ropes["rope_parameters"], SLIDING: local["rope_parameters"]}
    every = next((i + 1 for i, mixer in enumerate(mixers) if mixer.window is None), len(mixers) + 1)
    old = {"rope_local_base_freq": local["rope_theta"], "sliding_window_pattern": every}
    return fields | ropes | old | {"rope_parameters": both}


NORMS = {
    **norm("mixer.norm", "input_layernorm"),
    **norm("mixer.post_norm", "post_attention_layernorm"),
    **norm("ffn.norm", "pre_feedforward_layernorm"),
    **norm("ffn.post_norm", "post_feedforward_layernorm"),
}
TENSORS = {**TABLES, **ATTENTION, **GATED}
GEMMA = member("gemma", "GemmaForCausalLM", from_hf, to_hf, {**TENSORS, **PRE_NORMS})
GEMMA2 = member("gemma2", "Gemma2ForCausalLM", from_hf, to_hf, {**TENSORS, **NORMS})
GEMMA3 = member("gemma3_text", "Gemma3ForCausalLM", from_hf, to_hf, {**TENSORS, **NORMS, **HEAD_NORMS})
