"""Puts one fault at a time into a copy of the repository and asks whether the tests notice it.

    python tools/mutate.py                  all faults of tools/mutations.toml
    python tools/mutate.py --only packing   those with this word in their name or file
    python tools/mutate.py --list

Quick tests first; faults that those do not notice meet the slow ones. A fault that no test notices ("SURVIVED") shows a
missing test; write it, or make the one there sharper. The exit status is 1 then. Faults are exact pieces of source
text: where the code has moved on, the tool says which entries to update. The working tree is never changed.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_name("mutations.toml")
COPIED = ("jaxdistill", "tests", "configs", "tools", "docs", "pyproject.toml", "README.md", "Makefile")
"""What tests may read; environments, caches and runs are not copied."""

QUICK, SLOW = "not slow and not real and not parity", "slow and not real and not parity"
LIMIT_SECONDS = 600
CAUGHT, SURVIVED, TIMED_OUT, NOT_RUN = "caught", "SURVIVED", "TIMED OUT", "NOT RUN"
NO_TESTS = 5
"""Pytest's exit status where its markers left nothing to run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutation:
    """One fault: `before`, which occurs exactly once in `file`, becomes `after`. tests: pytest's node ids."""

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Outcome:
    mutation: Mutation
    result: str
    seconds: float


def read_table(path: Path = TABLE) -> list[Mutation]:
    """The mutations of a table, in its order; entries with other fields than those of `Mutation` raise TypeError."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["mutation"]
    return [Mutation(**entry | {"tests": tuple(entry["tests"])}) for entry in entries]


def problems(root: Path, mutations: Sequence[Mutation]) -> list[str]:
    """Why entries cannot be applied to this source, one line each."""
    found = [
        f"{name}: {count} entries have this name"
        for name, count in collections.Counter(m.name for m in mutations).items()
        if count > 1
    ]
    for mutation in mutations:
        path = root / mutation.file
        count = path.read_text(encoding="utf-8").count(mutation.before) if path.is_file() else 0
        if count != 1:
            found.append(f"{mutation.name}: `before` occurs {count} times in {mutation.file}, once is needed")
        if mutation.before == mutation.after:
            found.append(f"{mutation.name}: `after` is `before`")
        if not mutation.tests:
            found.append(f"{mutation.name}: no tests are named")
        found += [f"{mutation.name}: there is no test {test}" for test in mutation.tests if not _exists(root, test)]
    return found


def _exists(root: Path, test: str) -> bool:
    """Whether a node id names a file and, if it goes on, a function in it; parameters are left to pytest."""
    file, _, function = test.partition("::")
    path = root / file
    if not function or not path.is_file():
        return path.exists() and not function
    name = re.escape(function.partition("[")[0])
    return re.search(rf"^def {name}\(", path.read_text(encoding="utf-8"), re.MULTILINE) is not None


def copy_repository(root: Path, target: Path) -> None:
    """The parts of the repository that tests read, without compiled files: those are told apart by seconds only, and
    two faults of one file can follow each other faster."""
    target.mkdir(parents=True)
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (root / name).exists():
            shutil.copy2(root / name, target / name)


def pytest(copy: Path, markers: str, *arguments: str, limit: float | None = None) -> int:
    """Exit status of pytest in a copy, whose own package is imported. limit: in seconds; it is quiet then, and raises
    `subprocess.TimeoutExpired`."""
    environment = os.environ | {
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
        # Programs that a fault does not touch are compiled once, by the first run of all tests.
        "JAX_COMPILATION_CACHE_DIR": str(copy.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", markers, *arguments]
    output = None if limit is None else subprocess.DEVNULL
    return subprocess.run(
        command, cwd=copy, env=environment, stdout=output, stderr=output, check=False, timeout=limit
    ).returncode


def attempt(copy: Path, mutation: Mutation, markers: str) -> Outcome:
    """Runs the tests of one fault that have these markers in a copy, and takes the fault out again."""
    path = copy / mutation.file
    original = path.read_text(encoding="utf-8")
    path.write_text(original.replace(mutation.before, mutation.after), encoding="utf-8")
    began = time.perf_counter()
    try:
        status = pytest(copy, markers, "-x", *mutation.tests, limit=LIMIT_SECONDS)
        # 1: a test failed. 2 and more: nothing ran, so nothing was caught.
        result = {0: SURVIVED, 1: CAUGHT}.get(status, f"{NOT_RUN} (pytest status {status})")
    except subprocess.TimeoutExpired:
        result = TIMED_OUT
    finally:
        path.write_text(original, encoding="utf-8")
    return Outcome(mutation, result, time.perf_counter() - began)


def run_all(copies: Sequence[Path], mutations: Sequence[Mutation], markers: str) -> list[Outcome] | None:
    """Every fault, as many at a time as there are copies, with a line for each as it ends. None: tests with these
    markers fail on the code as it is."""
    tests = list(dict.fromkeys(test for m in mutations for test in m.tests))
    print(f"{len(mutations)} faults, {len(copies)} at a time; first their tests on the code as it is", flush=True)
    # Separate processes only where several are wanted: pytest-xdist is not needed otherwise.
    parallel = ["-n", str(len(copies))] if len(copies) > 1 else []
    if pytest(copies[0], markers, *parallel, *tests) not in (0, NO_TESTS):
        return None
    free: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for copy in copies:
        free.put(copy)

    def one(mutation: Mutation) -> Outcome:
        copy = free.get()
        try:
            return attempt(copy, mutation, markers)
        finally:
            free.put(copy)

    outcomes: list[Outcome] = []
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        pool = concurrent.futures.ThreadPoolExecutor(len(copies))
        stack.callback(pool.shutdown, cancel_futures=True)
        for future in concurrent.futures.as_completed([pool.submit(one, mutation) for mutation in mutations]):
            outcomes.append(future.result())
            each = (time.perf_counter() - began) / len(outcomes)
            print(
                f"[{len(outcomes):3}/{len(mutations)}] {_line(outcomes[-1])}   "
                f"({60 / each:.0f} a minute, {each * (len(mutations) - len(outcomes)):.0f} s left)",
                flush=True,
            )
    return outcomes


def try_quick_then_slow(copies: Sequence[Path], mutations: Sequence[Mutation]) -> list[Outcome] | None:
    """An outcome for each fault, in the table's order; None: tests fail on the code as it is."""
    outcomes: dict[str, Outcome] = {}
    left = mutations
    for markers in (QUICK, SLOW):
        found = run_all(copies, left, markers) if left else []
        if found is None:
            return None
        for outcome in found:
            quick = outcomes.get(outcome.mutation.name)
            if quick is None or quick.result.startswith(NOT_RUN) or outcome.result == CAUGHT:
                outcomes[outcome.mutation.name] = outcome
        left = [m for m in mutations if outcomes[m.name].result != CAUGHT]
    return [outcomes[m.name] for m in mutations]


def _line(outcome: Outcome) -> str:
    return f"{outcome.result:9} {outcome.seconds:5.1f} s  {outcome.mutation.name}"


def summary(outcomes: Sequence[Outcome]) -> str:
    """Faults by file, and every one that was not caught."""
    by_file: dict[str, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda o: o.mutation.file):
        by_file.setdefault(outcome.mutation.file, []).append(outcome)
    width = max(map(len, by_file))
    lines = [f"{'file':{width}}  faults  caught  seconds"]
    for file, some in by_file.items():
        caught = sum(o.result == CAUGHT for o in some)
        lines.append(f"{file:{width}}  {len(some):6}  {caught:6}  {sum(o.seconds for o in some):7.1f}")
    missed = [o for o in outcomes if o.result != CAUGHT]
    lines += [f"{_line(o)} ({o.mutation.file}; {' '.join(o.mutation.tests)})" for o in missed]
    lines.append(f"{len(outcomes) - len(missed)} of {len(outcomes)} faults caught")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, *, root: Path = ROOT, table: Path = TABLE) -> int:
    """0: every fault was caught. 1: some were not. 2: nothing could be tried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="WORD", default="", help="faults with this in their name or file")
    parser.add_argument("--list", action="store_true", help="print the faults and stop")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="faults tried at a time")
    options = parser.parse_args(arguments)
    mutations = [m for m in read_table(table) if options.only in m.name or options.only in m.file]
    if not mutations:
        print(f"no fault has {options.only!r} in its name or file; see --list.")
        return 2
    if options.list:
        print("\n".join(f"{m.file:40} {m.name}" for m in mutations))
        return 0
    if found := problems(root, mutations):
        print(f"The source has moved on; update {table.name}:", *found, sep="\n  ")
        return 2
    jobs = max(1, min(options.jobs, len(mutations)))
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutate-") as temporary:
        copies = [Path(temporary) / f"copy{index}" for index in range(jobs)]
        for copy in copies:
            copy_repository(root, copy)
        outcomes = try_quick_then_slow(copies, mutations)
    if outcomes is None:
        print("The tests fail on the code as it is; nothing can be learnt from faults before they pass.")
        return 2
    print(summary(outcomes), f"in {time.perf_counter() - began:.0f} s")
    return 0 if all(o.result == CAUGHT for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
