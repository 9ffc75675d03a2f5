"""What a family file declares: its configs, and where each of our parameters lies in other formats' files."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from jaxdistill.formats.tiles import c_ordered
from jaxdistill.models.schema import schema
from jaxdistill.sharding import Axes
from jaxdistill.specs import MixtureOfExperts, ModelConfig

MAX_LAYERS = 10_000
MAX_EXPERTS = 100_000
"""Of all layers together."""


ReadTensor = Callable[[str], np.ndarray]


class ConfigError(ValueError):
    """A model description that cannot be taken over exactly; says which field, what is allowed, what to do."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """How one parameter lies in a file.

    axes: the file's axes in order, each the product of the axes of ours that it is made of: a query projection of
    Hugging Face, [heads·head_dim, embed], is (("heads", "head_dim"), ("embed",)). interleaved: an axis of ours whose
    two halves alternate in the file (llama.cpp keeps the two dimensions of one rotation next to each other); never the
    first of its product. A name with "@" stands for several tensors, one for each number on the first axis (experts):
    see `tensors`. rows: where the tensor holds other parameters too, how many rows lie before ours, and are in all.
    """

    name: str
    axes: tuple[tuple[str, ...], ...]
    interleaved: str | None = None
    rows: tuple[int, int] | None = None

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The tensor's shape in the file, from the size of each of our axes."""
        first, *rest = self.own_shape(sizes)
        return (first if self.rows is None else self.rows[1], *rest)

    def own_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The same of what is ours in it."""
        return tuple(math.prod(sizes[a] for a in group) for group in self.axes)

    @property
    def numbered(self) -> bool:
        return "@" in self.name

    def tensor(self, number: int) -> Stored:
        """The tensor of one number on the first axis, which is ours as well; it lacks that axis."""
        return dataclasses.replace(self, name=self.name.replace("@", str(number)), axes=self.axes[1:])

    def tensors(self, sizes: Mapping[str, int]) -> list[Stored]:
        """Every tensor of the file that this parameter is made of."""
        return [self.tensor(i) for i in range(sizes[self.axes[0][0]])] if self.numbered else [self]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorNames:
    """One row of a family's table: the axes of the tensor in files ("heads*head_dim embed") and its names there.

    `*` in a name stands for the layer's index, `@` for a number on the first axis that has tensors of its own.
    gguf_interleaved: see `Stored.interleaved`; GGUF files only. fused: all of our parameters that lie in the tensor of
    Hugging Face's, in their order, by our names.
    """

    axes: str
    hf: str
    gguf: str = ""
    gguf_interleaved: str | None = None
    fused: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture: its configs in other formats and the table of its tensors.

    from_hf, to_hf: a Hugging Face config.json as a dict, and ours. to_hf may leave out what the architecture does not
    have: what is written is read again and compared (`models.export`). from_gguf: GGUF metadata, tensor names and a
    function that reads a tensor, to our config; None where GGUF files are not read. tensors: keyed by our per-layer
    name with `*` for the layer's index. dense: those of layers without a mixture, where some have one. ignored:
    patterns of stored names that hold nothing that a config does not say.
    """

    hf_architecture: str
    gguf_architecture: str | None = None
    from_hf: Callable[[Mapping[str, Any]], ModelConfig]
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    from_gguf: Callable[[Mapping[str, Any], Collection[str], ReadTensor], ModelConfig] | None = None
    tensors: Mapping[str, TensorNames]
    dense: Mapping[str, TensorNames] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def hf_stored(self, config: ModelConfig, name: str) -> Stored:
        """Where our parameter lies in a Hugging Face checkpoint of such a model."""
        row, layer = self._row(config, name)
        rows = None
        if row.fused:
            names = [one.replace("*", layer) for one in row.fused]
            counts = [_first_size(config, one, self._row(config, one)[0]) for one in names]
            rows = sum(counts[: names.index(name)]), sum(counts)
        return Stored(row.hf.replace("*", layer), _groups(row.axes), rows=rows)

    def gguf_stored(self, config: ModelConfig, name: str) -> Stored:
        """Where our parameter lies in a GGUF file of such a model."""
        row, layer = self._row(config, name)
        return Stored(row.gguf.replace("*", layer), _groups(row.axes), row.gguf_interleaved)

    def is_ignored(self, stored_name: str) -> bool:
        return any(re.fullmatch(pattern, stored_name) for pattern in self.ignored)

    def _row(self, config: ModelConfig, name: str) -> tuple[TensorNames, str]:
        match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if not match:
            return self.tensors[name], ""
        general = f"layers.*.{match[2]}"
        mixture = isinstance(config.layers[int(match[1])].ffn, MixtureOfExperts)
        table = self.dense if not mixture and general in self.dense else self.tensors
        return table[general], match[1]


def _first_size(config: ModelConfig, name: str, row: TensorNames) -> int:
    spec = schema(config)[name]
    sizes = axis_sizes(spec.axes, spec.shape)
    return math.prod(sizes[axis] for axis in _groups(row.axes)[0])


def _groups(axes: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(axis.split("*")) for axis in axes.split())


def axis_sizes(axes: Axes, shape: tuple[int, ...]) -> dict[str, int]:
    """The size of each of our axes, by name."""
    return {str(a): size for a, size in zip(axes, shape, strict=True)}


def from_stored(stored: Stored, axes: Axes, sizes: Mapping[str, int], block: np.ndarray) -> np.ndarray:
    """A tensor of a file in our layout; the inverse of `to_stored`. A view where the layouts allow it.

    axes: ours, in order. sizes: of each axis in this block, which may be part of the tensor along axes that are not
    interleaved.
    """
    order = [a for group in stored.axes for a in group]
    block = block.reshape([sizes[a] for a in order])
    if stored.interleaved is not None:
        at = order.index(stored.interleaved)
        pairs = block.reshape(*block.shape[:at], -1, 2, *block.shape[at + 1 :])
        block = pairs.swapaxes(at, at + 1).reshape(block.shape)
    return block.transpose([order.index(str(a)) for a in axes])


def to_stored(stored: Stored, axes: Axes, tensor: np.ndarray) -> np.ndarray:
    """A tensor of ours in the layout of a file, contiguous; the inverse of `from_stored`."""
    order = [a for group in stored.axes for a in group]
    block = tensor.transpose([axes.index(a) for a in order])
    if stored.interleaved is not None:
        at = order.index(stored.interleaved)
        halves = block.reshape(*block.shape[:at], 2, -1, *block.shape[at + 1 :])
        block = halves.swapaxes(at, at + 1).reshape(block.shape)
    return c_ordered(block).reshape(stored.own_shape(axis_sizes(axes, tensor.shape)))


def check_fields(
    what: str, fields: Mapping[str, Any], *, handled: Collection[str], required: Mapping[str, Any]
) -> None:
    """Refuses, by name, every field that is neither handled nor null nor at the one value that we can honour.

    handled: fields that are read elsewhere or have no influence on the outputs. required: field → its only allowed
    value.
    """
    given = {k: v for k, v in fields.items() if v is not None}
    wrong = [f"{k} = {v!r} (allowed: {required[k]!r})" for k, v in given.items() if k in required and v != required[k]]
    unknown = [f"{k} = {v!s:.80}" for k, v in given.items() if k not in required and k not in handled]
    if wrong or unknown:
        raise ConfigError(
            f"{what} asks for what this model family does not do here: {'; '.join(wrong + unknown)}. "
            "Its outputs would differ from the original's, so it is not read. Use a model without these fields, or "
            "remove a field from the description if you know that it changes nothing."
        )


def required_field(what: str, fields: Mapping[str, Any], name: str, kind: type) -> Any:
    """A field that must be there and of one type; ints pass as floats. Ints are sizes, above 0 and below 2^31; floats
    are finite."""
    value: Any = fields.get(name)
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    fits = {int: lambda: 0 < value < 2**31, float: lambda: math.isfinite(value)}.get(kind, lambda: True)
    if type(value) is not kind or not fits():
        needed = {int: "an int above 0 and below 2^31", float: "a finite number"}.get(kind, f"a {kind.__name__}")
        raise ConfigError(f"{what} has {name} = {value!r:.80}; {needed} is needed. Complete or correct it.")
    return value


def positive(what: str, fields: Mapping[str, Any], name: str) -> float:
    """A number above 0 that must be there."""
    value = required_field(what, fields, name, float)
    if value <= 0:
        raise ConfigError(f"{what} has {name} = {value}; a number above 0 is needed. Correct it.")
    return value


def depth_of(what: str, fields: Mapping[str, Any], name: str) -> int:
    """A number of layers: bounded, since every layer gets a description before a tensor is read."""
    value = required_field(what, fields, name, int)
    if value > MAX_LAYERS:
        raise ConfigError(f"{what} has {name} = {value}; at most {MAX_LAYERS} layers are read. Correct it.")
    return value


def with_defaults(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, with absent or null ones at the default of the format."""
    return {**fields, **{k: v for k, v in defaults.items() if fields.get(k) is None}}
