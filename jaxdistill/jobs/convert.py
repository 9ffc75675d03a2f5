"""From any format that we read to a checkpoint of ours or a Hugging Face directory, part by part."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax.numpy as jnp

from jaxdistill import __version__
from jaxdistill.checkpoint.model import is_model
from jaxdistill.checkpoint.open import open_config, open_model
from jaxdistill.checkpoint.parts import SavedInParts, save_parts
from jaxdistill.formats.paths import any_path, state_of
from jaxdistill.jobs.inspect import describe_path
from jaxdistill.jobs.stage import counted_bytes, stage, whole_machine
from jaxdistill.models.export import check_exportable, write_hf_parts
from jaxdistill.models.load import CheckpointInParts, open_checkpoint
from jaxdistill.models.padding import pad_layers, padded_config
from jaxdistill.models.parts import ParamsInParts, Parts
from jaxdistill.models.schema import count_parameters
from jaxdistill.tokenizers import load_tokenizer


def convert_model(
    source: str, destination: str, *, to: Literal["jaxdistill", "hf"], dtype: str, pad: bool = False
) -> Path:
    """Writes the model and its tokenizer into a new directory, says what it is, and returns the directory. pad: with
    all layers as wide as the widest (`models.padding`), for which the model has to fit into memory.

    Otherwise one parameter of one layer is in memory at a time, or two. Raises FileExistsError before anything is read
    when the destination holds something.
    """
    target = any_path(destination)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{destination} exists and is not empty. Choose another name or move it.")
    config, tokenizer = open_config(source), load_tokenizer(source)
    if to == "hf":
        check_exportable(padded_config(config) if pad else config)
    with (_padded if pad else open_parts)(source) as parts:
        what = f"writing {count_parameters(parts.config):,} parameters from {source} to {destination}"
        with counted_bytes(what) as progress:
            if to == "hf":
                options = {"tokenizer": tokenizer, "source": _state_of(source), "progress": progress}
                write_hf_parts(target, parts, dtype=dtype, **options)
            else:
                save_parts(
                    target,
                    parts,
                    dtype=jnp.dtype(dtype),
                    source=_state_of(source),
                    write_tokenizer=tokenizer.save,
                    progress=progress,
                )
    print(describe_path(destination))
    return target


@contextlib.contextmanager
def open_parts(source: str) -> Iterator[Parts]:
    """A model of any format, read part by part."""
    if is_model(source):
        yield SavedInParts.open(source)
        return
    with open_checkpoint(source) as checkpoint:
        yield CheckpointInParts(checkpoint)


@contextlib.contextmanager
def _padded(source: str) -> Iterator[Parts]:
    layout = whole_machine()
    with stage(f"reading {source}"):
        model = open_model(source, layout=layout)
    with stage("padding the layers"):
        yield ParamsInParts(*pad_layers(model.config, model.params, layout=layout))


def _state_of(source: str) -> str:
    """What the parts that are written depend on: this program's version, the path, and what would change with its
    files."""
    path = any_path(source).absolute()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = [(str(file.relative_to(path)), state_of(file)) for file in files if file.is_file()]
    return f"jaxdistill {__version__}: {path} {found}"
