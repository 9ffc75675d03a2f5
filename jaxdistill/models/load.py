"""Reading models of other formats: a Hugging Face directory or a GGUF file, straight into the shards of a layout.

Each device's part of each parameter is filled from just the slices of the file that it needs. On the host there is
never more than one such part and one tensor, whatever the size of the model. What is in an object store goes to the
devices layer by layer, so that rows that several parts need are fetched once; on the host there is one layer's
parameter, besides one part of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.formats.gguf import open_gguf
from jaxdistill.formats.paths import AnyPath, any_path, is_remote
from jaxdistill.formats.safetensors import open_safetensors
from jaxdistill.formats.source import FormatError, TensorInfo, TensorSource
from jaxdistill.formats.tiles import c_ordered, copy_into
from jaxdistill.models.families import FAMILIES
from jaxdistill.models.families.family import ConfigError, Family, Stored, axis_sizes, from_stored
from jaxdistill.models.schema import (
    ParamSpec,
    StackedSpec,
    leaf_at,
    nested,
    param_shardings,
    schema,
    stacked_schema,
)
from jaxdistill.sharding import Layout
from jaxdistill.specs import ModelConfig
from jaxdistill.types import Params

CONFIG_NAME = "config.json"
FLOATING = tuple(map(jnp.dtype, ("float32", "bfloat16", "float16", "float64")))
"""Dtypes that hold values as they are. 8-bit ones come with scales in other tensors."""

BLOCK_BYTES = 16_000_000
NAMES_SHOWN = 12

Index = tuple[slice, ...]
ReadSlice = Callable[[str, Index], np.ndarray]
"""`TensorSource.read_slice`, or one like it."""


class WeightsError(ValueError):
    """Weights that do not fit their config: names the tensors, says what was expected and what to do."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint of another format: what the model is, and how a parameter of ours is stored."""

    config: ModelConfig
    family: Family
    source: TensorSource
    stored: Callable[[str], Stored]
    """From our per-layer name."""
    remote: bool = False
    """Whether every read is a request to an object store."""


@dataclasses.dataclass(frozen=True)
class CheckpointInParts:
    """An open checkpoint, read part by part; everything about it is checked first."""

    checkpoint: Checkpoint

    def __post_init__(self):
        check_tensors(self.checkpoint)

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.config

    def read(self, name: str, expert: int | None = None) -> np.ndarray:
        """See `models.parts.Parts`."""
        spec, stored = schema(self.config)[name], self.checkpoint.stored(name)
        if expert is not None:
            stored, spec = stored.tensor(expert), dataclasses.replace(spec, shape=spec.shape[1:], axes=spec.axes[1:])
        whole = tuple(slice(0, size) for size in spec.shape)
        return _read_part(self.checkpoint.source.read_slice, stored, spec, whole)


def read_model(path: AnyPath, *, layout: Layout = Layout(), dtype: Any = jnp.float32) -> tuple[ModelConfig, Params]:
    """A model of another format as our config and its parameters, stacked and placed by the layout.

    path: a directory with config.json and safetensors, or a GGUF file (quantised tensors are dequantised).
    Raises ConfigError for a model that we cannot run exactly, FormatError for damaged files, WeightsError when tensors
    are missing, left over or of another shape.
    """
    with open_checkpoint(path) as checkpoint:
        return checkpoint.config, read_params(checkpoint, layout=layout, dtype=dtype)


def model_config(path: AnyPath) -> ModelConfig:
    """What the model at this path is; reads no tensor. See `read_model`."""
    where = any_path(path)
    if where.is_dir():
        return _hf_config(path)[0]
    with open_checkpoint(path) as checkpoint:
        return checkpoint.config


@contextlib.contextmanager
def open_checkpoint(path: AnyPath) -> Iterator[Checkpoint]:
    """Opens a Hugging Face directory or a GGUF file; headers are read, tensors are not."""
    where = any_path(path)
    if where.is_dir():
        config, family = _hf_config(path)
        with open_safetensors(where) as source:
            stored = functools.partial(family.hf_stored, config)
            yield Checkpoint(config, family, source, stored, remote=is_remote(where))
        return
    if where.suffix != ".gguf":
        raise FormatError(
            f"{where} is neither a directory nor a .gguf file. Give a Hugging Face directory (config.json and "
            "safetensors) or a GGUF file."
        )
    with open_gguf(where) as source:
        architecture = source.metadata.get("general.architecture")
        by_architecture = {f.gguf_architecture: f for f in FAMILIES.values() if f.gguf_architecture}
        family = _known(f"{where}: general.architecture", architecture, by_architecture)
        assert family.from_gguf is not None
        config = family.from_gguf(source.metadata, source.names(), source.read)
        yield Checkpoint(config, family, source, functools.partial(family.gguf_stored, config))


def _hf_config(path: AnyPath) -> tuple[ModelConfig, Family]:
    file = any_path(path) / CONFIG_NAME
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{file} is missing. Give a directory with {CONFIG_NAME} and safetensors.") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file} is not JSON in UTF-8 ({error}). Download or write it again.") from None
    if not isinstance(fields, dict):
        raise FormatError(f"{file} holds a JSON {type(fields).__name__}; an object is needed. Download it again.")
    family = _known(f"{file}: model_type", fields.get("model_type"), FAMILIES)
    try:
        return family.from_hf(fields), family
    except ConfigError as error:
        error.add_note(f"(while reading {file})")
        raise
    except ValueError as error:
        raise ConfigError(f"{file} describes a model that cannot be: {error} Correct it.") from error


def _known(what: str, name: Any, families: Mapping[str, Family]) -> Family:
    if not isinstance(name, str) or name not in families:
        raise ConfigError(
            f"{what} is {name!r}; allowed are {', '.join(families)}. Use a model of one of these families."
        )
    return families[name]


def read_params(checkpoint: Checkpoint, *, layout: Layout = Layout(), dtype: Any = jnp.float32) -> Params:
    """The parameters of an open checkpoint, stacked and placed by the layout; see `read_model`.

    Everything is checked before the first tensor is read.
    """
    config = checkpoint.config
    check_tensors(checkpoint)
    shardings = param_shardings(config, layout)
    place = _place_layer_by_layer if checkpoint.remote else _place_leaf
    leaves = {}
    for path, spec in stacked_schema(config).items():
        leaf = _Leaf(spec, [checkpoint.stored(name) for name in spec.members], jnp.dtype(dtype))
        leaves[path] = place(checkpoint.source, leaf, leaf_at(shardings, path))
    return nested(leaves)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A leaf of the stacked tree, and how each of its layers is stored."""

    spec: StackedSpec
    layers: list[Stored]
    dtype: np.dtype

    def read(self, read_slice: ReadSlice, index: Index) -> np.ndarray:
        """One device's part of it."""
        if not self.spec.stacked:
            return c_ordered(_read_part(read_slice, self.layers[0], self.spec.spec, index), self.dtype)
        chosen = self.layers[index[0]]
        part = np.empty((len(chosen), *(_length(s) for s in index[1:])), self.dtype)
        for slot, layer in zip(part, chosen, strict=True):
            copy_into(slot, _read_part(read_slice, layer, self.spec.spec, index[1:]))
        return part


def _place_leaf(source: TensorSource, leaf: _Leaf, sharding: jax.sharding.Sharding) -> jax.Array:
    return _place(leaf.spec.shape, sharding, functools.partial(leaf.read, source.read_slice))


def _place_layer_by_layer(source: TensorSource, leaf: _Leaf, sharding: jax.sharding.Sharding) -> jax.Array:
    """As `_place_leaf`, with rows that several parts of a layer need read once. Layers are put together on the devices:
    on the host there is one at a time."""
    if not leaf.spec.stacked:
        return _place(leaf.spec.shape, sharding, functools.partial(leaf.read, _sharing_rows(source)))
    layers, *shape = leaf.spec.shape
    one = sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        one = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(None, *sharding.spec[1:]))
    add = jax.jit(_with_layer, donate_argnums=0, out_shardings=sharding)
    whole = jnp.zeros(leaf.spec.shape, leaf.dtype, device=sharding)
    for at in range(layers):
        read_slice = _sharing_rows(source)

        def read(index: Index, read_slice=read_slice, at=at) -> np.ndarray:
            return leaf.read(read_slice, (slice(at, at + 1), *index[1:]))

        whole = add(whole, _place((1, *shape), one, read), at)
    return whole


def _with_layer(whole: jax.Array, layer: jax.Array, at: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, layer, at, axis=0)


def _sharing_rows(source: TensorSource) -> ReadSlice:
    """Reads slices, and keeps the rows that it has read for other slices of them."""
    kept: dict[tuple[str, int, int], np.ndarray] = {}

    def read_slice(name: str, index: Index) -> np.ndarray:
        first, *others = index
        rows = name, first.start, first.stop
        if rows not in kept:
            whole = (slice(0, size) for size in source.info(name).shape[1:])
            kept[rows] = source.read_slice(name, (first, *whole))
        return kept[rows][:, *others]

    return read_slice


def _place(shape: tuple[int, ...], sharding: jax.sharding.Sharding, fill: Callable[[Index], np.ndarray]) -> jax.Array:
    """An array whose parts are made one after the other, each once for all devices that hold it."""
    devices: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index or (), shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    parts = []
    for bounds, holders in devices.items():
        part = fill(tuple(slice(*b) for b in bounds))
        # Waiting keeps the host from running ahead with parts that no device has taken yet.
        parts += jax.block_until_ready([jax.device_put(part, device) for device in holders])
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _read_part(read_slice: ReadSlice, stored: Stored, spec: ParamSpec, index: Index) -> np.ndarray:
    """One parameter's part, reading only that from the file.

    Where an axis of the file is a product, whole entries of its first factor are read and the others cut afterwards.
    """
    if stored.numbered:
        each = dataclasses.replace(spec, shape=spec.shape[1:], axes=spec.axes[1:])
        parts = (
            _read_part(read_slice, stored.tensor(i), each, index[1:]) for i in range(index[0].start, index[0].stop)
        )
        first = next(parts)
        whole = np.empty((_length(index[0]), *first.shape), first.dtype)
        for place, part in zip(whole, itertools.chain([first], parts), strict=True):
            copy_into(place, part)
        return whole
    full = axis_sizes(spec.axes, spec.shape)
    wanted = dict(zip(map(str, spec.axes), index, strict=True))
    sizes, in_file = dict(full), []
    for first, *others in stored.axes:
        inner = math.prod(full[a] for a in others)
        in_file.append(slice(wanted[first].start * inner, wanted[first].stop * inner))
        sizes[first] = _length(wanted.pop(first))
    if stored.rows is not None:
        before = stored.rows[0]
        in_file[0] = slice(before + in_file[0].start, before + in_file[0].stop)
    block = from_stored(stored, spec.axes, sizes, read_slice(stored.name, tuple(in_file)))
    return block[tuple(wanted.get(str(a), slice(None)) for a in spec.axes)]


def _length(part: slice) -> int:
    return part.stop - part.start


def check_tensors(checkpoint: Checkpoint) -> None:
    """Refuses tensors that are missing, left over, of another shape, or of a dtype that is no plain number."""
    specs = schema(checkpoint.config)
    tensors = {name: checkpoint.stored(name).tensors(axis_sizes(spec.axes, spec.shape)) for name, spec in specs.items()}
    _check_names(checkpoint, {tensor.name for each in tensors.values() for tensor in each})
    _check_tensors(checkpoint.source, specs, tensors)


def _check_names(checkpoint: Checkpoint, expected: Collection[str]) -> None:
    present = set(checkpoint.source.names())
    missing = [name for name in expected if name not in present]
    extra = [name for name in checkpoint.source.names() if name not in expected]
    extra = [name for name in extra if not checkpoint.family.is_ignored(name)]
    if checkpoint.config.tied:
        head, embedding = checkpoint.stored("head.kernel").name, checkpoint.stored("embedding.kernel").name
        if head in extra and embedding in present:
            _check_equal(checkpoint.source, head, embedding)
            extra.remove(head)
    if missing or extra:
        raise WeightsError(
            f"the weights do not fit the config of this {checkpoint.config.family} model. "
            f"Missing: {_shown(missing)}. Not in the model: {_shown(extra)}. "
            "Give the config that belongs to these weights; a checkpoint of an adapter, of another head or of a base "
            "model without head must be merged or saved as a whole causal language model first."
        )


def _shown(names: list[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"{', '.join(names[:NAMES_SHOWN])}{more} ({len(names)})" if names else "none"


def _check_equal(source: TensorSource, head: str, embedding: str) -> None:
    """A tied model may repeat its table as a head, bit for bit; another table would be lost."""
    info = source.info(head)

    def bits(name: str, index: Index) -> np.ndarray:
        return np.ascontiguousarray(source.read_slice(name, index)).view(np.uint8)

    equal = info == source.info(embedding) and all(
        np.array_equal(bits(head, index), bits(embedding, index)) for index in _row_blocks(info)
    )
    if not equal:
        raise WeightsError(
            f"the config ties the head to the embedding, but {head} differs from {embedding}. "
            "Set tie_word_embeddings to false if the head is meant, or remove the tensor."
        )


def _row_blocks(info: TensorInfo) -> Iterator[Index]:
    rows, *others = info.shape
    step = max(1, BLOCK_BYTES * rows // max(info.nbytes, 1))
    for start in range(0, rows, step):
        yield (slice(start, min(start + step, rows)), *(slice(0, size) for size in others))


def _check_tensors(source: TensorSource, specs: Mapping[str, ParamSpec], tensors: Mapping[str, list[Stored]]) -> None:
    wrong = []
    for where, spec in ((where, spec) for name, spec in specs.items() for where in tensors[name]):
        info, expected = source.info(where.name), where.shape(axis_sizes(spec.axes, spec.shape))
        if info.shape != expected:
            wrong.append(f"{where.name} has shape {info.shape}, the config expects {expected}")
        elif info.dtype not in FLOATING:
            wrong.append(f"{where.name} has dtype {info.dtype}, allowed are {', '.join(map(str, FLOATING))}")
    if wrong:
        more = f"; and {len(wrong) - NAMES_SHOWN} more" if len(wrong) > NAMES_SHOWN else ""
        raise WeightsError(
            f"the weights do not fit the config: {'; '.join(wrong[:NAMES_SHOWN])}{more}. "
            "Give the config that belongs to these weights, unquantised."
        )
