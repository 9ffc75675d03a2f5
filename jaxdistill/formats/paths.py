"""Writing files and directories so that a reader sees the old content or the new, never a part of either."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol, TextIO


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


class Finished(Protocol):
    """Names of what needs not be made again."""

    def __contains__(self, name: str, /) -> bool: ...
    def add(self, name: str, /) -> None: ...


class Done:
    """What is finished inside a resumable directory; each name is on disk as soon as it is added."""

    def __init__(self, file: TextIO, names: Iterable[str]):
        self._file, self._names = file, set(names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add(self, name: str) -> None:
        self._file.write(name + "\n")
        self._file.flush()
        self._names.add(name)


@contextlib.contextmanager
def resumable_directory(path: str | os.PathLike[str], made_from: str) -> Iterator[tuple[Path, Done]]:
    """Like `atomic_directory`, for work that is long: what an interrupted block has made stays in a hidden sibling, and
    the next call goes on with it if it is `made_from` the same. The block skips what is in the second value, and adds
    to it what it has finished.

    Raises FileExistsError as `atomic_directory` does, and where another process is writing the same directory.
    """
    destination = local_path(path)
    _refuse_existing(destination)
    partial = destination.with_name(f".{destination.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    progress, head = partial / ".finished", json.dumps(made_from)
    with progress.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FileExistsError(f"another process is writing {destination}. Wait for it, or stop it.") from None
        file.seek(0)
        first, *names = file.read().split("\n")
        if first != head:
            _empty(partial, but=progress)
            file.truncate(0)
            file.write(head)
            names = []
        # On a line of its own, where the last name was cut off.
        file.write("\n")
        yield partial, Done(file, names[:-1])
        progress.unlink()
        _sync_tree(partial)
        _refuse_existing(destination)
        os.rename(partial, destination)
    _sync_directory(destination.parent)


def _empty(directory: Path, *, but: Path) -> None:
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry != but:
            entry.unlink()


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
