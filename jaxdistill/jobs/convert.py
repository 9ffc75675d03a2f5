"""From any format that we read to a checkpoint of ours or a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import jax.numpy as jnp

from jaxdistill.checkpoint.model import save_model
from jaxdistill.checkpoint.open import Model, open_config, open_model
from jaxdistill.formats.paths import local_path
from jaxdistill.jobs.inspect import describe_path
from jaxdistill.jobs.stage import stage, whole_machine
from jaxdistill.models.export import check_exportable, write_hf
from jaxdistill.models.padding import pad_layers, padded_config
from jaxdistill.models.schema import count_parameters


def convert_model(
    source: str, destination: str, *, to: Literal["jaxdistill", "hf"], dtype: str, pad: bool = False
) -> Path:
    """Writes the model and its tokenizer into a new directory, says what it is, and returns the directory. pad: with
    all layers as wide as the widest (`models.padding`).

    Raises FileExistsError before anything is read when the destination holds something.
    """
    target = local_path(destination)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{destination} exists and is not empty. Choose another name or move it.")
    config = open_config(source)
    if to == "hf":
        check_exportable(padded_config(config) if pad else config)
    with stage(f"reading {count_parameters(config):,} parameters from {source}"):
        layout = whole_machine()
        model = open_model(source, layout=layout, dtype=jnp.dtype(dtype))
    if pad:
        with stage("padding the layers"):
            model = Model(*pad_layers(model.config, model.params, layout=layout), model.tokenizer)
    with stage(f"writing {destination}"):
        if to == "hf":
            write_hf(target, model.config, model.params, dtype=dtype, tokenizer=model.tokenizer)
        else:
            save_model(target, model.config, model.params, write_tokenizer=model.tokenizer.save)
    print(describe_path(destination))
    return target
