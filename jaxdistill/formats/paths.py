"""Writing files and directories so that a reader sees the old content or the new, never a part of either."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def local_path(path: str | os.PathLike[str]) -> Path:
    """The local path that `path` (a string, `pathlib` or `etils.epath` path) names.

    The one place that decides where bytes live: object stores (`gs://…`) are refused here until they are supported.
    """
    text = os.fspath(path)
    if "://" in text:
        raise ValueError(f"{text} is a remote path; allowed are local or mounted ones. Copy or mount it first.")
    return Path(text).expanduser()


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a new file for writing that takes the name `path` only when the block ends without an error.

    Until then it is a hidden sibling. On an error it is removed, and what `path` held before is untouched. The
    directory is made if it is missing.
    """
    destination = local_path(path)
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(destination, "tmp")
    try:
        # "x" and the umask give the permissions of an ordinary new file, unlike the private ones of `tempfile`.
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, destination)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.add_note(f"{destination} was not written: it is as it was before, and no partial file is left.")
        raise
    _sync_directory(destination.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a UTF-8 text file through `atomic_file`."""
    with atomic_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Makes an empty directory to fill that takes the name `path` only when the block ends without an error.

    Until then it is a hidden sibling; on an error it is removed. An existing non-empty `path` is refused with
    `FileExistsError`, before and after the block, unless `replace`: then the old directory is moved aside, the new one
    takes its name, and only then is the old one deleted, so that one of the two is always complete on disk.
    """
    destination = local_path(path)
    if not replace:
        _refuse_existing(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(destination, "tmp")
    temporary.mkdir()
    try:
        yield temporary
        _sync_tree(temporary)
        if replace:
            _swap(temporary, destination)
        else:
            _refuse_existing(destination)
            os.rename(temporary, destination)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            error.add_note(f"{destination} was not written: it is as it was before, and no partial directory is left.")
        raise
    _sync_directory(destination.parent)


def _refuse_existing(destination: Path) -> None:
    if destination.is_dir():
        if not any(destination.iterdir()):
            return
    elif not (destination.exists() or destination.is_symlink()):
        return
    raise FileExistsError(f"{destination} exists and is not empty. Choose another name, or move it away first.")


def _swap(new: Path, destination: Path) -> None:
    """Gives `new` the name `destination`; what had the name is deleted last, or gets its name back on failure."""
    if not (destination.exists() or destination.is_symlink()):
        os.rename(new, destination)
        return
    old = _sibling(destination, "old")
    os.rename(destination, old)
    try:
        os.rename(new, destination)
    except BaseException:
        os.rename(old, destination)
        raise
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old)
    else:
        old.unlink()


def _sibling(path: Path, kind: str) -> Path:
    """A fresh hidden name beside `path`: renaming is atomic only inside one file system."""
    return path.with_name(f".{path.name}.{kind}-{secrets.token_hex(4)}")


def _sync_tree(root: Path) -> None:
    """Makes every file and directory under `root` durable before the rename makes them visible."""
    for folder, _, files in os.walk(root):
        for name in files:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_directory(Path(folder))


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
