"""A model moved to another tokenizer, before it learns anything: its tables made anew, all else as it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from jaxdistill.checkpoint.model import save_model
from jaxdistill.checkpoint.open import open_config, open_model
from jaxdistill.choices import check_choices
from jaxdistill.formats.paths import any_path
from jaxdistill.jobs.stage import stage, whole_machine
from jaxdistill.models.export import check_exportable, write_hf
from jaxdistill.retokenize import check_suffixes, retokenize_model
from jaxdistill.specs import SuffixTable
from jaxdistill.tokenizers import load_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetokenizeConfig:
    """What is moved where, as in `jaxdistill retokenize --help`."""

    model: str
    tokenizer: str
    out: str
    multiple: int
    seed: int
    to: Literal["jaxdistill", "hf"]
    dtype: str
    suffixes: bool

    def __post_init__(self):
        check_choices(self)


def retokenize(config: RetokenizeConfig) -> Path:
    """Writes OUT, a model with its new tokenizer, and returns its path. Refuses an OUT that exists, and a model that
    the format cannot hold, before any array is read."""
    out = any_path(config.out)
    if out.exists():
        raise FileExistsError(f"{out} exists. Choose another --out, or move it.")
    tokenizer, source = load_tokenizer(config.tokenizer), open_config(config.model)
    check_suffixes(source, tokenizer, suffixes=config.suffixes)
    if config.to == "hf":
        # How large it is does not matter here: a table of suffixes has no place in the format.
        check_exportable(
            dataclasses.replace(source, suffixes=SuffixTable(vocab=1, nodes=1) if config.suffixes else None)
        )
    layout = whole_machine()
    with stage(f"opening {config.model}"):
        model = open_model(config.model, layout=layout, dtype=jnp.dtype(config.dtype))
    with stage("making the embedding"):
        shape, params, rows = retokenize_model(
            model.config,
            model.params,
            model.tokenizer,
            tokenizer,
            key=jax.random.key(config.seed),
            layout=layout,
            multiple=config.multiple,
            suffixes=config.suffixes,
        )
    print(f"{shape.vocab:,} ids: " + ", ".join(f"{count:,} {kind}" for kind, count in rows.counts.items()))
    with stage(f"writing {out}"):
        if config.to == "hf":
            write_hf(out, shape, params, dtype=config.dtype, tokenizer=tokenizer)
        else:
            save_model(out, shape, params, write_tokenizer=tokenizer.save)
    return out
