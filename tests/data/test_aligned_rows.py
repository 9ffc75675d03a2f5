"""Pairs of rows: cut at the ends of chunks with both contexts alike, packed together, and read by the loader."""

from __future__ import annotations

import collections
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill.align import Alignment, Placed, align
from jaxdistill.data.aligned import AlignedDocument, AlignedTokenizer
from jaxdistill.data.aligned_rows import AlignedRows, AlignedStatistics
from jaxdistill.data.evaluation import eval_batches
from jaxdistill.data.packing import BATCH_DTYPES, FirstFit
from jaxdistill.data.pipeline import DataConfig, make_loader, merge_states
from jaxdistill.data.tokenize import Tokenized
from jaxdistill.tokenizers import ByteTokenizer


def document_of(student, teacher, *, supervised=None):
    """A document from the ends of its tokens on both sides. Token i of the student is i + 1, the teacher's 1001 + i."""
    sides = [Placed(np.array(ends, np.int64)) for ends in (student, teacher)]
    alignment = align(*sides)
    tokens = [
        Tokenized(
            np.arange(first, first + len(side.ends), dtype=np.int32),
            np.arange(len(side.ends)) > 0,
            np.diff(side.ends, prepend=0).astype(np.int32),
        )
        for first, side in zip((1, 1001), sides, strict=True)
    ]
    count = int(alignment.student.max(initial=0))
    wanted = np.arange(count) > 0 if supervised is None else np.array(supervised, bool)
    return AlignedDocument(*tokens, alignment, wanted)


def test_a_document_that_fits_by_hand():
    # Chunks: 1|1, 2 3|2, 4|3 4.
    document = document_of([2, 4, 6, 8], [2, 6, 7, 8])
    rows = AlignedRows(5, 4)
    (piece,), counted = rows.cut(document, long_documents="split")
    batch = rows.arrays([[piece]])
    assert batch["tokens"].tolist() == [[1, 2, 3, 0, 0]]
    assert batch["targets"].tolist() == [[2, 3, 4, 0, 0]]
    assert batch["chunks"].tolist() == [[1, 1, 2, 0, 0]]
    assert batch["teacher"]["tokens"].tolist() == [[1001, 1002, 1003, 0]]
    assert batch["teacher"]["chunks"].tolist() == [[1, 2, 2, 0]]
    assert batch["teacher"]["target_bytes"].tolist() == [[4, 1, 1, 0]]
    assert counted == AlignedStatistics(documents=1)


def test_a_document_that_is_cut_by_hand():
    # Chunks of 1|1, 1|1, 2|1, 1|2, 1|1 tokens; rows of 5 and 4 positions.
    document = document_of([2, 4, 5, 6, 8, 9], [2, 4, 6, 7, 8, 9])
    rows = AlignedRows(5, 4)
    pieces, counted = rows.cut(document, long_documents="split")
    batch = rows.arrays([[piece] for piece in pieces])
    # After the first piece's last chunk (the token 4) its input is there too: whether a word ends is predicted there.
    assert batch["tokens"].tolist() == [[1, 2, 3, 4, 0], [3, 4, 5, 0, 0]]
    assert batch["targets"].tolist() == [[2, 3, 4, 5, 0], [4, 5, 6, 0, 0]]
    assert batch["loss_mask"].tolist() == [[1, 1, 1, 0, 0], [0, 1, 1, 0, 0]]
    assert batch["chunks"].tolist() == [[1, 2, 2, 0, 0], [0, 1, 2, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 0]]
    teacher = batch["teacher"]
    assert teacher["tokens"].tolist() == [[1001, 1002, 1003, 0], [1003, 1004, 1005, 0]]
    assert teacher["targets"].tolist() == [[1002, 1003, 1004, 0], [1004, 1005, 1006, 0]]
    assert teacher["loss_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    assert teacher["chunks"].tolist() == [[1, 2, 0, 0], [1, 1, 2, 0]]
    assert counted == AlignedStatistics(documents=1, split=1)


def test_truncate_and_drop():
    document = document_of([2, 4, 5, 6, 8, 9], [2, 4, 6, 7, 8, 9])
    (piece,), counted = AlignedRows(5, 4).cut(document, long_documents="truncate")
    assert (piece.start, piece.stop) == (0, 3)
    assert counted == AlignedStatistics(documents=1, truncated=1)
    assert AlignedRows(5, 4).cut(document, long_documents="drop") == ([], AlignedStatistics(documents=1, dropped=1))
    for fate in ("truncate", "drop"):
        (piece,), counted = AlignedRows(5, 5).cut(document, long_documents=fate)
        assert counted == AlignedStatistics(documents=1), "it fits"
    assert AlignedRows(5, 1).cut(document, long_documents="truncate")[1].unsupervised == 1


def test_a_chunk_longer_than_a_row_is_left_out_and_counted():
    # The second chunk has six tokens on the student's side: neither it nor the one that needs it as context has room.
    document = document_of([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [1, 7, 8, 9, 10])
    pieces, counted = AlignedRows(4, 8).cut(document, long_documents="split")
    assert [(piece.start, piece.stop) for piece in pieces] == [(3, 5)]
    assert counted == AlignedStatistics(documents=1, split=1, long_chunks=2)
    assert str(counted).startswith("1 documents, 1 split, 2 chunks longer than a row")


def test_what_follows_the_last_chunk_is_kept():
    """An end token of the student alone is supervised, also where the row is full before it."""
    document = document_of([1, 2, 3], [1, 2, 3])
    extended = AlignedDocument(
        Tokenized(np.arange(1, 5, dtype=np.int32), np.arange(4) > 0, np.array([1, 1, 1, 0], np.int32)),
        document.teacher,
        Alignment(np.array([1, 2, 3, 0], np.int32), document.alignment.teacher),
        document.supervised,
    )
    for length in (3, 2):
        rows = AlignedRows(length, 9)
        pieces, _ = rows.cut(extended, long_documents="split")
        batch = rows.arrays([[piece] for piece in pieces])
        supervised = batch["loss_mask"] > 0
        assert sorted(batch["targets"][supervised].tolist()) == [2, 3, 4]


def test_segments_and_chunks_of_packed_pieces():
    documents = [document_of([2, 4], [1, 2, 4]), document_of([1, 3, 5], [1, 3, 5])]
    rows = AlignedRows(6, 6)
    pieces = [rows.cut(document, long_documents="split")[0][0] for document in documents]
    batch = rows.arrays([pieces])
    assert batch["segment_ids"].tolist() == [[1, 2, 2, 0, 0, 0]]
    assert batch["chunks"].tolist() == [[1, 2, 3, 0, 0, 0]]
    assert batch["teacher"]["segment_ids"].tolist() == [[1, 1, 2, 2, 0, 0]]
    assert batch["teacher"]["chunks"].tolist() == [[0, 1, 2, 3, 0, 0]]
    counted = rows.count(pieces)
    assert counted == AlignedStatistics(
        rows=1, tokens=3, supervised=3, positions=6, chunks=3, teacher_tokens=4, teacher_positions=6
    )


def test_a_piece_goes_where_both_sides_have_room():
    sized = collections.namedtuple("sized", "name sizes")
    packer = FirstFit(length=(10, 6), open_rows=2)
    pieces = [sized("a", (2, 5)), sized("b", (2, 2)), sized("c", (2, 1)), sized("d", (8, 4)), sized("e", (1, 5))]
    finished = [row for piece in pieces for row in packer.add(piece)]
    # "c" fills the teacher's side of the first row; "d" then fills the second.
    assert [[piece.name for piece in row] for row in finished] == [["a", "c"], ["b", "d"]]
    assert [[piece.name for piece in row] for row in packer.rows] == [["e"]]
    packer = FirstFit(length=(10, 6), open_rows=2, rows=[[sized("a", (9, 1))], [sized("b", (1, 4))]])
    ((first,),) = packer.add(sized("c", (2, 3)))
    assert first.name == "a", "a tenth of the student's side is less than a third of the teacher's"


def test_fields_and_types_are_those_of_two_batches():
    batch = AlignedRows(3, 5).arrays([[], []])
    dtypes = BATCH_DTYPES | {"chunks": np.int32}
    for fields, length in ((batch, 3), (batch["teacher"], 5)):
        arrays = {name: values for name, values in fields.items() if name != "teacher"}
        assert {name: values.dtype for name, values in arrays.items()} == dtypes
        assert all(values.shape == (2, length) and not values.any() for values in arrays.values())


@st.composite
def documents(draw):
    """Random documents: chunks of up to seven tokens, tokens in no chunk between them, everything supervised or not."""
    ids, chunk_ids = ([], []), ([], [])
    count = draw(st.integers(0, 8))
    for chunk in range(1, count + 1):
        for side in range(2):
            for number, size in ((0, draw(st.sampled_from([0, 0, 0, 1, 3]))), (chunk, draw(st.integers(1, 7)))):
                chunk_ids[side].extend([number] * size)
    for side in range(2):
        chunk_ids[side].extend([0] * draw(st.sampled_from([0, 0, 1, 4])))
        ids[side].extend(range(1, len(chunk_ids[side]) + 1))
    flags = [draw(st.lists(st.booleans(), min_size=len(own), max_size=len(own))) for own in ids]
    whole = [
        all(
            flag and index > 0
            for own, marks in zip(chunk_ids, flags, strict=True)
            for index, (number, flag) in enumerate(zip(own, marks, strict=True))
            if number == chunk
        )
        for chunk in range(1, count + 1)
    ]
    student, teacher = (
        Tokenized(np.array(own, np.int32), np.array(flag, bool), np.ones(len(own), np.int32))
        for own, flag in zip(ids, flags, strict=True)
    )
    alignment = Alignment(*(np.array(own, np.int32) for own in chunk_ids))
    return AlignedDocument(student, teacher, alignment, np.array(whole, bool))


def fields_of(rows, pieces):
    """For each side the fields of each piece alone, without padding."""
    batch = rows.arrays([[piece] for piece in pieces])
    return [
        [{name: fields[name][index][:size] for name in (*BATCH_DTYPES, "chunks")} for fields, size in sides]
        for index, piece in enumerate(pieces)
        for sides in [[(batch, piece.sizes[0]), (batch["teacher"], piece.sizes[1])]]
    ]


@settings(max_examples=200, deadline=None)
@given(document=documents(), student_length=st.integers(1, 30), teacher_length=st.integers(1, 30))
def test_cutting_supervises_everything_once_from_the_same_context(document, student_length, teacher_length):
    rows = AlignedRows(student_length, teacher_length)
    pieces, counted = rows.cut(document, long_documents="split")
    compared, supervised = collections.Counter(), (collections.Counter(), collections.Counter())
    for piece, sides in zip(pieces, fields_of(rows, pieces), strict=True):
        first_chunks, numbers = [], []
        for side, (fields, length) in enumerate(zip(sides, rows.lengths, strict=True)):
            tokens, chunks = document.sides[side]
            assert len(fields["tokens"]) <= length
            if not len(fields["tokens"]):
                continue
            # Ids count from 1, so a position's input is the token of this index, and its target the next one.
            inputs, targets = fields["tokens"] - 1, fields["targets"] - 1
            assert (inputs == np.arange(inputs[0], inputs[0] + len(inputs))).all()
            assert (targets == inputs + 1).all()
            on = fields["loss_mask"] > 0
            assert tokens.supervised[targets[on]].all()
            supervised[side].update(targets[on].tolist())
            # A chunk is whole, and where it is compared it is so with its own number.
            assert (on | (fields["chunks"] == 0)).all()
            pairs = set(zip(fields["chunks"].tolist(), chunks[targets].tolist(), strict=True)) - {
                (0, chunk) for chunk in range(99)
            }
            numbers.append(sorted(pairs))
            for _, chunk in pairs:
                assert set(np.flatnonzero(chunks == chunk)) <= set(targets[fields["chunks"] > 0].tolist())
            first_chunks.append((inputs[0], chunks[inputs[0]]))
            if piece.stop < len(document.units[0].lasts):
                last = max(np.flatnonzero(chunks <= piece.stop) * (chunks[chunks <= piece.stop] > 0))
                if last + 1 < len(tokens):
                    assert inputs[-1] == last, "the end of the last chunk is an input"
                    assert not on[-1]
                    assert fields["chunks"][-1] == 0
        if len(numbers) == 2 and piece.chunks:
            assert numbers[0] == numbers[1]
            assert [number for number, _ in numbers[0]] == list(range(1, piece.chunks + 1))
            compared.update(chunk for _, chunk in numbers[0])
        if piece.start and len(first_chunks) == 2:
            assert first_chunks[0][1] == first_chunks[1][1] == piece.start, "both contexts begin with the same chunk"
            for side, (index, chunk) in enumerate(first_chunks):
                assert index == np.argmax(document.sides[side][1] == chunk), "with all of it"
    assert set(compared.values()) <= {1}
    assert all(set(found.values()) <= {1} for found in supervised)
    wanted = {int(c) + 1 for c in np.flatnonzero(document.supervised)}
    student = {i for i in range(1, len(document.student)) if document.student.supervised[i]}
    if not counted.long_chunks:
        assert set(compared) == wanted
        assert set(supervised[0]) == student
        assert counted.split == (len(document.units[0].lasts) > 0 and rows_needed(document, rows) > 1)
    else:
        # What is missing is in a chunk that has no room with the chunk before it (or before the first chunk).
        for chunk in wanted - set(compared):
            assert too_long(document, rows, chunk)
        assert counted.split == 1


def rows_needed(document, rows):
    """1 if the whole document has room."""
    return 1 + any(
        max(0, len(tokens) - 1) > length for (tokens, _), length in zip(document.sides, rows.lengths, strict=True)
    )


def too_long(document, rows, chunk):
    sizes = []
    for tokens, chunks in document.sides:
        start = np.argmax(chunks == chunk - 1) if chunk > 1 else 0
        stop = np.flatnonzero(chunks == chunk)[-1] + 1
        sizes.append(min(stop, len(tokens) - 1) - start)
    # The first chunk after one that was left out has that one as context.
    return any(size > length for size, length in zip(sizes, rows.lengths, strict=True))


@settings(max_examples=60, deadline=None)
@given(some=st.lists(documents(), min_size=1, max_size=6), lengths=st.tuples(st.integers(8, 30), st.integers(8, 30)))
def test_packed_is_the_same_as_separate(some, lengths):
    rows = AlignedRows(*lengths)
    pieces = [piece for document in some for piece in rows.cut(document, long_documents="split")[0]]
    packer = FirstFit(length=rows.lengths, open_rows=3)
    packed = [row for piece in pieces for row in packer.add(piece)] + packer.rows
    assert sum(map(len, packed)) == len(pieces)
    batch = rows.arrays(packed)
    for index, row in enumerate(packed):
        alone = fields_of(rows, row)
        found = set()
        for side, fields in enumerate((batch, batch["teacher"])):
            before = 0
            for segment, (piece, sides) in enumerate(zip(row, alone, strict=True), start=1):
                here = fields["segment_ids"][index] == segment
                assert here.sum() == piece.sizes[side]
                for name in ("tokens", "targets", "loss_mask", "positions", "target_bytes"):
                    np.testing.assert_array_equal(fields[name][index][here], sides[side][name])
                chunks = fields["chunks"][index][here]
                np.testing.assert_array_equal(
                    chunks, np.where(sides[side]["chunks"], sides[side]["chunks"] + before, 0)
                )
                before += piece.chunks
            assert not fields["chunks"][index][fields["segment_ids"][index] == 0].any()
            found.add(tuple(np.unique(fields["chunks"][index][fields["chunks"][index] > 0]).tolist()))
        assert found == {tuple(range(1, sum(piece.chunks for piece in row) + 1))}


TEACHER = ByteTokenizer(("<eos>", "<bos>", "<extra>"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """60 texts, many longer than the rows."""
    rng = np.random.default_rng(0)
    words = ["the ", "dog", " fox", "é", "over ", "jumps", "  ", "\n", "lazy "]
    texts = ["".join(rng.choice(words, size=rng.integers(0, 25))) for _ in range(60)]
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def config_for(path, **changes):
    return DataConfig(**({"path": path, "length": 24, "teacher_length": 40, "batch_size": 8, "seed": 3} | changes))


def loaders(config, count, student, teacher=TEACHER):
    return [
        make_loader(config, student, teacher_tokenizer=teacher, process_index=index, process_count=count)
        for index in range(count)
    ]


def flat(batch):
    return {name: value for name, value in batch.items() if name != "teacher"} | {
        f"teacher.{name}": value for name, value in batch["teacher"].items()
    }


def global_batches(parts, steps):
    found = []
    for _ in range(steps):
        local = [flat(next(part)) for part in parts]
        found.append({name: np.concatenate([batch[name] for batch in local]) for name in local[0]})
    return found


def assert_equal(left, right):
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def student(loaded):
    return loaded["byte_level"]


@pytest.fixture(scope="module")
def uninterrupted(corpus, student):
    return global_batches(loaders(config_for(corpus), 1, student), 10)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_processes_gives_the_same_pairs_of_rows(corpus, student, uninterrupted, count):
    assert_equal(global_batches(loaders(config_for(corpus), count, student), 10), uninterrupted)
    first = uninterrupted[0]
    assert first["tokens"].shape == first["chunks"].shape == (8, 24)
    assert first["teacher.tokens"].shape == first["teacher.chunks"].shape == (8, 40)
    for mine, theirs in zip(first["chunks"], first["teacher.chunks"], strict=True):
        assert set(mine.tolist()) == set(theirs.tolist())
        assert mine.max() > 3


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 4), (4, 2)])
@pytest.mark.parametrize("step", [1, 5])
def test_a_resume_of_pairs_continues_exactly(corpus, student, uninterrupted, before, after, step):
    first = loaders(config_for(corpus), before, student)
    global_batches(first, step)
    saved = json.loads(json.dumps(merge_states([part.state() for part in first])))
    second = loaders(config_for(corpus), after, student)
    for part in second:
        part.restore(saved)
    assert_equal(global_batches(second, 10 - step), uninterrupted[step:])
    statistics = [part.statistics for part in second]
    assert sum(each.rows for each in statistics) == 10 * 8
    # A resumed shard counts on from what was saved.
    assert sum(each.teacher_positions for each in statistics) == 10 * 8 * 40
    assert sum(each.chunks for each in statistics) == sum(
        int(batch["chunks"].max(axis=1).sum()) for batch in uninterrupted
    )


def test_a_resume_refuses_another_teacher_or_other_chunks(corpus, student):
    saved = loaders(config_for(corpus), 1, student)[0].state()
    for config, teacher, message in (
        (config_for(corpus), ByteTokenizer(), "teacher_tokenizer: saved"),
        (config_for(corpus), ByteTokenizer(("<eos>", "<bos>", "<extra>"), chat_template="x"), "teacher_chat_template"),
        (config_for(corpus, teacher_length=41), TEACHER, "teacher_length: saved 40, now 41"),
        (config_for(corpus, chunks="words"), TEACHER, "chunks: saved 'minimal', now 'words'"),
    ):
        with pytest.raises(ValueError, match=message):
            loaders(config, 1, student, teacher)[0].restore(saved)
    with pytest.raises(ValueError, match=r"teacher_tokenizer: saved .*, now None"):
        make_loader(config_for(corpus), student).restore(saved)


def test_one_tokenizer_is_read_as_before(corpus, student):
    """What it gives and saves has nothing of a second one."""
    loader = make_loader(config_for(corpus), student)
    assert next(loader).keys() == BATCH_DTYPES.keys()
    state = loader.state()
    assert not {"teacher_length", "chunks", "teacher_tokenizer"} & state["fingerprint"].keys()
    assert state["shards"]["0"]["statistics"].keys() == {
        *("documents", "split", "truncated", "dropped", "unsupervised", "rows", "tokens", "supervised", "positions")
    }


def test_rows_of_a_teacher_are_as_long_as_the_students_unless_said(corpus, student):
    batch = next(loaders(config_for(corpus, teacher_length=None), 1, student)[0])
    assert batch["teacher"]["tokens"].shape == (8, 24)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_length": 0}, "teacher_length is 0; it must be at least 1"),
        ({"chunks": "lines"}, "chunks is 'lines'; allowed are minimal, words"),
    ],
)
def test_illegal_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


TEXTS = ["the quick brown fox", "jumps over the lazy dog, and the dog sleeps", "", "é"]


@pytest.mark.parametrize("pack", [True, False])
def test_held_out_windows_of_pairs(student, pack):
    settings = {"batch_size": 3, "teacher_tokenizer": TEACHER, "teacher_length": 30, "pack": pack}
    batches = eval_batches(TEXTS, student, length=16, **settings)
    documents = AlignedTokenizer(student, TEACHER, prepend_bos=False, append_eos=False)(
        [{"text": text} for text in TEXTS], ["text"] * 4
    )
    found = sum(int(batch["chunks"].max(axis=1).sum()) for batch in batches)
    assert found == sum(int(document.supervised.sum()) for document in documents) > 10
    supervised = sum(int(batch["loss_mask"].sum()) for batch in batches)
    assert supervised == sum(max(0, len(document.student) - 1) for document in documents)
    shapes = {(batch["tokens"].shape, batch["teacher"]["tokens"].shape) for batch in batches}
    if pack:
        assert shapes == {((3, 16), (3, 30))}
    else:
        assert shapes <= {((3, 4), (3, 8)), ((3, 8), (3, 15)), ((3, 16), (3, 30))}
        assert all((batch["segment_ids"] <= 1).all() for batch in batches)
    words = eval_batches(TEXTS, student, length=16, chunks="words", **settings)
    assert sum(int(batch["chunks"].max(axis=1).sum()) for batch in words) < found
    first = eval_batches(TEXTS, student, length=16, windows_per_document=1, **settings)
    assert 0 < sum(int(batch["chunks"].max(axis=1).sum()) for batch in first) < found


def test_the_command_line_reads_a_config_of_pairs():
    import tyro

    config = tyro.cli(DataConfig, args=["--path", "a.jsonl", "--teacher-length", "64", "--chunks", "words"])
    assert config == DataConfig(path="a.jsonl", teacher_length=64, chunks="words")
