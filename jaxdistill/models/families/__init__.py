"""The model families, keyed by Hugging Face's `model_type`. A new family is a new file and a row here."""

from __future__ import annotations

from collections.abc import Mapping

from jaxdistill.models.families.family import Family
from jaxdistill.models.families.llama import LLAMA
from jaxdistill.models.families.mixtral import MIXTRAL

FAMILIES: Mapping[str, Family] = {"llama": LLAMA, "mixtral": MIXTRAL}
