"""TFDS data sets made and read without TensorFlow."""

import json
import sys

import pytest
import tensorflow_datasets as tfds

from jaxdistill.data.paths import open_path, source_at
from jaxdistill.data.pipeline import DataConfig, make_loader
from jaxdistill.data.sources import DataError, JsonLines, PlainText
from jaxdistill.data.tfds_builder import build_tfds
from jaxdistill.data.tfds_source import Tfds, TfdsDirectory
from jaxdistill.tokenizers.byte_level import ByteTokenizer

CHAT = [{"role": "user", "content": "Hé"}, {"role": "assistant", "content": "Hello"}]


def json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return JsonLines(str(path), field="body")


def contents(records):
    return [records[index] for index in range(len(records))]


def test_what_is_built_is_read_by_tfds_itself(tmp_path):
    rows = [{"body": f"text {index} é"} for index in range(9)]
    directory = build_tfds(json_lines(tmp_path / "a.jsonl", rows), tmp_path / "data", "my_text", shard_bytes=100)
    assert directory == tmp_path / "data" / "my_text" / "1.0.0"
    builder = tfds.builder_from_directory(str(directory))
    assert builder.info.full_name == "my_text/1.0.0"
    assert len(builder.info.splits["train"].shard_lengths) > 1
    source = builder.as_data_source(split="train")
    assert [example["text"].decode() for example in source] == [row["body"] for row in rows]
    assert "tensorflow" not in sys.modules


def test_by_name_by_directory_and_by_split(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree\n\nfour\n\n")
    directory = build_tfds(PlainText(str(tmp_path / "a.txt"), 7), tmp_path, "my_text", split="test", version="2.1.0")
    wanted = [{"text": f"{word}\n\n"} for word in ("one", "two", "three", "four")]
    assert contents(Tfds("my_text", split="test", data_dir=str(tmp_path)).open()) == wanted
    assert contents(Tfds("my_text:2.1.0", split="test[:50%]", data_dir=str(tmp_path)).open()) == wanted[:2]
    assert contents(TfdsDirectory(str(directory), split="test").open()) == wanted
    assert contents(open_path(directory, split="test")) == wanted
    assert source_at(directory, split="test") == TfdsDirectory(str(directory), "test", "text")


@pytest.mark.parametrize(
    "rows", [[{"messages": CHAT}, {"messages": CHAT[:1]}], [{"prompt": "a", "completion": "é"}] * 2]
)
def test_conversations_and_pairs_come_back(tmp_path, rows):
    directory = build_tfds(json_lines(tmp_path / "a.jsonl", rows), tmp_path, "my_chat")
    assert contents(TfdsDirectory(str(directory)).open()) == rows


def test_a_data_set_feeds_the_loader(tmp_path):
    rows = [{"body": f"text {index}"} for index in range(9)]
    directory = build_tfds(json_lines(tmp_path / "a.jsonl", rows), tmp_path, "my_text")
    config = DataConfig(path=str(directory), length=16, batch_size=3, pack=False)
    batch = next(make_loader(config, ByteTokenizer()))
    assert {bytes(row[:5].tolist()) for row in batch["tokens"]} == {b"text "}


def test_an_existing_data_set_is_left_alone(tmp_path):
    source = json_lines(tmp_path / "a.jsonl", [{"body": "first"}])
    directory = build_tfds(source, tmp_path, "my_text")
    with pytest.raises(FileExistsError, match=r"exists and is left as it is"):
        build_tfds(json_lines(tmp_path / "b.jsonl", [{"body": "second"}]), tmp_path, "my_text")
    assert contents(TfdsDirectory(str(directory)).open()) == [{"text": "first"}]


def test_a_failing_build_leaves_nothing_behind(tmp_path):
    source = json_lines(tmp_path / "a.jsonl", [{"body": "text"}, {"messages": CHAT}])
    with pytest.raises(DataError, match=r"record 1 has \['messages'\] where record 0 has \['text'\]"):
        build_tfds(source, tmp_path / "data", "my_text")
    assert list((tmp_path / "data" / "my_text").iterdir()) == []
    source = json_lines(tmp_path / "b.jsonl", [{"messages": [{"role": "user", "content": "a", "name": "b"}]}])
    with pytest.raises(DataError, match="needs exactly 'role' and 'content'"):
        build_tfds(source, tmp_path / "data", "my_text")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "My-Text"}, "name is 'My-Text'"),
        ({"name": "a", "version": "1"}, "version is '1'"),
        ({"name": "a", "split": "a/b"}, "split is 'a/b'"),
        ({"name": "a", "shard_bytes": 0}, "shard_bytes is 0"),
    ],
)
def test_illegal_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        build_tfds(JsonLines("a.jsonl"), tmp_path, **settings)


def test_a_data_set_that_is_not_prepared_gets_the_command(tmp_path):
    command = f"tfds build imdb_reviews --file_format=array_record --data_dir={tmp_path}"
    with pytest.raises(DataError, match=f"'imdb_reviews' is not prepared in .*\n.*\n?  {command}"):
        Tfds("imdb_reviews", data_dir=str(tmp_path)).open()


def test_a_data_set_prepared_for_tensorflow_gets_the_command(tmp_path):
    directory = build_tfds(json_lines(tmp_path / "a.jsonl", [{"body": "text"}]), tmp_path, "my_text")
    info = directory / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    for file in directory.glob("*.array_record-*"):
        file.rename(directory / file.name.replace("array_record", "tfrecord"))
    with pytest.raises(
        DataError, match=r"prepared as \['tfrecord'\](.|\n)*tfds build my_text.* --file_format=array_record"
    ):
        TfdsDirectory(str(directory)).open()


def test_other_things_that_cannot_be_read(tmp_path):
    directory = build_tfds(json_lines(tmp_path / "a.jsonl", [{"body": "text"}]), tmp_path, "my_text")
    with pytest.raises(DataError, match=r"has no split 'test'; it has \['train'\]"):
        TfdsDirectory(str(directory), split="test").open()
    with pytest.raises(DataError, match=r"no field 'body'. Its fields are \['text'\]"):
        TfdsDirectory(str(directory), field="body").open()
    with pytest.raises(DataError, match=r"no dataset_info.json here"):
        TfdsDirectory(str(tmp_path)).open()
