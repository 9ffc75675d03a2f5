"""Checkpoints of a run: everything that a resume needs to go on bit for bit, in one atomic directory per step.

    RUN/checkpoints/step_00000100/arrays/                     the train state (Orbax)
                                 /records/info.json           configuration, versions, metric, description of leaves
                                 /records/data-00000-of-00002.json   data state of the shards that a process owned

A directory is written under a temporary name and renamed when everything is written, so a name `step_*` is a whole
checkpoint. A step that is saved again gets a new name (`step_00000100_r1`); the older one goes only afterwards. In an
object store nothing is renamed, and `commit_success.txt` is written last; where Orbax does not write itself, a
directory is made on a local disk and uploaded in the background.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxdistill.checkpoint import arrays, records
from jaxdistill.checkpoint.arrays import CheckpointError
from jaxdistill.checkpoint.retention import Retention, ranked
from jaxdistill.formats.paths import (
    AnyPath,
    any_path,
    copied_for_orbax,
    is_remote,
    needs_a_copy,
    remove_tree,
    staging_of,
    upload_tree,
    write_text,
)

_log = logging.getLogger(__name__)

FORMAT = "jaxdistill run checkpoint"
VERSION = 1
_NAME = re.compile(r"step_(\d{8,})(?:_r(\d+))?")
_COMMITTED = "commit_success.txt"
_CONTENT = {"arrays", "records", "_CHECKPOINT_METADATA", _COMMITTED}


@dataclasses.dataclass(frozen=True)
class _Saved:
    """A whole checkpoint on disk."""

    path: Path
    revision: int
    info: dict[str, Any]


class RunCheckpoints:
    """The checkpoints of one run. Every process makes one, on a directory that all processes see, and calls alike.

    directory: made when absent; may hold other files, which are left alone.
    """

    def __init__(self, directory: AnyPath, *, retention: Retention = Retention()):
        self._directory = any_path(directory).absolute()
        if needs_a_copy(self._directory) and jax.process_count() > 1:
            raise CheckpointError(
                f"several processes cannot write checkpoints to {directory}. {arrays.WHERE_SEVERAL_WRITE}"
            )
        self._retention = retention
        self._pending: int | None = None
        self._uploads = ThreadPoolExecutor(1)
        self._upload: Future[None] | None = None
        self._directory.mkdir(parents=True, exist_ok=True)
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(arrays=arrays.handler(), records=records.RecordsHandler())
        )
        if torn := self.torn():
            _log.warning("ignoring unfinished checkpoints (they may be removed): %s", ", ".join(map(str, torn)))

    def save(
        self,
        step: int,
        state: Any,
        data_state: dict[str, Any],
        info: dict[str, Any],
        *,
        metric: float | None = None,
    ) -> None:
        """Start saving; returns when the arrays can be donated again. `wait` or the next `save` reports failures.

        state: pytree of jax arrays. data_state: JSON values per virtual shard, only the shards that this process
        owns. info: JSON values (resolved configuration, versions, metrics). metric: lower is better.
        Saving a step that exists replaces it, once the new checkpoint is whole.
        """
        records.check_json(data_state, "the data state")
        records.check_json(info, "the checkpoint's info")
        named = arrays.named_leaves(state)
        document = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "metric": None if metric is None or not math.isfinite(metric) else float(metric),
            "processes": jax.process_count(),
            "saved_at_unix_seconds": int(time.time()),
            "info": info,
            "leaves": arrays.specs_to_json(arrays.leaf_specs(named)),
        }
        self.wait()
        target = self._directory / self._new_name(step)
        staging = staging_of(self._directory) if needs_a_copy(self._directory) else None
        if staging is not None:
            remove_tree(staging)  # of an interrupted run
        place = (staging or self._directory) / target.name
        self._pending = step
        try:
            self._checkpointer.save(
                str(place),
                args=ocp.args.Composite(
                    arrays=arrays.save_args(named), records=records.Records(info=document, shards=data_state)
                ),
            )
        except Exception as error:
            raise self._failed(error) from error
        if staging is not None:
            self._upload = self._uploads.submit(self._send, place, target)

    def _send(self, made: Path, target: Path) -> None:
        self._checkpointer.wait_until_finished()
        (made / _COMMITTED).unlink(missing_ok=True)  # Orbax's; ours comes when all else is there
        upload_tree(made, target)
        write_text(target / _COMMITTED, "")
        remove_tree(made)

    def wait(self) -> None:
        """Block until the last save is whole on disk, then apply the retention. Raises CheckpointError if it failed."""
        upload, self._upload = self._upload, None
        try:
            if upload is None:
                self._checkpointer.wait_until_finished()
            else:
                upload.result()
        except Exception as error:
            raise self._failed(error) from error
        if self._pending is not None:
            self._pending = None
            if jax.process_index() == 0:
                self._apply_retention()

    def close(self) -> None:
        """Wait, then release the writer's threads."""
        try:
            self.wait()
        finally:
            self._uploads.shutdown()
            self._checkpointer.close()

    def steps(self) -> list[int]:
        """The steps of all whole checkpoints, ascending."""
        return sorted(self._saved())

    def latest(self) -> int | None:
        """The last whole checkpoint, or None."""
        return max(self._saved(), default=None)

    def best(self) -> int | None:
        """The whole checkpoint with the lowest metric, or None when none has one."""
        steps = ranked(self._metrics())
        return steps[0] if steps else None

    def torn(self) -> list[Path]:
        """What interrupted saves left behind, in name order: never read, never deleted (unless saved again)."""
        whole = {saved.path.name for revisions in self._all_saved().values() for saved in revisions}
        return sorted(
            path
            for path in self._entries()
            if re.match(r"step_\d{8}", path.name) and path.name not in whole and path.is_dir()
        )

    def path(self, step: int) -> Path:
        """The directory of a whole checkpoint."""
        return self._find(step).path

    def info(self, step: int) -> dict[str, Any]:
        """The info that was saved with a step, without reading arrays."""
        return self._find(step).info["info"]

    def restore(self, step: int, expected: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """(state, data state of *all* shards, info) of a step, exactly as saved, onto any mesh.

        expected: the state as `jax.ShapeDtypeStruct`s (or arrays) with shardings; each shard is read where it will
        live. Raises CheckpointError when leaves differ (all are listed) or anything is missing or damaged.
        """
        self.wait()
        saved = self._find(step)
        specs = arrays.specs_from_json(saved.info["leaves"])
        named = arrays.named_leaves(expected)
        arrays.check_leaves(specs, named, f"the checkpoint {saved.path}")
        shards = records.read_shards(saved.path / "records")
        try:
            with copied_for_orbax(saved.path) as path:
                args = ocp.args.Composite(arrays=arrays.restore_args(named))
                restored = self._checkpointer.restore(str(path), args=args)
        except Exception as error:
            raise CheckpointError(
                f"the arrays of {saved.path} cannot be read ({arrays.short(error)}); resume from another checkpoint "
                f"of the run: {[s for s in self.steps() if s != step]}."
            ) from error
        leaves = arrays.rewrap_keys(restored["arrays"], specs)
        state = jax.tree.unflatten(jax.tree.structure(expected), [leaves[name] for name in named])
        return state, shards, saved.info["info"]

    def _entries(self) -> list[Path]:
        """What is in the directory; in an object store an empty one does not exist."""
        return list(self._directory.iterdir()) if self._directory.is_dir() else []

    def _all_saved(self) -> dict[int, list[_Saved]]:
        """Whole checkpoints that this class saved, by step, oldest revision first."""
        found: dict[int, list[_Saved]] = {}
        for path in self._entries():
            if (match := _NAME.fullmatch(path.name)) is None or not _is_whole(path):
                continue
            try:
                info = records.read_info(path / "records")
                if info["format"] != FORMAT or info["step"] != int(match[1]):
                    continue
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if info["version"] > VERSION:
                raise CheckpointError(
                    f"{path} has format version {info['version']}, this jaxdistill reads up to {VERSION}; "
                    "use the jaxdistill that wrote it."
                )
            found.setdefault(info["step"], []).append(_Saved(path, int(match[2] or 0), info))
        return {step: sorted(revisions, key=lambda s: s.revision) for step, revisions in found.items()}

    def _saved(self) -> dict[int, _Saved]:
        return {step: revisions[-1] for step, revisions in self._all_saved().items()}

    def _metrics(self) -> dict[int, float | None]:
        return {step: saved.info["metric"] for step, saved in self._saved().items()}

    def _find(self, step: int) -> _Saved:
        saved = self._saved()
        if step not in saved:
            raise CheckpointError(f"{self._directory} has no checkpoint of step {step}; it has {sorted(saved)}.")
        return saved[step]

    def _new_name(self, step: int) -> str:
        """A name for this step that nothing on disk has, the same on all processes."""
        plain = f"step_{step:08d}"
        taken = [
            int(match[2] or 0)
            for path in self._entries()
            if (match := _NAME.fullmatch(path.name)) and int(match[1]) == step
        ]
        revision = max(taken, default=-1) + 1
        if jax.process_count() > 1:
            # Process 0 may be deleting older checkpoints while another one lists them.
            revision = int(multihost_utils.broadcast_one_to_all(np.int32(revision)))
        return plain if revision == 0 else f"{plain}_r{revision}"

    def _apply_retention(self) -> None:
        kept = self._retention.keeps(self._metrics())
        for step, revisions in self._all_saved().items():
            for saved in revisions[:-1] if step in kept else revisions:
                _delete(saved.path)

    def _failed(self, error: Exception) -> CheckpointError:
        step, self._pending = self._pending, None
        return CheckpointError(
            f"the checkpoint of step {step} in {self._directory} could not be written ({arrays.short(error)}). "
            f"Free space or check the disk, then save again; the whole checkpoints are of the steps {self.steps()}."
        )


def _is_whole(path: Path) -> bool:
    """Where directories are not renamed, Orbax writes a file of its own when everything else is there."""
    return (path / (_COMMITTED if is_remote(path) else "_CHECKPOINT_METADATA")).exists()


def _delete(path: Path) -> None:
    """Remove a checkpoint that the run saved; not when somebody put other files into it."""
    if foreign := {p.name for p in path.iterdir()} - _CONTENT:
        _log.warning("keeping the checkpoint %s: it holds other files (%s)", path, ", ".join(sorted(foreign)))
        return
    # The info goes first: what an interruption leaves behind is then not taken for a whole checkpoint.
    (path / "records" / records.INFO_FILE).unlink()
    remove_tree(path)
