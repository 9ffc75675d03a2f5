"""What a step directory holds beside arrays: `info.json`, and the data state of each process with its checksum."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals, Future

from jaxdistill.checkpoint.arrays import CheckpointError
from jaxdistill.formats.paths import any_path, write_text

INFO_FILE = "info.json"


def check_json(value: Any, what: str) -> None:
    """Refuse what JSON would not give back unchanged (tuples, integer keys, arrays, nan)."""
    try:
        if json.loads(json.dumps(value, allow_nan=False)) == value:
            return
        problem = "it comes back from JSON changed (tuples become lists, keys become strings)"
    except (TypeError, ValueError) as error:
        problem = str(error)
    raise TypeError(
        f"{what} cannot be saved exactly: {problem}. Use dicts with string keys, lists, strings, finite numbers, "
        "booleans and None."
    )


def _data_file(process: int, processes: int) -> str:
    return f"data-{process:05d}-of-{processes:05d}.json"


def _digest(shards: Any) -> str:
    return hashlib.sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()


class RecordsHandler(ocp.AsyncCheckpointHandler):
    """Writes the records into the temporary step directory, before Orbax makes it final."""

    async def async_save(self, directory: Path, args: Records) -> list[Future]:
        """Process 0 writes the info; every process writes the shards that it owns.

        The text is formed here, so that the caller's iterator may go on; it is written in the background.
        """
        data = {"sha256": _digest(args.shards), "shards": args.shards}
        texts = {_data_file(jax.process_index(), jax.process_count()): json.dumps(data, indent=1)}
        if jax.process_index() == 0:
            texts[INFO_FILE] = json.dumps(args.info, indent=1)

        async def write() -> None:
            for name, text in texts.items():
                write_text(any_path(directory) / name, text)

        return [CommitFutureAwaitingContractedSignals(write(), name="records")]

    def save(self, directory: Path, args: Records) -> None:
        raise NotImplementedError("records are saved by an AsyncCheckpointer.")

    def restore(self, directory: Path, args: Records) -> dict[str, Any]:
        return read_shards(any_path(directory))


@ocp.args.register_with_handler(RecordsHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class Records(ocp.args.CheckpointArgs):
    info: Mapping[str, Any]
    shards: Mapping[str, Any]


def read_info(directory: Path) -> dict[str, Any]:
    return json.loads((directory / INFO_FILE).read_text())


def read_shards(directory: Path) -> dict[str, Any]:
    """The data state of every shard, whichever process saved it.

    Refuses when any of it is missing, damaged or there twice: guessing would silently repeat or skip data.
    """
    processes = read_info(directory)["processes"]
    shards: dict[str, Any] = {}
    for process in range(processes):
        path = directory / _data_file(process, processes)
        try:
            document = json.loads(path.read_text())
            owned, digest = document["shards"], document["sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, f"cannot be read ({type(error).__name__}: {error})") from error
        if _digest(owned) != digest:
            raise _damaged(path, "does not match its checksum")
        if twice := sorted(shards.keys() & owned.keys()):
            raise _damaged(path, f"holds the shards {twice}, which another process saved as well")
        shards |= owned
    return shards


def _damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"the data state {path} {problem}. Resuming without it would repeat or skip data; resume from another "
        "checkpoint of the run."
    )
