"""One of two processes: save together, wait until one process has resumed and saved, resume that.

Run as `python two_processes.py RANK PORT DIR`.
"""

import json
import sys
import time

import jax

jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_num_cpu_devices", 4)
rank = int(sys.argv[1])
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, rank)

import numpy as np  # noqa: E402
from checkpoint_cases import abstract, layout, train_state  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402

from jaxdistill.checkpoint.run import Retention, RunCheckpoints  # noqa: E402


def local_bits(tree):
    """The local shards of every leaf, to be compared between restored and rebuilt states."""
    is_key = lambda x: jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    leaves = [jax.random.key_data(x) if is_key(x) else x for x in jax.tree.leaves(tree)]
    return [np.asarray(s.data).tobytes() for x in leaves for s in x.addressable_shards]


def main():
    checkpoints = RunCheckpoints(sys.argv[3], retention=Retention(last=2, best=0))
    state = train_state(layout(fsdp=8))
    owned = {str(shard): {"position": 10 * shard} for shard in (range(3) if rank == 0 else range(3, 8))}
    for step in (1, 2, 3):
        checkpoints.save(step, state, owned, {"processes": 2})
    checkpoints.save(3, state, owned, {"processes": 2})
    checkpoints.wait()
    multihost_utils.sync_global_devices("saved")
    print("SAVED", flush=True)
    while checkpoints.latest() != 4:
        time.sleep(0.05)
    where = layout(fsdp=4, tensor=2)
    resumed, data, info = checkpoints.restore(4, abstract(where, state))
    exact = local_bits(resumed) == local_bits(train_state(where, seed=4))
    print("RESULT", json.dumps({"exact": exact, "data": data, "info": info, "steps": checkpoints.steps()}), flush=True)
    checkpoints.close()
    jax.distributed.shutdown()


main()
