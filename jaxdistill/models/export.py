"""Writing a model as a Hugging Face directory that the tools of the ecosystem load."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdistill.formats.paths import AnyPath, Finished, any_path, atomic_directory, resumable_directory, write_text
from jaxdistill.formats.safetensors import save_safetensors
from jaxdistill.formats.source import TensorInfo
from jaxdistill.models.families import FAMILIES
from jaxdistill.models.families.family import ConfigError, axis_sizes, to_stored
from jaxdistill.models.parts import ParamsInParts, Parts, RescaledParts, part_names
from jaxdistill.models.schema import schema
from jaxdistill.specs import LayerSpec, ModelConfig
from jaxdistill.tokenizers.base import SpecialTokens, Tokenizer
from jaxdistill.types import Params

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
WRITTEN_DTYPES = ("float32", "bfloat16", "float16")


def write_hf(
    directory: AnyPath,
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
    tokenizer also gives the ids that begin and end a text. A tied head is not written. Where the format has another
    scale of embeddings (Gemma's follows from the width), the parameters take up the difference. The directory appears
    complete or not at all; an existing non-empty one is refused unless `replace`. Raises ConfigError for a model that
    the format cannot express: ask `check_exportable` before training one.
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
    directory: AnyPath,
    parts: Parts,
    *,
    dtype: Any,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = 5_000_000_000,
    replace: bool = False,
    source: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """The same of a model that is read part by part.

    source: what the parts come from and which of its states; given, an interrupted writing goes on at the shard where
    it was. progress: called with (bytes written, bytes in all).
    """
    fields, config = _expressed(parts.config)
    parts = RescaledParts(parts, config.embed_scale)
    kind = np.dtype(dtype)
    if kind.name not in WRITTEN_DTYPES:
        raise ValueError(f"dtype is {kind}; allowed are {', '.join(WRITTEN_DTYPES)}.")
    infos = {name: info for name, (info, _) in _stored_tensors(config, kind).items()}
    fields |= _described(config, kind, tokenizer.special if tokenizer else SpecialTokens())
    with _folder(directory, replace, source and f"{source} {kind} {max_shard_bytes}") as (folder, done):
        write_text(folder / CONFIG_NAME, _json(fields))
        if tokenizer is not None:
            write_text(folder / GENERATION_NAME, _json(_generation(tokenizer.special)))
            tokenizer.save(folder)
        tensors = _Tensors(parts, kind, progress)
        save_safetensors(folder, infos, tensors, max_shard_bytes=max_shard_bytes, done=done)
    return any_path(directory)


def _described(config: ModelConfig, dtype: np.dtype, special: SpecialTokens) -> dict[str, Any]:
    return {
        "architectures": [FAMILIES[config.family].hf_architecture],
        "model_type": config.family,
        "dtype": dtype.name,
        "torch_dtype": dtype.name,  # transformers 4's name for it
        "bos_token_id": special.bos,
        "eos_token_id": special.eos,
        "pad_token_id": special.pad,
    }


@contextlib.contextmanager
def _folder(directory: AnyPath, replace: bool, made_from: str | None) -> Iterator[tuple[Path, Finished]]:
    """A directory to fill, and what of it is there already."""
    if made_from is not None and not replace:
        with resumable_directory(directory, made_from) as (folder, done):
            yield folder, done
    else:
        with atomic_directory(directory, replace=replace) as folder:
            yield folder, set()


Part = tuple[str, int | None]


def _stored_tensors(config: ModelConfig, dtype: np.dtype) -> dict[str, tuple[TensorInfo, list[Part]]]:
    """Every tensor of the files, and the parts of ours that it holds, in their order."""
    family, found = FAMILIES[config.family], {}
    for name, expert in part_names(config):
        spec, stored = schema(config)[name], family.hf_stored(config, name)
        sizes = axis_sizes(spec.axes, spec.shape)
        stored = stored if expert is None else stored.tensor(expert)
        found.setdefault(stored.name, (TensorInfo(stored.shape(sizes), dtype), []))[1].append((name, expert))
    return found


class _Tensors:
    """Gives tensors as they are stored, one at a time, and reports what has been given."""

    def __init__(self, parts: Parts, dtype: np.dtype, progress: Callable[[int, int], None]):
        self._parts, self._dtype, self._progress = parts, dtype, progress
        self._all = _stored_tensors(parts.config, dtype)
        self._total, self._given = sum(info.nbytes for info, _ in self._all.values()), 0

    def __call__(self, names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
        # What comes before was written by a run that was interrupted.
        first = list(self._all).index(next(iter(names)))
        self._given = sum(info.nbytes for info, _ in list(self._all.values())[:first])
        for name in names:
            yield name, self._tensor(name)
            self._given += self._all[name][0].nbytes
            self._progress(self._given, self._total)

    def _tensor(self, name: str) -> np.ndarray:
        found = [self._part(name, *part) for part in self._all[name][1]]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _part(self, tensor: str, name: str, expert: int | None) -> np.ndarray:
        config = self._parts.config
        stored, axes = FAMILIES[config.family].hf_stored(config, name), schema(config)[name].axes
        if expert is not None:
            stored, axes = stored.tensor(expert), axes[1:]
        return _cast(tensor, to_stored(stored, axes, self._parts.read(name, expert)), self._dtype)


def check_exportable(config: ModelConfig) -> dict[str, Any]:
    """The config.json fields of a model's architecture; raises ConfigError if the format cannot express it: what is
    written is read again, and must be the same model, but for a scale of embeddings that parameters can take up."""
    return _expressed(config)[0]


def _expressed(config: ModelConfig) -> tuple[dict[str, Any], ModelConfig]:
    """The fields, and the model as they say it."""
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
    read = family.from_hf(fields)
    if differences := _differences(dataclasses.replace(config, embed_scale=read.embed_scale), read):
        raise ConfigError(
            f"a Hugging Face config.json of {config.family} cannot say what this model is: {differences}. Where only "
            "sizes differ from layer to layer, pad it (`--pad`; its outputs stay the same); or keep it as a checkpoint "
            "of ours."
        )
    return fields, read


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


def _cast(name: str, tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = tensor.astype(dtype, copy=False)
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
