"""A GGUF file, whatever it is quantised to, as a checkpoint of ours or a Hugging Face directory.

    python tools/convert_gguf.py MODEL.gguf DESTINATION
    python tools/convert_gguf.py MODEL.gguf DESTINATION --to hf --dtype bfloat16

Tensors are dequantised one at a time by the reference implementation (the `gguf` package), so every kind that it knows
is read: Q4_0 to Q8_0, K-quants, IQ, ternary, MXFP4 and NVFP4. The same as `jaxdistill convert`.
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
    to: Literal["jaxdistill", "hf"] = "jaxdistill"
    dtype: Literal["float32", "bfloat16"] = "float32"


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    convert_model(options.source, options.destination, to=options.to, dtype=options.dtype)
