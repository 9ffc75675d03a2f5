"""Every kind of source: what it gives, and what it says when it cannot."""

import json
import re

import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given
from hypothesis import strategies as st

from jaxdistill.data.paths import open_path, source_at
from jaxdistill.data.sources import ArrayRecord, Concatenated, DataError, JsonLines, Parquet, PlainText

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def contents(records):
    return [records[index] for index in range(len(records))]


def texts(records):
    return [record["text"] for record in contents(records)]


# ---------------------------------------------------------------------------------------------------- JSON Lines


def test_json_lines_hold_texts_conversations_and_pairs(tmp_path):
    file = tmp_path / "a.jsonl"
    rows = [{"text": "é\n"}, {"messages": CHAT}, {"prompt": "1+1=", "completion": "2"}]
    file.write_text("\n" + "\n\n   \n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert contents(JsonLines(str(file)).open()) == rows


def test_json_lines_with_windows_line_ends_and_another_field(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"passage": "a"}\r\n{"passage": "b"}\r\n')
    assert contents(JsonLines(str(file), field="passage").open()) == [{"passage": "a"}, {"passage": "b"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\n \n\t\n", "no records, only blank lines"),
        (b'{"text": 1}', r"line 1: field 'text' holds int, not text"),
        (b'\n{"body": "a", "id": 3}', r"line 2: no field 'text'. Its fields are \['body', 'id'\]"),
        (b'["a"]', "line 1: expected an object with named fields, found list"),
        (b'{"text": "a"', r"line 1: not valid JSON \(Expecting ',' delimiter, column 13\)"),
        (b'\n{"text": "caf\xe9"}', r"line 2, byte 14 of the file, is not UTF-8 text \(byte 0xe9"),
    ],
)
def test_json_lines_that_cannot_be_used(tmp_path, content, message):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        JsonLines(str(file)).open()
    assert str(file) in str(error.value)


def test_a_fault_in_a_later_line_names_the_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n\n{"text": }\n')
    records = JsonLines(str(file)).open()
    with pytest.raises(DataError, match="line 3: not valid JSON"):
        records[1]


# ---------------------------------------------------------------------------------------------------- plain text


def test_plain_text_is_cut_at_blank_lines_else_at_line_ends(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\n\ntwo\n \nthree is long\nfour\n", encoding="utf-8")
    assert texts(PlainText(str(file), document_bytes=12).open()) == ["one\n\ntwo\n \n", "three is long\n", "four\n"]
    assert texts(PlainText(str(file), document_bytes=5).open()) == [
        "one\n\n", "two\n", " \n", "three is long\n", "four\n",
    ]  # fmt: skip
    assert len(PlainText(str(file), document_bytes=None).open()) == 1


@given(
    text=st.text(alphabet="aé \n\r", max_size=200).filter(lambda text: text.strip()),
    document_bytes=st.integers(1, 40),
)
def test_every_byte_of_plain_text_is_in_one_document(tmp_path_factory, text, document_bytes):
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_bytes(text.encode())
    documents = texts(PlainText(str(file), document_bytes=document_bytes).open())
    assert "".join(documents) == text
    # A document longer than asked for is a single line.
    assert all(len(each.encode()) <= document_bytes or "\n" not in each[:-1] for each in documents)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b" \n\n", "holds only white space"),
        (b"fine\n\ncaf\xe9 au lait\n", r"line 3, byte 9 of the file, is not UTF-8 text \(byte 0xe9.*iconv"),
    ],
)
def test_plain_text_that_cannot_be_used(tmp_path, content, message):
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        PlainText(str(file), document_bytes=6).open()


# ---------------------------------------------------------------------------------------------------- Parquet


def test_parquet_over_several_row_groups(tmp_path):
    file = tmp_path / "a.parquet"
    rows = [f"text {index}" for index in range(7)]
    pyarrow.parquet.write_table(pyarrow.table({"body": rows, "id": range(7)}), file, row_group_size=3)
    assert [record["body"] for record in contents(Parquet(str(file), "body").open())] == rows


def test_parquet_with_conversations(tmp_path):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"messages": [CHAT, CHAT[:1]]}), file)
    assert contents(Parquet(str(file)).open()) == [{"messages": CHAT}, {"messages": CHAT[:1]}]


def test_parquet_that_cannot_be_used(tmp_path):
    file = tmp_path / "a.parquet"
    file.write_bytes(b"not parquet")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        Parquet(str(file)).open()
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), file)
    with pytest.raises(DataError, match=r"no column 'text'. Its columns are \['body'\]"):
        Parquet(str(file)).open()
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), file)
    with pytest.raises(DataError, match="the file has no rows"):
        Parquet(str(file)).open()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), file)
    with pytest.raises(DataError, match="row 1: no field 'text'"):
        Parquet(str(file)).open()[1]


# ---------------------------------------------------------------------------------------------------- ArrayRecord


def write_array_record(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return str(path)


def test_array_record_files_follow_each_other(tmp_path):
    first = write_array_record(tmp_path / "a.array_record", [b'{"text": "a0"}', b'{"text": "a1"}'])
    second = write_array_record(tmp_path / "b.array_record", [b'{"text": "b0"}', b'{"text": "b1"}'])
    assert texts(ArrayRecord((first, second)).open()) == ["a0", "a1", "b0", "b1"]


def test_array_record_that_cannot_be_used(tmp_path):
    path = write_array_record(tmp_path / "a.array_record", [b"\x0a\x05hello"])
    with pytest.raises(DataError, match=r"record 0: not a JSON object\. If the files belong to a TFDS data set"):
        ArrayRecord((path,)).open()
    path = write_array_record(tmp_path / "b.array_record", [b'{"body": "a"}'])
    with pytest.raises(DataError, match="record 0: no field 'text'"):
        ArrayRecord((path,)).open()
    path = write_array_record(tmp_path / "c.array_record", [])
    with pytest.raises(DataError, match=r"no records|not readable"):
        ArrayRecord((path,)).open()
    with pytest.raises(ValueError, match="paths is empty"):
        ArrayRecord(())


# ---------------------------------------------------------------------------------------------------- paths


def test_the_suffix_decides(tmp_path):
    for name in ("a.jsonl", "b.TXT", "c.md", "d.parquet", "e.array_record", "f.arrayrecord"):
        (tmp_path / name).write_text("x")
    kinds = [type(source_at(tmp_path / name)) for name in ("a.jsonl", "b.TXT", "c.md", "d.parquet")]
    assert kinds == [JsonLines, PlainText, PlainText, Parquet]
    assert source_at(tmp_path / "e.array_record", field="body") == ArrayRecord(
        (str(tmp_path / "e.array_record"),), "body"
    )
    assert type(source_at(tmp_path / "f.arrayrecord")) is ArrayRecord


def test_a_directory_is_all_its_files_by_name(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name, text in (("b.txt", "b"), ("sub/c.md", "c"), ("a.txt", "a"), (".hidden/d.txt", "d"), ("empty.py", "")):
        (tmp_path / name).write_text(text)
    (tmp_path / "README").write_text("not data")
    assert texts(open_path(tmp_path)) == ["a", "b", "c"]


def test_paths_that_stand_for_nothing(tmp_path):
    with pytest.raises(DataError, match="there is no such file or directory"):
        open_path(tmp_path / "none.txt")
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(DataError, match=re.escape("unknown suffix '.csv'; known are .jsonl")):
        open_path(tmp_path / "a.csv")
    with pytest.raises(DataError, match="no file here has a known suffix"):
        open_path(tmp_path)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="all 1 files are empty"):
        open_path(tmp_path)
    (tmp_path / "b.jsonl").write_text('{"text": "a"}')
    with pytest.raises(DataError, match=r"both plain text \(a.txt\) and records \(b.jsonl\)"):
        open_path(tmp_path)


def test_sources_that_do_not_exist_or_are_directories(tmp_path):
    with pytest.raises(DataError, match="there is no such file"):
        JsonLines(str(tmp_path / "a.jsonl")).open()
    with pytest.raises(DataError, match="this is a directory"):
        PlainText(str(tmp_path)).open()
    with pytest.raises(ValueError, match="document_bytes is 0"):
        PlainText("a.txt", document_bytes=0)
    with pytest.raises(ValueError, match="parts is empty"):
        Concatenated(())


def test_fingerprints_follow_content_and_not_place(tmp_path):
    for name, content in (("a.jsonl", "a"), ("b.jsonl", "a"), ("c.jsonl", "c")):
        (tmp_path / name).write_text(json.dumps({"text": content}))
    a, b, c = (open_path(tmp_path / name).fingerprint for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    assert a == b != c
