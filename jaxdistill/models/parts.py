"""Models that are read part by part on the host, so that none has to fit into memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import jax
import numpy as np

from jaxdistill.models.schema import leaf_at, locate, schema
from jaxdistill.specs import ModelConfig
from jaxdistill.types import Params


class Parts(Protocol):
    """A model's parameters by their per-layer names, one at a time."""

    @property
    def config(self) -> ModelConfig: ...

    def read(self, name: str, expert: int | None = None) -> np.ndarray:
        """A parameter in our layout, in the dtype that it has; of experts' kernels one expert's, without that axis."""
        ...


@dataclasses.dataclass(frozen=True)
class RescaledParts:
    """A model whose embeddings enter with another scale, and the same model: its table has the rest of the old scale as
    a factor. Where that table is the head as well, the final norm takes the factor off again."""

    parts: Parts
    embed_scale: float

    @property
    def config(self) -> ModelConfig:
        return dataclasses.replace(self.parts.config, embed_scale=self.embed_scale)

    def read(self, name: str, expert: int | None = None) -> np.ndarray:
        value, config = self.parts.read(name, expert), self.parts.config
        factor = np.float32(config.embed_scale / self.embed_scale)
        if factor != 1 and name.endswith("embedding.kernel"):
            return np.multiply(value, factor, dtype=np.float32)
        if factor != 1 and config.tied and name.startswith("final_norm."):
            kept = np.float32(config.norm.one_plus and name.endswith("scale"))
            return (value.astype(np.float32) + kept) / factor - kept
        return value


def part_names(config: ModelConfig) -> Iterator[tuple[str, int | None]]:
    """What `Parts.read` is asked for, all of it: names in the model's order, and experts one by one."""
    for name, spec in schema(config).items():
        by_expert = len(spec.axes) > 1 and spec.axes[0] == "experts"
        yield from ((name, expert) for expert in range(spec.shape[0])) if by_expert else ((name, None),)


@dataclasses.dataclass(frozen=True)
class ParamsInParts:
    """Parameters in memory: each part is brought to the host when it is read."""

    config: ModelConfig
    params: Params

    def read(self, name: str, expert: int | None = None) -> np.ndarray:
        path, layer = locate(self.config, name)
        found = leaf_at(self.params, path)
        # Traced indices: one program for all layers of a leaf.
        for index in (layer, expert):
            if index is not None:
                found = jax.lax.dynamic_index_in_dim(found, index, keepdims=False)
        return np.asarray(found)
