"""TensorFlow Datasets as a source, read without TensorFlow: only what is prepared as array_record."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.data.sources import CONVERSATION, DataError, Record, Records, check_record, content_fingerprint
from jaxdistill.formats.paths import fetched


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A prepared TFDS data set by name, such as "lm1b" or "my_text/config:1.0.0".

    split: any TFDS split, such as "train" or "train[:90%]". data_dir: where it was prepared; None is TFDS' default.
    A data set that is not prepared, or only as tfrecord, needs TensorFlow once; the error gives the command.
    """

    name: str
    split: str = "train"
    data_dir: str | None = None
    field: str = "text"

    def open(self) -> Records:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import read_only_builder

        places = {} if self.data_dir is None else {"data_dir": str(fetched(self.data_dir))}
        try:
            builder = read_only_builder.builder_from_files(self.name, **places)
        except tfds.core.DatasetNotFoundError:
            where = self.data_dir if self.data_dir is not None else "TFDS' default directory"
            raise DataError(
                f"TFDS data set {self.name!r} is not prepared in {where}. {_preparation(self.name, self.data_dir)}"
            ) from None
        return _TfdsRecords(builder, self.split, self.field)


@dataclasses.dataclass(frozen=True)
class TfdsDirectory:
    """A prepared TFDS data set by its directory, the one that holds dataset_info.json."""

    directory: str
    split: str = "train"
    field: str = "text"

    def open(self) -> Records:
        import tensorflow_datasets as tfds

        directory = fetched(self.directory)
        if not (directory / "dataset_info.json").is_file():
            raise DataError(f"{directory}: no dataset_info.json here. Give the version directory of a TFDS data set.")
        return _TfdsRecords(tfds.builder_from_directory(str(directory)), self.split, self.field)


def _preparation(name: str, data_dir: str | None) -> str:
    place = "" if data_dir is None else f" --data_dir={data_dir}"
    return (
        "Prepare it once, on a machine with TensorFlow (`pip install tensorflow-datasets tensorflow`), with\n"
        f"  tfds build {name} --file_format=array_record{place}\n"
        "and copy the directory here. Local text or JSON Lines needs no TensorFlow: use `build_tfds`."
    )


class _TfdsRecords:
    def __init__(self, builder: Any, split: str, field: str):
        info = builder.info
        if not any(kind.value in ("array_record", "parquet") for kind in info.available_file_formats()):
            kinds = sorted(kind.value for kind in info.available_file_formats())
            raise DataError(
                f"TFDS data set {info.full_name!r} in {builder.data_dir} is prepared as {kinds}, which only "
                f"TensorFlow reads. {_preparation(info.full_name, 'NEW_DIRECTORY')}"
            )
        base = split.split("[")[0]
        if base not in info.splits and base != "all":
            raise DataError(f"TFDS data set {info.full_name!r} has no split {split!r}; it has {sorted(info.splits)}.")
        self._records = builder.as_data_source(split=split)
        self._name, self._field = f"{info.full_name}[{split}]", field
        if not len(self._records):
            raise DataError(f"{self._name}: no records. Give a split with at least one.")
        splits = info.splits.values() if base == "all" else [info.splits[base]]
        content = content_fingerprint([Path(file) for part in splits for file in part.filepaths])
        self.fingerprint = f"tfds:{info.full_name}:{split}:{field}:{len(self._records)}:{content}"
        self[0]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        where = f"{self._name}, record {index}"
        record = {name: _plain(value, where) for name, value in self._records[index].items()}
        if isinstance(record.get(CONVERSATION), dict):
            # TFDS stores a sequence of objects as an object of sequences.
            columns = record[CONVERSATION]
            rows = zip(*columns.values(), strict=True)
            record[CONVERSATION] = [dict(zip(columns, row, strict=True)) for row in rows]
        return check_record(record, self._field, where)


def _plain(value: Any, where: str) -> Any:
    """TFDS values as JSON has them: text instead of bytes, lists instead of arrays."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}, byte {error.start} is not UTF-8 text ({error.reason}).") from None
    if isinstance(value, dict):
        return {key: _plain(item, where) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist(), where)
    if isinstance(value, list):
        return [_plain(item, where) for item in value]
    return value
