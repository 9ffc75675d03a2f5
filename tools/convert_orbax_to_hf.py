"""A checkpoint of ours as a Hugging Face directory that transformers loads.

    python tools/convert_orbax_to_hf.py SOURCE DESTINATION --dtype bfloat16

The model need not fit into memory. Layers that differ in ways that a config.json cannot say are refused, by name;
`--pad` makes them alike, with the same outputs. The same as `jaxdistill convert SOURCE DESTINATION --to hf`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import tyro

from jaxdistill.jobs.convert import convert_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is converted."""

    source: tyro.conf.Positional[str]
    destination: tyro.conf.Positional[str]
    dtype: Literal["float32", "bfloat16"] = "float32"
    pad: bool = False


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    convert_model(options.source, options.destination, to="hf", dtype=options.dtype, pad=options.pad)
