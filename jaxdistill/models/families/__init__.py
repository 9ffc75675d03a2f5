"""The model families, keyed by Hugging Face's `model_type`. A new family is a new file and a row here."""

from __future__ import annotations

from collections.abc import Mapping

from jaxdistill.models.families.family import Family
from jaxdistill.models.families.gemma import GEMMA, GEMMA2, GEMMA3
from jaxdistill.models.families.llama import LLAMA
from jaxdistill.models.families.mistral import MISTRAL
from jaxdistill.models.families.mixtral import MIXTRAL
from jaxdistill.models.families.nemotron import NEMOTRON
from jaxdistill.models.families.olmo2 import OLMO2
from jaxdistill.models.families.phi3 import PHI3
from jaxdistill.models.families.qwen import QWEN2, QWEN3
from jaxdistill.models.families.qwen3_moe import QWEN3_MOE
from jaxdistill.models.families.smollm3 import SMOLLM3

FAMILIES: Mapping[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "phi3": PHI3,
    "olmo2": OLMO2,
    "nemotron": NEMOTRON,
    "smollm3": SMOLLM3,
}
