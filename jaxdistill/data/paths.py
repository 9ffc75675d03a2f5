"""From a path that a user gives to the source it stands for."""

from __future__ import annotations

from pathlib import Path

from jaxdistill.data.sources import (
    ArrayRecord,
    Concatenated,
    DataError,
    JsonLines,
    Parquet,
    PlainText,
    Records,
)
from jaxdistill.data.tfds_source import TfdsDirectory
from jaxdistill.formats.paths import AnyPath, any_path

JSON_LINES = (".jsonl", ".ndjson")
PLAIN_TEXT = (".txt", ".md", ".rst", ".py")
PARQUET = (".parquet",)
ARRAY_RECORD = (".array_record", ".arrayrecord")
SUFFIXES = JSON_LINES + PLAIN_TEXT + PARQUET + ARRAY_RECORD

FileSource = JsonLines | PlainText | Parquet | ArrayRecord


def source_at(path: AnyPath, *, field: str = "text", split: str = "train") -> FileSource | Concatenated | TfdsDirectory:
    """The source that a path stands for, by its suffix; a directory is a TFDS data set or all the files in it.

    field: the key or column of the text, where the format has one. split: of a TFDS directory. Files of a directory
    are taken by name, sub-directories included, hidden ones left out.
    """
    place = any_path(path)
    if not place.exists():
        raise DataError(f"{place}: there is no such file or directory.")
    if not place.is_dir():
        return _file_source(place, field)
    if (place / "dataset_info.json").is_file():
        return TfdsDirectory(str(place), split, field)
    files = sorted(
        file
        for file in place.rglob("*")
        if file.is_file()
        and file.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(place).parts)
    )
    if not files:
        raise DataError(
            f"{place}: no file here has a known suffix ({', '.join(SUFFIXES)}), and there is no dataset_info.json of a "
            "TFDS data set (give its version directory)."
        )
    plain_text = [file for file in files if file.suffix.lower() in PLAIN_TEXT]
    if len(plain_text) not in (0, len(files)):
        other = next(file for file in files if file not in plain_text)
        raise DataError(
            f"{place}: holds both plain text ({plain_text[0].name}) and records ({other.name}); give a directory of "
            "one kind, or a single file."
        )
    # Empty files (an `__init__.py`) are ordinary in a directory of text and have nothing to give.
    parts = tuple(_file_source(file, field) for file in files if file.stat().st_size)
    if not parts:
        raise DataError(f"{place}: all {len(files)} files are empty.")
    return Concatenated(parts)


def open_path(path: AnyPath, *, field: str = "text", split: str = "train") -> Records:
    """Opens what `source_at` finds."""
    return source_at(path, field=field, split=split).open()


def _file_source(file: Path, field: str) -> FileSource:
    suffix = file.suffix.lower()
    if suffix in JSON_LINES:
        return JsonLines(str(file), field)
    if suffix in PLAIN_TEXT:
        return PlainText(str(file))
    if suffix in PARQUET:
        return Parquet(str(file), field)
    if suffix in ARRAY_RECORD:
        return ArrayRecord((str(file),), field)
    raise DataError(
        f"{file}: unknown suffix {file.suffix!r}; known are {', '.join(SUFFIXES)}. Rename the file, or name its format "
        "in a recipe with JsonLines, PlainText, Parquet or ArrayRecord."
    )
