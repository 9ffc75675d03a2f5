"""A Hugging Face directory as a checkpoint of ours, which Orbax reads shard by shard.

    python tools/convert_hf_to_orbax.py SOURCE DESTINATION --dtype bfloat16

The model need not fit into memory; what was interrupted goes on with the same command. The same as
`jaxdistill convert SOURCE DESTINATION`.
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


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    convert_model(options.source, options.destination, to="jaxdistill", dtype=options.dtype)
