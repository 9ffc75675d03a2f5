"""Where files are, on disks and in object stores, and writing them so that a reader sees the old content or the new,
never a part of either."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO, cast

from upath import UPath

AnyPath = str | os.PathLike[str] | UPath
"""What names a file or a directory: a local path, or one of a file system that fsspec knows (`gs://…`, `s3://…`)."""


def any_path(path: AnyPath) -> Path:
    """The path that `path` (a string, or an object of `pathlib`, `upath` or `etils.epath`) names: `pathlib`'s, or
    `upath`'s for a remote one, which is called a Path here because it has the same methods. The one place that decides
    where bytes live.

    Raises ValueError where there is no such file system, or what reads it is not installed.
    """
    text = str(path)
    if "://" not in text:
        return Path(text).expanduser()
    try:
        found = path if isinstance(path, UPath) else UPath(text)
        _ = found.fs
    except (ValueError, ImportError) as error:
        raise ValueError(
            f"{text} cannot be reached: {error}. Allowed are local paths and what fsspec knows; gs:// needs the "
            "package gcsfs, s3:// needs s3fs."
        ) from None
    return Path(found.path) if found.protocol in ("file", "local") else cast(Path, found)


def is_remote(path: Path) -> bool:
    """Whether what `any_path` gave is in an object store, where files are written whole and nothing is renamed."""
    return isinstance(path, UPath)


def needs_a_copy(path: Path) -> bool:
    """Whether Orbax cannot write and read arrays there itself: of object stores it knows gs:// alone."""
    return is_remote(path) and not str(path).startswith("gs://")


def remove_tree(path: Path) -> None:
    """Removes a directory and what it holds, if it is there."""
    if is_remote(path):
        store, name = store_of(path)
        if store.exists(name):
            store.rm(name, recursive=True)
    elif path.exists():
        shutil.rmtree(path)


def state_of(file: Path) -> str:
    """What changes when a file's content does. Two calls differ where its server does not say."""
    if not is_remote(file):
        found = file.stat()
        return f"{found.st_size} {found.st_mtime_ns}"
    store, name = store_of(file)
    if "http" not in store.protocol:
        return str(store.ukey(name))
    # Of these fsspec takes the address for the state.
    info = store.info(name)
    told = {field: info[field] for field in ("ETag", "Last-Modified", "Content-MD5", "Digest") if field in info}
    return f"{info['size']} {told}" if told else secrets.token_hex()


def store_of(path: Path) -> tuple[Any, str]:
    """The file system of a remote path, and what it calls the path."""
    remote: Any = path
    return remote.fs, remote.path


def fetched(path: AnyPath) -> Path:
    """A local copy of a remote file or directory, made once for each of its states; what is local is itself.

    For what must be on a disk to be read: memory maps, and libraries that open files themselves. Copies are in
    `cache_directory`.
    """
    found = any_path(path)
    if not is_remote(found):
        return found
    files = _files_of(found)
    state = json.dumps([str(found), [[str(file), state_of(file)] for file in files]])
    copy = cache_directory() / "fetched" / hashlib.sha256(state.encode()).hexdigest()[:32] / found.name
    if not copy.exists():
        try:
            with atomic_directory(copy.parent) as folder:
                _download(found, files, folder / found.name)
        except FileExistsError:
            if not copy.exists():  # by another process, meanwhile
                raise
    return copy


@contextlib.contextmanager
def copied_for_orbax(path: Path) -> Iterator[Path]:
    """A directory that Orbax can read: itself, or a local copy that is there until the block ends."""
    if not needs_a_copy(path):
        yield path
        return
    with tempfile.TemporaryDirectory(dir=scratch()) as folder:
        copy = Path(folder) / path.name
        _download(path, _files_of(path), copy)
        yield copy


def _files_of(found: Path) -> list[Path]:
    files = [found] if found.is_file() else sorted(file for file in found.rglob("*") if file.is_file())
    if not files:
        raise FileNotFoundError(f"{found}: there is no such file or directory. Give the path of an existing one.")
    return files


def _download(found: Path, files: Iterable[Path], copy: Path) -> None:
    for file in files:
        target = Path(str(copy) + str(file).removeprefix(str(found)))
        target.parent.mkdir(parents=True, exist_ok=True)
        store, name = store_of(file)
        store.get_file(name, str(target))


def cache_directory() -> Path:
    """Where assets, copies of remote files and compiled programs are kept: the environment variable
    `JAXDISTILL_CACHE`, else `~/.cache/jaxdistill`."""
    return Path(os.environ.get("JAXDISTILL_CACHE") or "~/.cache/jaxdistill").expanduser()


def scratch() -> Path:
    """Where temporary copies are made: a system's own place for them is often in memory."""
    place = cache_directory() / "temporary"
    place.mkdir(parents=True, exist_ok=True)
    return place


def staging_of(destination: Path) -> Path:
    """The local directory where what a remote one shall hold is made."""
    return cache_directory() / "unfinished" / hashlib.sha256(str(destination).encode()).hexdigest()[:32]


@contextlib.contextmanager
def atomic_file(path: AnyPath) -> Iterator[BinaryIO]:
    """Opens a new file for writing that takes the name `path` only when the block ends without an error.

    Until then it is a hidden sibling, or, of a remote one, a temporary file that is uploaded in the end. On an error it
    is removed, and what `path` held before is untouched. The directory is made if it is missing.
    """
    destination = any_path(path)
    if is_remote(destination):
        with tempfile.NamedTemporaryFile(dir=scratch()) as file:
            yield file  # pyright: ignore[reportReturnType]
            file.flush()
            upload(Path(file.name), destination)
        return
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


def write_text(path: AnyPath, text: str) -> None:
    """Writes a UTF-8 text file through `atomic_file`."""
    with atomic_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def atomic_directory(path: AnyPath, *, replace: bool = False) -> Iterator[Path]:
    """Makes an empty local directory to fill that takes the name `path` only when the block ends without an error.

    Until then it is a hidden sibling; on an error it is removed. An existing non-empty `path` is refused with
    `FileExistsError`, before and after the block, unless `replace`: then the old directory is moved aside, the new one
    takes its name, and only then is the old one deleted, so that one of the two is always complete on disk. A remote
    one is filled in a temporary directory and uploaded in the end; see `upload_tree`.
    """
    destination = any_path(path)
    if is_remote(destination):
        if not replace:
            _refuse_existing(destination)
        with tempfile.TemporaryDirectory(dir=scratch()) as temporary:
            yield Path(temporary)
            upload_tree(Path(temporary), destination, replace=replace)
        return
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
def resumable_directory(path: AnyPath, made_from: str) -> Iterator[tuple[Path, Done]]:
    """Like `atomic_directory`, for work that is long: what an interrupted block has made stays in a hidden sibling (of
    a remote directory, in `cache_directory`), and the next call goes on with it if it is `made_from` the same. The
    block skips what is in the second value, and adds to it what it has finished.

    Raises FileExistsError as `atomic_directory` does, and where another process is writing the same directory.
    """
    destination = any_path(path)
    _refuse_existing(destination)
    partial = destination.with_name(f".{destination.name}.partial")
    if is_remote(destination):
        partial = staging_of(destination)
    partial.mkdir(parents=True, exist_ok=True)
    progress, head = partial / ".finished", json.dumps(made_from)
    with progress.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FileExistsError(f"another process is writing {destination}. Wait for it, or stop it.") from None
        file.seek(0)
        first, *names = file.read().split("\n")
        # Of a process that was killed while it wrote a file.
        for left in list(partial.rglob(".*.tmp-*")):
            _remove(left)
        if first != head:
            _empty(partial, but=progress)
            file.truncate(0)
            file.write(head)
            names = []
        # On a line of its own, where the last name was cut off.
        file.write("\n")
        yield partial, Done(file, names[:-1])
        if is_remote(destination):
            upload_tree(partial, destination, but=progress)
            shutil.rmtree(partial)
            return
        _sync_tree(partial)
        _refuse_existing(destination)
        progress.unlink()
        os.rename(partial, destination)
    _sync_directory(destination.parent)


def upload(file: Path, destination: Path) -> None:
    """Object stores show a file when all of it has arrived."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    store, name = store_of(destination)
    store.put_file(str(file), name)


_DESCRIPTIONS = ("config.json", "jaxdistill.json")
"""What tells that a directory is a model."""


def upload_tree(folder: Path, destination: Path, *, replace: bool = False, but: Path | None = None) -> None:
    """Copies a directory (`but` one file) into an object store; what says that a directory is a model comes last. On
    an error nothing of it stays. With `replace` all is uploaded under another name before what is there is deleted."""
    if not replace:
        _refuse_existing(destination)
    place = _sibling(destination, "tmp") if replace else destination
    store, name = store_of(place)
    files = [file for file in folder.rglob("*") if file.is_file() and file != but]
    try:
        for file in sorted(files, key=lambda file: (file.name in _DESCRIPTIONS, -file.stat().st_size)):
            upload(file, place / file.relative_to(folder).as_posix())
    except BaseException as error:
        remove_tree(place)
        if isinstance(error, OSError):
            error.add_note(f"{destination} was not written: it is as it was before, and no part of it is left.")
        raise
    if replace:
        remove_tree(destination)
        store.mv(name, store_of(destination)[1], recursive=True)


def _empty(directory: Path, *, but: Path) -> None:
    for entry in directory.iterdir():
        if entry != but:
            _remove(entry)


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


def _refuse_existing(destination: UPath | Path) -> None:
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
    _remove(old)


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
