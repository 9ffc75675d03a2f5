"""What a checkpoint is, without reading its arrays: configuration, and every tensor with axes, shape, dtype and size.

    python tools/inspect_checkpoint.py PATH
    python tools/inspect_checkpoint.py PATH --fsdp 8 --tensor 4     # and what a device of such a mesh would hold

PATH is a checkpoint of ours, a Hugging Face directory, a .gguf file or a run's directory; on a mesh is the student that
the run has written. The same as `jaxdistill inspect PATH --tensors`, but for the mesh.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import jax
import tyro

from jaxdistill.checkpoint.open import open_config
from jaxdistill.formats.paths import any_path
from jaxdistill.jobs.inspect import describe_path, is_run
from jaxdistill.models.schema import leaf_at, param_shardings, stacked_schema
from jaxdistill.sharding import Layout


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
    config = open_config(model_of(path))
    # Devices are not asked for anything: a mesh of their number and names tells how leaves are split.
    layout = Layout(cast(Any, jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))))
    shardings = param_shardings(config, layout)
    lines, total = [], 0
    for leaf_path, leaf in stacked_schema(config).items():
        shape = leaf_at(shardings, leaf_path).shard_shape(leaf.shape)
        total += math.prod(shape)
        lines.append(f"{'.'.join(leaf_path)}: {' x '.join(map(str, shape))} of {' x '.join(map(str, leaf.shape))}")
    mesh = ", ".join(f"{name} {size}" for name, size in sizes.items())
    return [f"\non one device of a mesh with {mesh}:", *lines, f"{total:,} numbers"]


def model_of(path: str) -> str:
    """The path itself, or of a run's directory the student in it."""
    if not is_run(any_path(path)):
        return path
    student = any_path(path) / "student"
    if not student.is_dir():
        raise SystemExit(
            f"{path} is a run that has not written its student yet, so there is no model to lay out on a mesh. "
            "Give a model, or leave --fsdp, --tensor and --expert out."
        )
    return str(student)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
