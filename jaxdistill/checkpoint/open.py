"""One way to open a model, whatever it is stored as: our own checkpoint, a Hugging Face directory, or a GGUF file."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxdistill.checkpoint.model import describe, is_model, load_model_checkpoint
from jaxdistill.formats.paths import AnyPath, any_path
from jaxdistill.models.load import CONFIG_NAME, model_config, read_model
from jaxdistill.sharding import Layout
from jaxdistill.specs import ModelConfig
from jaxdistill.tokenizers import Tokenizer, load_tokenizer
from jaxdistill.types import Params


@dataclasses.dataclass(frozen=True)
class Model:
    """A model in memory: what it is, its parameters in the stacked form, and the tokenizer it was trained with."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer


def open_model(path: AnyPath, *, layout: Layout = Layout(), dtype: Any = jnp.float32) -> Model:
    """Reads a model and its tokenizer, each array straight into its shards of the layout.

    path: a directory that `jaxdistill convert` wrote, a Hugging Face directory (config.json, safetensors,
    tokenizer.json or tokenizer.model), or a .gguf file. Raises with the missing or contradicting parts named.
    """
    tokenizer = load_tokenizer(path)
    read = load_model_checkpoint if is_model(path) else read_model
    config, params = read(path, layout=layout, dtype=dtype)
    return Model(config, params, tokenizer)


def has_model(path: AnyPath) -> bool:
    """Whether a path claims to be a model, rather than a tokenizer alone: what `open_model` opens, if it is whole."""
    place = any_path(path)
    return is_model(path) or (place / CONFIG_NAME).is_file() or place.suffix == ".gguf"


def open_config(path: AnyPath) -> ModelConfig:
    """What the model at a path is, without reading its arrays."""
    return describe(path).config if is_model(path) else model_config(path)
