"""A model on disk in our own format: what `convert` writes, and every command reads as a teacher or an initial student.

DIR/jaxdistill.json     format, configuration (runs of equal layers), shape and dtype of every array
   /arrays/             the parameters in stacked form (Orbax), each shard readable alone
   /tokenizer.json, …   the tokenizer's own files
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxdistill.checkpoint import arrays
from jaxdistill.checkpoint.arrays import CheckpointError, LeafSpec
from jaxdistill.checkpoint.documents import from_dict, to_dict
from jaxdistill.formats.paths import AnyPath, any_path, atomic_directory, fetched, is_remote, needs_a_copy, write_text
from jaxdistill.models.schema import abstract_params, count_parameters, param_shardings, segment_of
from jaxdistill.sharding import Layout
from jaxdistill.specs import LayerSpec, ModelConfig
from jaxdistill.types import Params

FILE = "jaxdistill.json"
FORMAT = "jaxdistill model"
VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """What a saved model is, known without reading its arrays. segments: lengths of the stacked runs of layers."""

    config: ModelConfig
    segments: tuple[int, ...]
    leaves: Mapping[str, LeafSpec]

    @property
    def parameters(self) -> int:
        return count_parameters(self.config)

    @property
    def bytes(self) -> int:
        """Bytes of the arrays."""
        return sum(leaf.bytes for leaf in self.leaves.values())

    def __str__(self) -> str:
        dtypes = Counter(leaf.dtype for leaf in self.leaves.values())
        return (
            f"{self.config.family}: {self.parameters:,} parameters, {len(self.config.layers)} layers, "
            f"vocabulary {self.config.vocab:,}, embed {self.config.embed}, "
            f"{self.bytes:,} bytes ({', '.join(sorted(dtypes))})"
        )


def save_model(
    directory: AnyPath,
    config: ModelConfig,
    params: Params,
    *,
    write_tokenizer: Callable[[Path], None] | None = None,
) -> None:
    """Write a model into a new directory, whole or not at all. All processes call it.

    params: the stacked form of `config`, on any mesh and of any dtype. write_tokenizer: puts the tokenizer's files
    into the directory that it is given. Raises FileExistsError when the directory exists and is not empty, and
    CheckpointError when params are not those of config, or the
    disk fails.
    """
    target = any_path(directory).absolute()
    refuse_existing(target)
    named = arrays.named_leaves(params)
    specs = arrays.leaf_specs(named)
    _check(specs, config, [size for size, _ in config.segments], "the model to save")
    with _place_to_write(target) as temporary:
        try:
            with ocp.Checkpointer(arrays.handler()) as checkpointer:
                checkpointer.save(str(temporary / "arrays"), args=arrays.save_args(named))
        except Exception as error:
            # Orbax's writers outlive its error and would make the directory again after it was removed.
            time.sleep(1.0)
            raise CheckpointError(
                f"the model could not be written to {target} ({arrays.short(error)}). Nothing is left there; free "
                "space or check the disk, then save again."
            ) from error
        if jax.process_index() == 0:
            write_description(temporary, config, specs)
            if write_tokenizer is not None:
                write_tokenizer(temporary)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {target}")


@contextlib.contextmanager
def _place_to_write(target: Path) -> Iterator[Path]:
    """Where all processes write what becomes `target`: one local directory that they share. What several write to an
    object store is there at once, and a model from when its description, the last file, is there."""
    if is_remote(target) and jax.process_count() > 1:
        if needs_a_copy(target):
            raise CheckpointError(f"several processes cannot write a model to {target}. {arrays.WHERE_SEVERAL_WRITE}")
        yield target
        return
    with contextlib.ExitStack() as stack:
        temporary = target
        if jax.process_index() == 0:
            temporary = stack.enter_context(atomic_directory(target))
        yield temporary if is_remote(target) else target.with_name(_from_first_process(temporary.name))


def write_description(directory: Path, config: ModelConfig, specs: Mapping[str, LeafSpec]) -> None:
    """What tells that a directory is a model of ours."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "config": _config_to_json(config),
        "arrays": arrays.specs_to_json(specs),
    }
    write_text(directory / FILE, json.dumps(document, indent=1) + "\n")


def load_model_checkpoint(
    directory: AnyPath,
    *,
    layout: Layout,
    dtype: Any = jnp.float32,
) -> tuple[ModelConfig, Params]:
    """A saved model's configuration, and its parameters cast to `dtype`, each shard read where it will live."""
    description = describe(directory)
    path = readable_arrays(any_path(directory))
    config, sizes = description.config, description.segments
    _check(description.leaves, config, sizes, f"the model in {directory}")
    expected = arrays.named_leaves(_abstract(config, sizes, layout, dtype))
    try:
        with ocp.Checkpointer(arrays.handler()) as checkpointer:
            restored = checkpointer.restore(str(path), args=arrays.restore_args(expected))
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read ({arrays.short(error)}); convert the model again.") from error
    params = _nested(restored)
    if sizes != tuple(size for size, _ in config.segments):
        params = _join_segments(config, sizes, params, layout)
    return config, params


def readable_arrays(directory: Path) -> Path:
    """Where a model's arrays are read: in place where Orbax can, else from a local copy."""
    if needs_a_copy(directory):
        directory = fetched(directory)
    return directory.absolute() / "arrays"


def describe(directory: AnyPath) -> ModelDescription:
    """What a saved model is, without reading its arrays. Raises CheckpointError when it is no model of ours."""
    path = any_path(directory) / FILE
    try:
        document = json.loads(path.read_text())
        found, version = document["format"], document["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{directory} is not a jaxdistill model: {path} cannot be read ({arrays.short(error)}). "
            "Give a directory that `jaxdistill convert` wrote."
        ) from error
    if found != FORMAT or not isinstance(version, int) or version > VERSION:
        raise CheckpointError(
            f"{path} is {found!r} version {version!r}; this jaxdistill reads {FORMAT!r} up to version {VERSION}."
        )
    try:
        config, segments = _config_from_json(document["config"])
        return ModelDescription(config=config, segments=segments, leaves=arrays.specs_from_json(document["arrays"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} does not describe a model: {arrays.short(error)}") from error


def is_model(directory: AnyPath) -> bool:
    """Whether a directory says that it holds a model in our format."""
    return (any_path(directory) / FILE).is_file()


def refuse_existing(target: Path) -> None:
    if is_model(target):
        raise FileExistsError(f"{target} already holds a model ({describe(target)}). Choose another name or move it.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty. Choose another name or move it.")


def _from_first_process(name: str) -> str:
    if jax.process_count() == 1:
        return name
    padded = np.zeros(512, np.uint8)
    encoded = np.frombuffer(name.encode(), np.uint8)
    padded[: len(encoded)] = encoded
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))).rstrip(b"\0").decode()


def _config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Equal layers in a row are written once; "segments" are the lengths of the stacked arrays."""
    runs = [{"repeat": len(list(run)), "layer": to_dict(layer)} for layer, run in itertools.groupby(config.layers)]
    return to_dict(config) | {"layers": runs, "segments": [size for size, _ in config.segments]}


def _config_from_json(document: Mapping[str, Any]) -> tuple[ModelConfig, tuple[int, ...]]:
    document = dict(document)
    # Without them every run of equal layers is a segment.
    sizes = tuple(document.pop("segments", [run["repeat"] for run in document["layers"]]))
    layers = [run["layer"] for run in document["layers"] for _ in range(run["repeat"])]
    return from_dict(ModelConfig, {**document, "layers": layers}), sizes


def _runs(config: ModelConfig, sizes: tuple[int, ...] | list[int]) -> list[tuple[LayerSpec, ...]]:
    """The layers in runs of these sizes."""
    starts = np.cumsum([0, *sizes])
    return [config.layers[a:b] for a, b in itertools.pairwise(starts)]


def _abstract(config: ModelConfig, sizes: tuple[int, ...] | list[int], layout: Layout, dtype: Any) -> Params:
    """Shapes and shardings of the stacked tree, with its layers in runs of these sizes."""

    def of(part: ModelConfig) -> Params:
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            abstract_params(part, dtype),
            param_shardings(part, layout),
        )

    segments = [segment_of(of(dataclasses.replace(config, layers=run)), "0") for run in _runs(config, sizes)]
    return of(config) | {"segments": {str(i): segment for i, segment in enumerate(segments) if segment}}


def _check(saved: Mapping[str, LeafSpec], config: ModelConfig, sizes: tuple[int, ...] | list[int], what: str) -> None:
    """Refuse leaves that are not those of the configuration; any dtype will do."""
    wanted = arrays.named_leaves(_abstract(config, sizes, Layout(), jnp.float32))
    same_dtype = {
        name: jax.ShapeDtypeStruct(leaf.shape, saved[name].dtype if name in saved else leaf.dtype)
        for name, leaf in wanted.items()
    }
    arrays.check_leaves(saved, same_dtype, what)


def _join_segments(config: ModelConfig, sizes: tuple[int, ...], params: Params, layout: Layout) -> Params:
    """From the runs of layers that were saved to the configuration's own, which join all equal neighbours."""
    joined, first = {}, 0
    for index, (size, _) in enumerate(config.segments):
        last, covered = first, 0
        while covered < size:
            covered += sizes[last]
            last += 1
        parts = [segment_of(params, str(i)) for i in range(first, last)]
        first = last
        if not any(parts):
            continue
        joined[str(index)] = jax.jit(
            lambda *parts: jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts),
            out_shardings=segment_of(param_shardings(config, layout), str(index)),
        )(*parts)
    return params | {"segments": joined}


def _nested(named: Mapping[str, jax.Array]) -> Params:
    tree: Params = {}
    for name, leaf in named.items():
        *branches, last = name.split("/")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
        node[last] = leaf
    return tree
