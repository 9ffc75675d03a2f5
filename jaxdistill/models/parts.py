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
