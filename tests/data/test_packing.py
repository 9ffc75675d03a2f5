"""Packing against rows written out by hand, and what must hold for any documents."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill.data.packing import BATCH_DTYPES, FirstFit, Statistics, count_row, cut, to_arrays
from jaxdistill.data.tokenize import DocumentTokenizer, Tokenized
from jaxdistill.tokenizers.byte_level import ByteTokenizer

BOS, EOS = 256, 257


def document(*ids, supervised=None, text_bytes=None):
    count = len(ids)
    return Tokenized(
        np.asarray(ids, np.int32),
        np.ones(count, bool) if supervised is None else np.asarray(supervised, bool),
        np.ones(count, np.int32) if text_bytes is None else np.asarray(text_bytes, np.int32),
    )


def pack(documents, *, length, open_rows=4, long_documents="split"):
    packer, rows, statistics = FirstFit(length=length, open_rows=open_rows), [], Statistics()
    for doc in documents:
        pieces, counted = cut(doc, length=length, long_documents=long_documents)
        statistics += counted
        for piece in pieces:
            rows += packer.add(piece)
    return rows + packer.rows, statistics


def expect(batch, **fields):
    for name, rows in fields.items():
        np.testing.assert_array_equal(batch[name], rows, err_msg=name)


def test_two_documents_in_a_row():
    rows, _ = pack([document(11, 12, 13), document(21, 22, text_bytes=[1, 4])], length=5)
    expect(
        to_arrays(rows, 5),
        tokens=[[11, 12, 21, 0, 0]],
        targets=[[12, 13, 22, 0, 0]],
        loss_mask=[[1, 1, 1, 0, 0]],
        positions=[[0, 1, 0, 0, 0]],
        segment_ids=[[1, 1, 2, 0, 0]],
        target_bytes=[[1, 1, 4, 0, 0]],
    )


def test_a_split_document_loses_no_target():
    # Six predictions in rows of four: the last position of the first piece predicts the first token of the second.
    rows, statistics = pack([document(1, 2, 3, 4, 5, 6, 7)], length=4)
    expect(
        to_arrays(rows, 4),
        tokens=[[1, 2, 3, 4], [5, 6, 0, 0]],
        targets=[[2, 3, 4, 5], [6, 7, 0, 0]],
        loss_mask=[[1, 1, 1, 1], [1, 1, 0, 0]],
        positions=[[0, 1, 2, 3], [0, 1, 0, 0]],
        segment_ids=[[1, 1, 1, 1], [1, 1, 0, 0]],
    )
    assert statistics == Statistics(documents=1, split=1)


def test_a_document_of_exactly_one_row_is_not_split():
    rows, statistics = pack([document(1, 2, 3, 4, 5)], length=4)
    expect(to_arrays(rows, 4), tokens=[[1, 2, 3, 4]], targets=[[2, 3, 4, 5]])
    assert statistics == Statistics(documents=1)


def test_truncate_and_drop():
    long = document(1, 2, 3, 4, 5, 6)
    rows, statistics = pack([long, document(8, 9)], length=3, long_documents="truncate")
    expect(to_arrays(rows, 3), tokens=[[1, 2, 3], [8, 0, 0]], targets=[[2, 3, 4], [9, 0, 0]])
    assert statistics == Statistics(documents=2, truncated=1)
    rows, statistics = pack([long, document(8, 9)], length=3, long_documents="drop")
    expect(to_arrays(rows, 3), tokens=[[8, 0, 0]], targets=[[9, 0, 0]])
    assert statistics == Statistics(documents=2, dropped=1)


def test_nothing_to_predict_is_counted_and_takes_no_room():
    silent = document(1, 2, 3, supervised=[True, False, False])  # the first token is never a target
    rows, statistics = pack([document(), document(5), silent, document(7, 8)], length=4)
    expect(to_arrays(rows, 4), tokens=[[7, 0, 0, 0]])
    assert statistics == Statistics(documents=4, unsupervised=3)


def test_prompt_tokens_are_inputs_but_not_targets():
    rows, _ = pack([document(1, 2, 3, 4, supervised=[False, False, True, True])], length=4)
    expect(to_arrays(rows, 4), tokens=[[1, 2, 3, 0]], targets=[[2, 3, 4, 0]], loss_mask=[[0, 1, 1, 0]])


def test_first_fit_takes_the_first_open_row_with_room():
    # Sizes 3, 3, 1, 2 in rows of 4: the 1 fills row one, the 2 fits neither open row.
    rows, _ = pack(
        [document(1, 1, 1, 1), document(2, 2, 2, 2), document(3, 3), document(4, 4, 4)], length=4, open_rows=2
    )
    expect(to_arrays(rows, 4), tokens=[[1, 1, 1, 3], [2, 2, 2, 0], [4, 4, 0, 0]])


def test_the_fullest_row_leaves_when_too_many_are_open():
    rows, _ = pack([document(*[1] * 4), document(*[2] * 5), document(*[3] * 6)], length=6, open_rows=2)
    # Sizes 3, 4, 5: the row of 2s is the fullest when the 3s need one.
    assert [row[0].document.ids[0] for row in rows] == [2, 1, 3]


def test_fields_and_types_are_those_of_a_batch():
    import dataclasses

    from jaxdistill.types import Batch

    assert set(BATCH_DTYPES) == {field.name for field in dataclasses.fields(Batch)}
    batch = to_arrays([[]], 3)
    assert {name: values.dtype for name, values in batch.items()} == BATCH_DTYPES
    assert all(values.shape == (1, 3) and not values.any() for values in batch.values())


def test_rows_are_counted():
    rows, _ = pack([document(1, 2, 3, 4, supervised=[False, False, True, True])], length=8)
    counted = count_row(rows[0], 8)
    assert counted == Statistics(rows=1, tokens=3, supervised=2, positions=8)
    assert counted.padding_fraction == pytest.approx(5 / 8)


def test_plain_documents_are_framed():
    tokenize = DocumentTokenizer(ByteTokenizer(), prepend_bos=True, append_eos=True)
    (doc,) = tokenize([{"text": "aé"}], ["text"])
    assert doc.ids.tolist() == [BOS, 97, 0xC3, 0xA9, EOS]
    assert doc.text_bytes.tolist() == [0, 1, 1, 1, 0]
    assert doc.supervised[1:].all()


def test_the_end_of_sequence_target_stands_for_no_bytes():
    tokenize = DocumentTokenizer(ByteTokenizer(), prepend_bos=False, append_eos=True)
    rows, _ = pack(tokenize([{"text": "ab"}], ["text"]), length=3)
    expect(
        to_arrays(rows, 3),
        tokens=[[97, 98, 0]],
        targets=[[98, EOS, 0]],
        loss_mask=[[1, 1, 0]],
        target_bytes=[[1, 0, 0]],
    )


def test_an_empty_document_is_not_framed_into_something():
    tokenize = DocumentTokenizer(ByteTokenizer(), prepend_bos=True, append_eos=True)
    (doc,) = tokenize([{"text": ""}], ["text"])
    assert len(doc) == 0


def test_special_strings_in_plain_text_are_text():
    tokenize = DocumentTokenizer(ByteTokenizer(), prepend_bos=False, append_eos=False)
    (doc,) = tokenize([{"text": "<eos>"}], ["text"])
    assert doc.ids.tolist() == list(b"<eos>")


def test_framing_needs_the_tokens():
    with pytest.raises(ValueError, match="append_eos is set and the tokenizer has no such token"):
        DocumentTokenizer(ByteTokenizer(special_strings=()), prepend_bos=False, append_eos=True)


# Each document is (number, size); token i of document d is 1000 d + i, so that every target names itself.
SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=25)


@settings(max_examples=80, deadline=None)
@given(sizes=SIZES, length=st.integers(1, 16), open_rows=st.integers(1, 4), data=st.data())
def test_every_target_once_and_none_across_documents(sizes, length, open_rows, data):
    documents = [
        document(
            *(1000 * number + np.arange(size)),
            supervised=data.draw(st.lists(st.booleans(), min_size=size, max_size=size)),
        )
        for number, size in enumerate(sizes, start=1)
    ]
    rows, statistics = pack(documents, length=length, open_rows=open_rows)
    batch = to_arrays(rows, length)
    used, mask = batch["segment_ids"] > 0, batch["loss_mask"] > 0
    wanted = [doc.ids[i] for doc in documents for i in range(1, len(doc)) if doc.supervised[i]]
    assert collections.Counter(batch["targets"][mask].tolist()) == collections.Counter(wanted)
    assert not mask[~used].any()
    assert (batch["targets"] - batch["tokens"])[used].tolist() == [1] * int(used.sum())
    assert statistics.documents == len(sizes)
    assert statistics.split == sum(size - 1 > length for size in sizes)
    # A segment is a run whose positions count from 0; padding only at the end.
    for segments, positions in zip(batch["segment_ids"], batch["positions"], strict=True):
        expected, previous = [], None
        for segment in segments:
            expected.append(0 if segment != previous or segment == 0 else expected[-1] + 1)
            previous = segment
        assert positions.tolist() == expected
        steps = np.diff(segments)
        assert set(steps[segments[1:] > 0]) <= {0, 1}
        assert (steps[segments[1:] == 0] <= 0).all()
    for name, values in batch.items():
        assert not values[~used].any(), f"{name} is not 0 on padding"
