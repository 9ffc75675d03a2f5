"""Two processes save, one resumes and saves, two resume: arrays and every shard's data state, exactly."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from checkpoint_cases import abstract, all_bits, layout, train_state

from jaxdistill.checkpoint.run import Retention, RunCheckpoints


def test_two_processes_and_one_resume_each_other(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("two_processes.py")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    children = []
    for rank in range(2):
        with (tmp_path / f"{rank}.log").open("w") as log:
            command = [sys.executable, str(script), str(rank), str(port), str(tmp_path)]
            children.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment))
    try:
        for rank, child in enumerate(children):
            # Gloo writes lines of its own.
            assert "SAVED\n" in iter(child.stdout.readline, ""), (tmp_path / f"{rank}.log").read_text()[-3000:]
        checkpoints = RunCheckpoints(tmp_path, retention=Retention(last=2, best=0))
        assert checkpoints.steps() == [2, 3]
        assert sorted(p.name for p in (checkpoints.path(3) / "records").glob("*.json")) == [
            "data-00000-of-00002.json",
            "data-00001-of-00002.json",
            "info.json",
        ]
        original = train_state(layout())
        state, data, info = checkpoints.restore(3, abstract(layout(), original))
        assert all_bits(state) == all_bits(original)
        assert data == {str(shard): {"position": 10 * shard} for shard in range(8)}
        assert info == {"processes": 2}
        after = {str(shard): {"position": 10 * shard + 1} for shard in range(8)}
        checkpoints.save(4, train_state(layout(fsdp=2), seed=4), after, {"processes": 1})
        checkpoints.close()
        for rank, child in enumerate(children):
            output, _ = child.communicate(timeout=60)
            assert child.returncode == 0, (tmp_path / f"{rank}.log").read_text()[-3000:]
            result = json.loads(output.split("RESULT")[1])
            assert result == {"exact": True, "data": after, "info": {"processes": 1}, "steps": [3, 4]}
    finally:
        for child in children:
            child.kill()
            child.communicate()
