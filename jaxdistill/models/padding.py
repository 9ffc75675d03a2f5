"""A model whose layers differ, with zeros where they lack something: all layers alike, and the same outputs.

Formats that describe one kind of layer can hold it then; it costs the memory and the time of the widest layer in all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdistill.models.schema import StackedSpec, leaf_at, locate, nested, param_shardings, schema, stacked_schema
from jaxdistill.sharding import Layout
from jaxdistill.specs import FFN, Attention, LayerSpec, ModelConfig
from jaxdistill.types import Params


def pad_layers(config: ModelConfig, params: Params, *, layout: Layout = Layout()) -> tuple[ModelConfig, Params]:
    """The model with every axis of its layers as wide as in the widest one, and both halves in every layer; new arrays
    in their places.

    Added neurons and heads have zeros around them, and so add nothing; windows and rotary embeddings stay each layer's
    own. Raises ValueError where zeros would change what is there: a norm of all heads together, other numbers of
    experts, halves of different kinds.
    """
    wider = padded_config(config)

    def pad(params: Params) -> Params:
        return nested({path: _padded(config, wider, params, leaf) for path, leaf in stacked_schema(wider).items()})

    return wider, jax.jit(pad, out_shardings=param_shardings(wider, layout))(params)


def padded_config(config: ModelConfig) -> ModelConfig:
    """What `pad_layers` makes of a model."""
    mixer = _widest_mixer([spec.mixer for spec in config.layers if spec.mixer is not None])
    ffn = _widest_ffn([spec.ffn for spec in config.layers if spec.ffn is not None])
    return dataclasses.replace(config, layers=tuple(_padded_spec(spec, mixer, ffn) for spec in config.layers))


def _widest_mixer(mixers: list[Attention]) -> Attention | None:
    if not mixers:
        return None
    kinds = {(each.head_dim, each.bias, each.output_bias, each.qk_norm) for each in mixers}
    sizes = {(each.heads, each.kv_heads) for each in mixers}
    if len(kinds) > 1 or (mixers[0].qk_norm == "all" and len(sizes) > 1):
        raise ValueError(
            f"the layers' attention differs in (head_dim, bias, output_bias, qk_norm), {sorted(map(str, kinds))}, or "
            f"norms all heads of (heads, kv_heads) {sorted(sizes)} together: zeros would change it. Keep the model as "
            "a checkpoint of ours."
        )
    groups = max(each.kv_heads for each in mixers)
    size = max(each.heads // each.kv_heads for each in mixers)
    return dataclasses.replace(mixers[0], heads=groups * size, kv_heads=groups)


def _widest_ffn(ffns: list[FFN]) -> FFN | None:
    if not ffns:
        return None
    widest = max(ffns, key=lambda each: each.mlp)
    others = [each for each in ffns if dataclasses.replace(each, mlp=widest.mlp) != widest]
    if others:
        raise ValueError(
            f"the layers' feed-forward is {widest} and {others[0]}, which differ in more than their width: zeros would "
            "change it. Keep the model as a checkpoint of ours."
        )
    return widest


def _padded_spec(spec: LayerSpec, mixer: Attention | None, ffn: FFN | None) -> LayerSpec:
    if mixer is not None and spec.mixer is not None:
        mixer = dataclasses.replace(spec.mixer, heads=mixer.heads, kv_heads=mixer.kv_heads)
    return dataclasses.replace(spec, mixer=mixer, ffn=ffn)


def _padded(config: ModelConfig, wider: ModelConfig, params: Params, leaf: StackedSpec) -> Array:
    """One leaf of the wider model, member by member."""
    dtype = jax.tree.leaves(params)[0].dtype
    members = [_member(config, wider, params, name, dtype) for name in leaf.members]
    return jnp.stack(members) if leaf.stacked else members[0]


def _member(config: ModelConfig, wider: ModelConfig, params: Params, name: str, dtype: Any) -> Array:
    target = schema(wider)[name]
    if name not in schema(config):
        # A half that was not there: its norms as they start, and nothing in all else.
        if not name.endswith("norm.scale"):
            return jnp.zeros(target.shape, dtype)
        return target.initializer(jax.random.key(0), target.shape, jnp.float32).astype(dtype)
    path, index = locate(config, name)
    value = leaf_at(params, path)
    value = value if index is None else value[index]
    if not name.startswith("layers."):
        return value
    layer = int(name.split(".")[1])
    old, new = config.layers[layer], wider.layers[layer]
    for at, axis in enumerate(target.axes):
        if (grow := PADDED.get(str(axis))) is not None:
            value = grow(value, at, old, new)
    return value


def _grow(value: Array, at: int, size: int) -> Array:
    """Zeros at the end of an axis."""
    return jnp.pad(value, [(0, size - value.shape[i] if i == at else 0) for i in range(value.ndim)])


def _grow_heads(value: Array, at: int, old: LayerSpec, new: LayerSpec) -> Array:
    """Query heads keep their key-value head: head i belongs to number i // (heads / kv_heads)."""
    assert old.mixer is not None
    assert new.mixer is not None
    groups = value.reshape(*value.shape[:at], old.mixer.kv_heads, -1, *value.shape[at + 1 :])
    groups = _grow(_grow(groups, at, new.mixer.kv_heads), at + 1, new.mixer.heads // new.mixer.kv_heads)
    return groups.reshape(*value.shape[:at], new.mixer.heads, *value.shape[at + 1 :])


PADDED: Mapping[str, Callable[[Array, int, LayerSpec, LayerSpec], Array]] = {
    "heads": _grow_heads,
    "kv_heads": lambda value, at, old, new: _grow(value, at, new.widths["kv_heads"]),
    "mlp": lambda value, at, old, new: _grow(value, at, new.widths["mlp"]),
}
