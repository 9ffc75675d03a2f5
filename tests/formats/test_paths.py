import os

import pytest
from etils import epath

from jaxdistill.formats.paths import atomic_directory, atomic_file, write_text


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_file_appears_only_at_the_end(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic_file(path) as file:
        file.write(b"content")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"content"
    assert names(path.parent) == ["file"]


def test_file_has_the_permissions_of_an_ordinary_one(tmp_path):
    (tmp_path / "ordinary").write_bytes(b"")
    write_text(tmp_path / "atomic", "é")
    assert (tmp_path / "atomic").read_bytes() == b"\xc3\xa9"
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("bad"), KeyboardInterrupt()])
def test_failure_keeps_the_old_file_and_leaves_no_litter(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail():
        with atomic_file(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]
    if isinstance(error, OSError):
        assert caught.value.__notes__ == [
            f"{path} was not written: it is as it was before, and no partial file is left."
        ]


def test_failing_sync_is_a_failure(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), atomic_file(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_file_is_on_disk_before_it_is_renamed(tmp_path, monkeypatch):
    order = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("sync"), sync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda old, new: (order.append("rename"), replace(old, new)))
    with atomic_file(tmp_path / "file") as file:
        file.write(b"new")
    assert order == ["sync", "rename", "sync"]  # the last one is the directory's


def test_directory_appears_only_at_the_end(tmp_path):
    path = tmp_path / "runs" / "model"
    with atomic_directory(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_bytes(b"content")
        assert not path.exists()
    assert (path / "sub" / "file").read_bytes() == b"content"
    assert names(path.parent) == ["model"]


def test_existing_directory_is_refused_unless_empty(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    with atomic_directory(path) as folder:
        (folder / "file").write_bytes(b"first")
    with (
        pytest.raises(FileExistsError, match=r"model exists and is not empty. Choose another name"),
        atomic_directory(path),
    ):
        pytest.fail("the block must not run")
    assert (path / "file").read_bytes() == b"first"
    assert names(tmp_path) == ["model"]


def test_directory_that_appears_meanwhile_is_kept(tmp_path):
    path = tmp_path / "model"

    def collide():
        with atomic_directory(path) as folder:
            (folder / "file").write_bytes(b"mine")
            path.mkdir()
            (path / "file").write_bytes(b"other's")

    with pytest.raises(FileExistsError, match="exists and is not empty"):
        collide()
    assert (path / "file").read_bytes() == b"other's"
    assert names(tmp_path) == ["model"]


def test_replaced_directory_never_leaves_neither(tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.mkdir()
    (path / "old").write_bytes(b"")
    seen = []
    rename = os.rename

    def watching(source, target):
        rename(source, target)
        seen.append(sorted(file.name for file in tmp_path.glob("*/*")) + sorted(f.name for f in tmp_path.glob(".*/*")))

    monkeypatch.setattr(os, "rename", watching)
    with atomic_directory(path, replace=True) as folder:
        (folder / "new").write_bytes(b"")
    assert [sorted(set(files)) for files in seen] == [["new", "old"], ["new", "old"]]
    assert names(path) == ["new"]
    assert names(tmp_path) == ["model"]


def test_failed_swap_gives_the_old_directory_its_name_back(tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.mkdir()
    (path / "old").write_bytes(b"")
    rename, calls = os.rename, []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="Input/output error"), atomic_directory(path, replace=True) as folder:
        (folder / "new").write_bytes(b"")
    assert names(path) == ["old"]
    assert names(tmp_path) == ["model"]


def test_failure_inside_a_directory_leaves_nothing(tmp_path):
    def fail():
        with atomic_directory(tmp_path / "model", replace=True) as folder:
            (folder / "file").write_bytes(b"half")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert names(tmp_path) == []


def test_paths_of_every_kind(tmp_path):
    for path in (str(tmp_path / "a"), tmp_path / "b", epath.Path(tmp_path) / "c"):
        with atomic_file(path) as file:
            file.write(b"1")
    assert names(tmp_path) == ["a", "b", "c"]
