"""SIGKILL at random moments of a save: whatever was whole stays whole, and the run goes on from it."""

import json
import subprocess
import sys
from pathlib import Path

TRIALS = 8


def test_whole_checkpoints_survive_kills_at_random_moments(tmp_path):
    script = Path(__file__).with_name("killed_saves.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "checkpoints"), str(TRIALS)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    trials = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(trials) == TRIALS, done.stderr[-2000:]
    assert all(trial["killed"] and trial["exact"] for trial in trials), (trials, done.stderr[-2000:])
    latest = [max(trial["steps"], default=-1) for trial in trials]
    assert all(trial["steps"] for trial in trials[1:])
    assert latest == sorted(latest)
    assert latest[-1] > latest[1], "no trial got a new step done"
    assert sum(trial["torn"] > 0 for trial in trials) >= 1, "no kill hit a save"
