"""A job in a process of its own: `python job.py train|prune|search FILES OUT [RANK PORT]`; with a rank, one of two
processes, which writes what it got beside OUT.
"""

import sys
from pathlib import Path

import jax

kind, root, out, rank, port = (*sys.argv[1:], None, None)[:5]
if rank is not None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import dataclasses  # noqa: E402
import json  # noqa: E402
import time  # noqa: E402

from train_cases import Files, run  # noqa: E402

from jaxdistill.search import search  # noqa: E402
from jaxdistill.sharding import MeshConfig  # noqa: E402
from jaxdistill.train import progress  # noqa: E402


def slower(self, line, said=progress.Say.progress):
    # A signal that is sent at a line shall find the run still going.
    said(self, line)
    time.sleep(0.3)


files, out, devices = Files(Path(root)), Path(out), 1 if rank is None else jax.device_count()
if kind == "train":
    progress.Say.progress = slower
    run(files.config(out, export="none" if rank is None else "jaxdistill"), devices=devices)
elif kind == "prune":
    mesh = MeshConfig(tensor=jax.local_device_count())
    run(files.pruning(out, mesh=mesh), devices=devices).plan.save(out.parent / f"{rank}.json")
elif kind == "search":
    ranked = run(files.searching(out, candidates=2), job=search, devices=devices)
    (out.parent / f"{rank}.json").write_text(json.dumps([dataclasses.asdict(row) for row in ranked]))
if rank is not None:
    jax.distributed.shutdown()
