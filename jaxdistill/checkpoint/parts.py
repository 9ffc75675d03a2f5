"""Saved models written and read part by part, so that a model need not fit into memory: what `save_model` writes, and
what it reads, but one layer's parameter at a time.

Arrays are written with TensorStore as Orbax lays them out (a zarr array for each stacked leaf, in one OCDBT database),
in chunks of a layer, and an expert. The ordinary reader knows no difference.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from jaxdistill.checkpoint.arrays import CheckpointError, LeafSpec
from jaxdistill.checkpoint.model import ModelDescription, describe, readable_arrays, refuse_existing, write_description
from jaxdistill.formats.paths import AnyPath, Done, any_path, is_remote, resumable_directory, write_text
from jaxdistill.formats.tiles import c_ordered
from jaxdistill.models.parts import Parts, part_names
from jaxdistill.models.schema import StackedSpec, locate, schema, stacked_schema
from jaxdistill.specs import ModelConfig

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


def save_parts(
    directory: AnyPath,
    parts: Parts,
    *,
    dtype: Any,
    source: str,
    compress: bool = False,
    write_tokenizer: Callable[[Path], None] | None = None,
    progress: Progress = lambda done, total: None,
) -> None:
    """Writes a model into a new directory, whole or not at all; what was interrupted goes on where it was.

    dtype: of the weights that are written. source: what the parts come from and which of its states, in a few words: a
    part that was written from another is not kept. compress: with zstd, which saves a little of weights, for time. Two
    parts are in memory at most.
    """
    target = any_path(directory).absolute()
    refuse_existing(target)
    config, kind = parts.config, jnp.dtype(dtype)
    leaves = {"/".join(path): leaf for path, leaf in stacked_schema(config).items()}
    specs = {name: LeafSpec(leaf.shape, str(_dtype(leaf, kind))) for name, leaf in leaves.items()}
    arrays = {name: str(spec) for name, spec in specs.items()}
    made_from = json.dumps({"source": source, "arrays": arrays, "compress": compress, "boot": _boot()})
    total = sum(spec.bytes for spec in specs.values())
    with resumable_directory(target, made_from) as (folder, done):
        stores = {
            name: _create(folder / "arrays", name, leaf, kind, compress=compress) for name, leaf in leaves.items()
        }
        written = 0
        with _InFlight(done) as in_flight:
            for name, expert in part_names(config):
                leaf, index = _place(config, name, expert)
                if (key := f"{name} {expert}") not in done:
                    value = c_ordered(parts.read(name, expert), _dtype(leaves[leaf], kind))
                    in_flight.wait()
                    in_flight.begin(key, stores[leaf][index].write(value))
                written += _part_bytes(config, name, expert, specs[leaf])
                progress(written, total)
        _write_metadata(folder / "arrays", leaves)
        write_description(folder, config, specs)
        if write_tokenizer is not None:
            write_tokenizer(folder)


@functools.cache
def _boot() -> str:
    """Which start of the machine this is; "" where the system does not say."""
    name = Path("/proc/sys/kernel/random/boot_id")
    return name.read_text().strip() if name.exists() else ""


class _InFlight:
    """The part that is being written while the next is read; nothing is left in flight behind the block."""

    def __init__(self, done: Done):
        self._done, self._key, self._write = done, "", None

    def begin(self, key: str, write: Any) -> None:
        self._key, self._write = key, write

    def wait(self) -> None:
        if self._write is not None:
            self._write.result()
            self._done.add(self._key)
            self._write = None

    def __enter__(self) -> _InFlight:
        return self

    def __exit__(self, *exception: object) -> None:
        self.wait()


def _dtype(leaf: StackedSpec, dtype: np.dtype) -> np.dtype:
    return np.dtype(leaf.spec.dtype or dtype)


def _place(config: ModelConfig, name: str, expert: int | None) -> tuple[str, tuple[int, ...]]:
    """The leaf that a part is in, and its indices there."""
    path, layer = locate(config, name)
    return "/".join(path), tuple(index for index in (layer, expert) if index is not None)


def _part_bytes(config: ModelConfig, name: str, expert: int | None, leaf: LeafSpec) -> int:
    shape = schema(config)[name].shape[0 if expert is None else 1 :]
    return int(np.prod(shape)) * jnp.dtype(leaf.dtype).itemsize


def _create(folder: Path, name: str, leaf: StackedSpec, dtype: np.dtype, *, compress: bool) -> Any:
    """An array to fill, one part to a chunk; the one that is there already where writing goes on."""
    singles = int(leaf.stacked) + int(len(leaf.spec.axes) > 1 and leaf.spec.axes[0] == "experts")
    shape = leaf.shape
    spec = _spec(folder, name) | {
        "metadata": {
            "shape": list(shape),
            "chunks": [1] * singles + [max(size, 1) for size in shape[singles:]],
            "dtype": _zarr_dtype(_dtype(leaf, dtype)),
            "compressor": {"id": "zstd", "level": 1} if compress else None,
        }
    }
    return ts.open(spec, create=True, open=True).result()


def _spec(folder: Path, name: str) -> dict[str, Any]:
    # Files are made durable all at once, in the end: what is there when the machine starts anew may lack some.
    local = {"driver": "file", "path": f"{folder}/", "file_io_sync": not _boot()}
    base = f"{folder}/" if is_remote(folder) else local
    return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}


def _zarr_dtype(dtype: np.dtype) -> str:
    return "bfloat16" if dtype == jnp.bfloat16 else dtype.str


def _write_metadata(folder: Path, leaves: dict[str, StackedSpec]) -> None:
    """What Orbax writes about the tree, and asks for when it reads it."""
    tree = {
        str((name,)): {
            "key_metadata": [{"key": name, "key_type": 2}],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(leaf.shape)},
        }
        for name, leaf in leaves.items()
    }
    document = {
        "tree_metadata": tree,
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    write_text(folder / "_METADATA", json.dumps(document))


@dataclasses.dataclass(frozen=True)
class SavedInParts:
    """A saved model, read part by part. Reading one layer reads the chunks that it lies in."""

    arrays: Path
    description: ModelDescription

    @classmethod
    def open(cls, directory: AnyPath) -> SavedInParts:
        return cls(readable_arrays(any_path(directory)), describe(directory))

    @property
    def config(self) -> ModelConfig:
        return self.description.config

    def read(self, name: str, expert: int | None = None) -> np.ndarray:
        """See `models.parts.Parts`."""
        leaf, index = _place(self.config, name, expert)
        parts = leaf.split("/")
        if parts[0] == "segments":
            # Layers may have been stacked in shorter runs than this configuration's.
            layer = int(name.split(".")[1])
            starts = [0, *itertools.accumulate(self.description.segments)]
            segment = next(i for i, stop in enumerate(starts[1:]) if layer < stop)
            leaf, index = "/".join([parts[0], str(segment), *parts[2:]]), (layer - starts[segment], *index[1:])
        return np.asarray(self._open(leaf)[index].read().result())

    @functools.cached_property
    def _arrays(self) -> dict[str, Any]:
        return {}

    def _open(self, leaf: str) -> Any:
        if leaf not in self._arrays:
            try:
                self._arrays[leaf] = ts.open(_spec(self.arrays, leaf), read=True, open=True).result()
            except ValueError as error:
                raise CheckpointError(
                    f"{self.arrays.parent} cannot be read ({error!s:.200}); convert the model again."
                ) from None
        return self._arrays[leaf]
