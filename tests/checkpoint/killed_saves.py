"""Saves that are killed at random moments; run as `python killed_saves.py DIR TRIALS`. Prints one JSON line per kill.

Each trial is a forked process (imports are paid once): it checks that what its predecessors left restores exactly,
then saves without end, first the latest step again, then new ones, until SIGKILL. That comes after some whole saves,
somewhere in the time that the next one takes, however fast the machine is at the moment.
"""

import json
import os
import random
import signal
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax  # noqa: F401  imported before the fork
import orbax.checkpoint  # noqa: F401  imported before the fork

from jaxdistill.checkpoint.run import Retention, RunCheckpoints

SIZE = 1 << 19


def values(step):
    return np.arange(SIZE, dtype=np.float32) * (step + 1)


def trial(directory, report):
    checkpoints = RunCheckpoints(directory, retention=Retention(last=2, best=0))
    leaf = jax.ShapeDtypeStruct((SIZE,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    steps = checkpoints.steps()
    exact = True
    for step in steps:
        state, data, info = checkpoints.restore(step, {"weights": leaf})
        exact &= np.array_equal(state["weights"], values(step)) and data == {"0": {"at": step}} and info == {"at": step}
    torn = len(checkpoints.torn())
    step = steps[-1] if steps else 0
    os.write(report, json.dumps({"steps": steps, "exact": bool(exact), "torn": torn}).encode() + b"\n")
    while True:
        started = time.monotonic()
        checkpoints.save(step, {"weights": jnp.asarray(values(step))}, {"0": {"at": step}}, {"at": step})
        checkpoints.wait()
        os.write(report, f"{time.monotonic() - started}\n".encode())
        step += 1


def main():
    directory = sys.argv[1]
    warnings.filterwarnings("ignore", message=".*fork.*")
    moments, one_save = random.Random(0), 0.0
    for at in range(int(sys.argv[2])):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                trial(directory, write)
            finally:
                os._exit(1)
        os.close(write)
        with os.fdopen(read) as lines:
            line = json.loads(lines.readline() or "{}")
            for _ in range((1, 0, 2)[at % 3]):  # the first leaves a checkpoint, every third a new step
                one_save = float(lines.readline() or 0)
            time.sleep(moments.uniform(0.0, one_save))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(json.dumps(line | {"killed": os.WIFSIGNALED(status)}), flush=True)


if __name__ == "__main__":
    main()
