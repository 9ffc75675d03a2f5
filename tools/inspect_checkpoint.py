"""What a checkpoint is, without reading its arrays: configuration, and every tensor with axes, shape, dtype and size.

    python tools/inspect_checkpoint.py PATH
    python tools/inspect_checkpoint.py PATH --fsdp 8 --tensor 4     # and what a device of such a mesh would hold

PATH is a checkpoint of ours, a Hugging Face directory, a .gguf file or a run's directory. The same as
`jaxdistill inspect PATH --tensors`, but for the mesh.
"""

from __future__ import annotations

import dataclasses
import math

import tyro

from jaxdistill.checkpoint.open import open_config
from jaxdistill.jobs.inspect import describe_path
from jaxdistill.models.schema import stacked_schema
from jaxdistill.sharding import DEFAULT_RULES, names_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is looked at."""

    path: tyro.conf.Positional[str]
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1


def main(options: Options) -> None:
    print(describe_path(options.path, tensors=True))
    sizes = {"fsdp": options.fsdp, "tensor": options.tensor, "expert": options.expert}
    if max(sizes.values()) > 1:
        print("\n".join(on_a_mesh(options.path, sizes)))


def on_a_mesh(path: str, sizes: dict[str, int]) -> list[str]:
    """Each leaf's shape on one device under the default rules, and how many numbers that is in all."""
    lines, total = [], 0
    for leaf_path, leaf in stacked_schema(open_config(path)).items():
        shape = []
        for axis, size in zip(leaf.axes, leaf.shape, strict=True):
            split = math.prod(sizes.get(mesh_axis, 1) for mesh_axis in names_of(DEFAULT_RULES.table.get(axis or "")))
            # As `sharding.Layout` does: vectors, and what does not divide, are whole.
            shape.append(size // split if len(leaf.spec.axes) > 1 and size % split == 0 else size)
        total += math.prod(shape)
        lines.append(f"{'.'.join(leaf_path)}: {' x '.join(map(str, shape))} of {' x '.join(map(str, leaf.shape))}")
    mesh = ", ".join(f"{name} {size}" for name, size in sizes.items())
    return [f"\non one device of a mesh with {mesh}:", *lines, f"{total:,} numbers"]


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
