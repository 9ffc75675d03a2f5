"""One run in a process of its own: `python job.py FILES OUT [RANK PORT]`; with a rank, one of two processes."""

import sys
from pathlib import Path

import jax

if len(sys.argv) > 3:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{sys.argv[4]}", 2, int(sys.argv[3]))

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import time  # noqa: E402

from train_cases import Files, run  # noqa: E402

from jaxdistill.train import progress  # noqa: E402


def slower(self, line, said=progress.Say.progress):
    # A signal that is sent at a line shall find the run still going.
    said(self, line)
    time.sleep(0.3)


progress.Say.progress = slower
both = jax.process_count() == 2
config = Files(Path(sys.argv[1])).config(Path(sys.argv[2]), export="jaxdistill" if both else "none")
run(config, devices=jax.device_count() if both else 1)
if len(sys.argv) > 3:
    jax.distributed.shutdown()
