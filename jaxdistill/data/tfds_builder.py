"""Writes records as a prepared TFDS data set in array_record format, without TensorFlow."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdistill.data.sources import CONVERSATION, PAIR, DataError, Record, Records, Source
from jaxdistill.formats.paths import AnyPath, any_path, atomic_directory

_SHARD_BYTES = 1 << 28


def build_tfds(
    source: Source,
    directory: AnyPath,
    name: str,
    *,
    split: str = "train",
    version: str = "1.0.0",
    description: str = "",
    shard_bytes: int = _SHARD_BYTES,
) -> Path:
    """Turns a source into a TFDS data set that `Tfds`, `TfdsDirectory` and TFDS itself read at random.

    Writes `directory/name/version/` with files of about `shard_bytes` in the order of the source, under a temporary
    name until all is written. Records must be of one kind: text (kept as "text"), conversations ("messages" with role
    and content), or pairs ("prompt", "completion"). Returns the version directory. An existing one is refused and
    left alone, and so is a record of another kind than the first.
    """
    import tensorflow_datasets as tfds
    from etils import epath

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"name is {name!r}; TFDS names are lower case letters, digits and _, such as 'my_text'.")
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise ValueError(f"version is {version!r}; give three numbers, such as '1.0.0'.")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", split):
        raise ValueError(f"split is {split!r}; give a name such as 'train' or 'test'.")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes}; give at least 1.")
    target = any_path(directory) / name / version
    if target.exists():
        raise FileExistsError(f"{target} exists and is left as it is; give another version, name or directory.")
    records = source.open()
    with atomic_directory(target) as temporary:
        features = tfds.features.FeaturesDict(_features(records[0]))
        lengths, size = _write_shards(records, source.field, features, temporary / f"{name}-{split}", shard_bytes)
        template = tfds.core.ShardedFileTemplate(
            data_dir=epath.Path(temporary), dataset_name=name, split=split, filetype_suffix="array_record"
        )
        info = tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template)
        tfds.folder_dataset.write_metadata(
            data_dir=temporary,
            features=features,
            split_infos=[info],
            version=version,
            description=description,
            check_data=False,  # the check would need TensorFlow
        )
    return target


def _features(record: Record) -> dict[str, Any]:
    """The TFDS features of one kind of record."""
    import tensorflow_datasets as tfds

    text = tfds.features.Text()
    if CONVERSATION in record:
        return {CONVERSATION: tfds.features.Sequence({"role": text, "content": text})}
    if all(key in record for key in PAIR):
        return dict.fromkeys(PAIR, text)
    return {"text": text}


def _examples(records: Records, field: str, features: Any) -> Iterator[bytes]:
    kind = set(features)
    for index in range(len(records)):
        record = records[index]
        example: Record
        if CONVERSATION in record:
            example = {CONVERSATION: [_turn(turn, index) for turn in record[CONVERSATION]]}
        elif all(key in record for key in PAIR):
            example = {key: record[key] for key in PAIR}
        else:
            example = {"text": record[field]}
        if set(example) != kind:
            raise DataError(
                f"record {index} has {sorted(example)} where record 0 has {sorted(kind)}; a TFDS data set holds one "
                "kind of record. Split the source into one file per kind."
            )
        yield features.serialize_example(features.encode_example(example))


def _turn(turn: Any, index: int) -> dict[str, str]:
    if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
        raise DataError(f"record {index}: a turn of a conversation needs exactly 'role' and 'content', found {turn!r}.")
    return {"role": turn["role"], "content": turn["content"]}


def _write_shards(records: Records, field: str, features: Any, prefix: Path, shard_bytes: int) -> tuple[list[int], int]:
    """Writes the examples to files of about `shard_bytes`; returns records per file and bytes in all."""
    from array_record.python.array_record_module import ArrayRecordWriter

    def path(shard: int) -> Path:
        return prefix.with_name(f".shard-{shard}")

    lengths, sizes, writer = [0], [0], None
    for example in _examples(records, field, features):
        if sizes[-1] and sizes[-1] + len(example) > shard_bytes:
            writer.close()  # pyright: ignore[reportOptionalMemberAccess]
            lengths.append(0)
            sizes.append(0)
            writer = None
        if writer is None:
            # One record per group: random access then decodes nothing but the record asked for.
            writer = ArrayRecordWriter(str(path(len(lengths) - 1)), "group_size:1")
        writer.write(example)
        lengths[-1] += 1
        sizes[-1] += len(example)
    if writer is not None:
        writer.close()
    for shard in range(len(lengths)):
        name = f"{prefix.name}.array_record-{shard:05d}-of-{len(lengths):05d}"
        path(shard).rename(prefix.with_name(name))
    return lengths, sum(sizes)
