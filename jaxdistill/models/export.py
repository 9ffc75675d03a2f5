"""Writing a model as a Hugging Face directory that the tools of the ecosystem load."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdistill.formats.paths import atomic_directory, local_path, write_text
from jaxdistill.formats.safetensors import save_safetensors
from jaxdistill.formats.source import TensorInfo
from jaxdistill.models.families import FAMILIES
from jaxdistill.models.families.family import ConfigError, axis_sizes, to_stored
from jaxdistill.models.parts import ParamsInParts, Parts, part_names
from jaxdistill.models.schema import schema
from jaxdistill.specs import LayerSpec, ModelConfig
from jaxdistill.tokenizers.base import SpecialTokens, Tokenizer
from jaxdistill.types import Params

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
WRITTEN_DTYPES = ("float32", "bfloat16", "float16")


def write_hf(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    *,
    dtype: Any,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = 5_000_000_000,
    replace: bool = False,
) -> Path:
    """A model as config.json, safetensors and the tokenizer's files; returns the directory. See `write_hf_parts`.

    params: the stacked tree; one tensor at a time is brought to the host. dtype: float32, bfloat16 or float16. The
    tokenizer also gives the ids that begin and end a text. A tied head is not written. The directory appears complete
    or not at all; an existing non-empty one is refused unless `replace`. Raises ConfigError for a model that the
    format cannot express: ask `check_exportable` before training one.
    """
    check_exportable(config)
    _check_local(params)
    return write_hf_parts(
        directory,
        ParamsInParts(config, params),
        dtype=dtype,
        tokenizer=tokenizer,
        max_shard_bytes=max_shard_bytes,
        replace=replace,
    )


def write_hf_parts(
    directory: str | os.PathLike[str],
    parts: Parts,
    *,
    dtype: Any,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = 5_000_000_000,
    replace: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """The same of a model that is read part by part. progress: called with (bytes written, bytes in all)."""
    config = parts.config
    fields = check_exportable(config)
    kind = np.dtype(dtype)
    if kind.name not in WRITTEN_DTYPES:
        raise ValueError(f"dtype is {kind}; allowed are {', '.join(WRITTEN_DTYPES)}.")
    family, special = FAMILIES[config.family], tokenizer.special if tokenizer else SpecialTokens()
    fields |= {
        "architectures": [family.hf_architecture],
        "model_type": config.family,
        "dtype": kind.name,
        "torch_dtype": kind.name,  # transformers 4's name for it
        "bos_token_id": special.bos,
        "eos_token_id": special.eos,
        "pad_token_id": special.pad,
    }
    infos = {}
    for name, spec in schema(config).items():
        sizes = axis_sizes(spec.axes, spec.shape)
        for tensor in family.hf_stored(config, name).tensors(sizes):
            infos[tensor.name] = TensorInfo(tensor.shape(sizes), kind)
    with atomic_directory(directory, replace=replace) as folder:
        write_text(folder / CONFIG_NAME, _json(fields))
        if tokenizer is not None:
            write_text(folder / GENERATION_NAME, _json(_generation(special)))
            tokenizer.save(folder)
        tensors = _counted(_tensors(parts, kind), sum(info.nbytes for info in infos.values()), progress)
        save_safetensors(folder, infos, tensors, max_shard_bytes=max_shard_bytes)
    return local_path(directory)


def _counted(
    tensors: Iterator[tuple[str, np.ndarray]], total: int, progress: Callable[[int, int], None]
) -> Iterator[tuple[str, np.ndarray]]:
    done = 0
    for name, tensor in tensors:
        yield name, tensor
        done += tensor.nbytes
        progress(done, total)


def check_exportable(config: ModelConfig) -> dict[str, Any]:
    """The config.json fields of a model's architecture; raises ConfigError if the format cannot express it: what is
    written is read again, and must be the same model."""
    if config.suffixes is not None:
        raise ConfigError(
            "this model of bytes adds the embedding of the longest token that ends at each byte to its input, which no "
            "Hugging Face architecture does. Keep it as a checkpoint of ours (in training: --export jaxdistill)."
        )
    if config.family not in FAMILIES:
        raise ConfigError(f"the model's family is {config.family!r}; allowed are {', '.join(FAMILIES)}.")
    lacking = [layer for layer, spec in enumerate(config.layers) if spec.mixer is None or spec.ffn is None]
    if lacking:
        raise ConfigError(
            f"the layers {lacking} lack attention or feed-forward, which a Hugging Face config.json cannot say. Pad "
            "the model (`--pad`; its outputs stay the same), or keep it as a checkpoint of ours."
        )
    family = FAMILIES[config.family]
    fields = family.to_hf(config)
    if differences := _differences(config, family.from_hf(fields)):
        raise ConfigError(
            f"a Hugging Face config.json of {config.family} cannot say what this model is: {differences}. Where only "
            "sizes differ from layer to layer, pad it (`--pad`; its outputs stay the same); or keep it as a checkpoint "
            "of ours."
        )
    return fields


def exportable(config: ModelConfig) -> bool:
    """Whether `check_exportable` has nothing to say."""
    try:
        check_exportable(config)
    except ConfigError:
        return False
    return True


def _differences(config: ModelConfig, read: ModelConfig) -> str:
    """Where a model differs from what would be read instead."""
    layers: dict[tuple[LayerSpec, LayerSpec], list[int]] = {}
    for layer, pair in enumerate(zip(config.layers, read.layers, strict=True)):
        if pair[0] != pair[1]:
            layers.setdefault(pair, []).append(layer)
    told = [
        f"{field.name} is {getattr(config, field.name)} and would be {getattr(read, field.name)}"
        for field in dataclasses.fields(config)
        if field.name != "layers" and getattr(config, field.name) != getattr(read, field.name)
    ]
    told += [f"layers {numbers} are {own} and would be {other}" for (own, other), numbers in layers.items()]
    return "; ".join(told)


def _check_local(params: Params) -> None:
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(params)):
        raise ValueError(
            f"the parameters are spread over {jax.process_count()} processes; a directory is written by one. "
            "Save a checkpoint, and convert it in a single process."
        )


def _tensors(parts: Parts, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor as it is stored, one at a time."""
    family, fused = FAMILIES[parts.config.family], []
    for name, expert in part_names(parts.config):
        stored, axes = family.hf_stored(parts.config, name), schema(parts.config)[name].axes
        if expert is not None:
            stored, axes = stored.tensor(expert), axes[1:]
        found = _cast(stored.name, to_stored(stored, axes, parts.read(name, expert)), dtype)
        if stored.rows is None:
            yield stored.name, found
            continue
        # Parameters that share a tensor come in turn, and it is written when all are there.
        fused.append(found)
        if sum(map(len, fused)) == stored.rows[1]:
            yield stored.name, np.concatenate(fused)
            fused = []


def _cast(name: str, tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = tensor.astype(dtype)
    if dtype == np.float16 and np.isinf(cast).any() and not np.isinf(tensor).any():
        raise ValueError(
            f"{name} has values up to {np.abs(tensor).max():.3g}; float16 ends at 65504. Write bfloat16 or float32."
        )
    return cast


def _generation(special: SpecialTokens) -> dict[str, Any]:
    return {
        "bos_token_id": special.bos,
        "eos_token_id": sorted(special.stop) or special.eos,
        "pad_token_id": special.pad,
    }


def _json(fields: dict[str, Any]) -> str:
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"
