"""Chunks against their definition on random tokenizations and every kind of tokenizer, and defects of other code."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from align_reference import placed, walked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import KINDS, TEXTS

from jaxdistill.align import Placed, align, boundary_mask
from jaxdistill.tokenizers import ByteTokenizer


def ends(*numbers, outside=()):
    return Placed(np.array(numbers, np.int64), ~np.isin(np.arange(len(numbers)), outside))


def chunks_of(student, teacher, **settings):
    return tuple(ids.tolist() for ids in align(student, teacher, **settings))


@st.composite
def tokenizations(draw, texts):
    """Two random tokenizations of random texts: tokens of every width, zero too, and tokens of one side alone."""
    sides = ([], [])
    for _ in range(draw(texts)):
        size = draw(st.integers(0, 12))
        for side in sides:
            cuts = draw(st.lists(st.integers(0, size), max_size=10)) + [size] * (size > 0)
            nothing = draw(st.sampled_from([False] * 9 + [True]))
            sorted_cuts = sorted([] if nothing else cuts)
            some = len(sorted_cuts)
            wide = np.diff(sorted_cuts, prepend=0) > 0
            inside = wide | np.array(draw(st.lists(st.booleans(), min_size=some, max_size=some)), bool)
            opens = np.array(draw(st.lists(st.booleans(), min_size=some, max_size=some)), bool)
            side.append(Placed(np.array(sorted_cuts, np.int64), inside, opens))
    return sides


def joined(texts):
    columns = [np.concatenate([np.asarray(each[field]) for each in texts]) for field in range(3)]
    return Placed(*columns, np.array([len(each.ends) for each in texts]))


@settings(max_examples=150, deadline=None)
@given(sides=tokenizations(texts=st.integers(1, 5)), words=st.booleans())
def test_chunks_are_those_of_the_definition(sides, words):
    found = align(*map(joined, sides), chunks="words" if words else "minimal")
    expected = [walked(*pair, words=words) for pair in zip(*sides, strict=True)]
    for ids, wanted in zip(found, zip(*expected, strict=True), strict=True):
        np.testing.assert_array_equal(ids, np.concatenate(wanted))
        assert ids.dtype == np.int32


@pytest.mark.parametrize(("student", "teacher"), list(itertools.combinations(KINDS, 2)))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, words=st.booleans())
def test_every_pair_of_tokenizers_on_random_unicode(loaded, student, teacher, text, words):
    sides = [placed(loaded[kind], text) for kind in (student, teacher)]
    found = align(*sides, chunks="words" if words else "minimal")
    for ids, wanted in zip(found, walked(*sides, words=words), strict=True):
        np.testing.assert_array_equal(ids, wanted)
    if all(len(side.ends) for side in sides):
        widths = [
            np.bincount(ids, weights=np.diff(side.ends, prepend=0)) for ids, side in zip(found, sides, strict=True)
        ]
        np.testing.assert_array_equal(*widths, err_msg="a chunk is of the same bytes on both sides")
        assert widths[0][0] == 0
        assert widths[0].sum() == len(text.encode()), "every byte is in a chunk"
        assert all((np.diff(ids) >= 0).all() and ids[0] == 1 for ids in found)


def test_chunks_by_hand():
    #  The|quick|ly|ran  against  Th|equ|ickly|r|an
    assert chunks_of(ends(3, 8, 10, 13), ends(2, 5, 10, 11, 13)) == ([1, 1, 1, 2], [1, 1, 1, 2, 2])


def test_words_are_joined_where_only_one_side_begins_one():
    student = Placed(np.array([2, 4, 6, 8]), None, np.array([True, True, False, True]))
    teacher = Placed(np.array([2, 4, 6, 8]), None, np.array([True, False, True, True]))
    assert chunks_of(student, teacher, chunks="words") == ([1, 1, 1, 2], [1, 1, 1, 2])
    assert chunks_of(student, teacher) == ([1, 2, 3, 4], [1, 2, 3, 4])


def test_a_token_of_one_side_begins_no_word():
    # The teacher's second token is in no chunk: what it begins with does not count.
    student = Placed(np.array([2, 4]), None, np.array([True, True]))
    teacher = Placed(np.array([2, 2, 4]), np.array([True, False, True]), np.array([True, True, False]))
    assert chunks_of(student, teacher, chunks="words") == ([1, 1], [1, 0, 1])


def test_a_beginning_token_of_one_side_in_the_middle_drops_nothing():
    # <bos> a <bos> b c d <eos>  against  a b c d </s>: lengths counted since the last special token differ from there
    # on, which lost everything after the second <bos>.
    found = chunks_of(ends(0, 1, 1, 2, 3, 4, 5, outside=(0, 2)), ends(1, 2, 3, 4, 5))
    assert found == ([0, 1, 0, 2, 3, 4, 5], [1, 2, 3, 4, 5])


def test_a_beginning_token_and_a_prefix_space_of_one_side_alone():
    # <bos>, " hello", " wor", "ld"  against  "hello", " world": the space before hello has no byte in the text.
    assert chunks_of(ends(5, 11), ends(0, 5, 9, 11, outside=(0,))) == ([1, 2], [0, 1, 2, 2])


def test_a_lone_prefix_space_belongs_to_the_word_after_it():
    assert chunks_of(ends(1, 2), ends(0, 1, 2)) == ([1, 2], [1, 1, 2])
    assert chunks_of(ends(2, 4, 4), ends(2, 2, 4)) == ([1, 2, 2], [1, 2, 2])


def test_alignment_changes_no_input():
    student, teacher = ends(0, 1, 1, 3, outside=(2,)), ends(1, 2, 3)
    before = [np.copy(array) for array in (*student[:2], *teacher[:2])]
    align(student, teacher)
    for array, copy in zip((*student[:2], *teacher[:2]), before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_tokens_that_end_inside_a_character(loaded):
    text = "a😅e\u0301"
    student, teacher = (placed(loaded[kind], text) for kind in ("bytes", "sentencepiece_bpe"))
    found = align(student, teacher)
    # Unknown to the teacher: it falls back to a token for each of the eight bytes.
    assert found.student.tolist() == found.teacher.tolist() == list(range(1, 9))


def test_bytes_that_a_tokenizer_drops_are_accounted_for(loaded):
    """Collapsed spaces and composed characters: decoded strings would not compare equal."""
    text = "the   dog ﬁne"
    student, teacher = (placed(loaded[kind], text) for kind in ("bytes", "sentencepiece_unigram"))
    found = align(student, teacher)
    widths = [
        np.bincount(i, weights=np.diff(s.ends, prepend=0)) for i, s in zip(found, (student, teacher), strict=True)
    ]
    np.testing.assert_array_equal(*widths)
    assert widths[0].sum() == len(text.encode())
    assert found.student.max() > 3


def test_a_text_of_which_one_side_has_nothing_is_in_no_chunk():
    nothing = Placed(np.zeros(0, np.int64))
    assert chunks_of(ends(1, 2), nothing) == ([0, 0], [])
    assert chunks_of(ends(1, 2), ends(0, outside=(0,))) == ([0, 0], [0])
    assert chunks_of(nothing, nothing) == ([], [])
    no_texts = Placed(np.zeros(0, np.int64), counts=np.zeros(0, np.int64))
    assert chunks_of(no_texts, no_texts) == ([], [])


def test_two_texts_are_told_apart():
    with pytest.raises(ValueError, match="text 1 ends at 3 for the student and at 4 for the teacher; give two tokeniz"):
        align(Placed(np.array([2, 3]), counts=np.array([1, 1])), Placed(np.array([1, 2, 4]), counts=np.array([2, 1])))


def test_words_need_to_know_where_they_may_begin():
    with pytest.raises(ValueError, match="chunks of words need `opens`, for both sides"):
        align(ends(1), ends(1), chunks="words")


def test_memory_grows_with_the_tokens_alone():
    """A matrix of tokens by chunks has 67 MB for this text."""
    tokens = Placed(np.arange(1, 8193))
    tracemalloc.start()
    align(tokens, tokens)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * 8192


def test_boundaries_are_white_space_and_special_tokens():
    vocabulary = [b" the", b"the", b" ", b"\n\n", b"\tx", b"", "\u00a0x".encode(), b"\rx", b"<eos>"]
    assert np.flatnonzero(boundary_mask(vocabulary, [8])).tolist() == [0, 2, 3, 4, 8]
    assert np.flatnonzero(boundary_mask(vocabulary, [], white_space=(b"\r", b" "))).tolist() == [0, 2, 7]


def test_boundaries_of_a_dummy_prefix(loaded):
    tokenizer = loaded["sentencepiece_bpe"]
    first = tokenizer.encode("the dog").ids[0]
    assert boundary_mask(tokenizer.token_bytes(), [])[first], "written with a space, which the text does not have"
    special = ByteTokenizer().special.all.values()
    mask = boundary_mask(ByteTokenizer().token_bytes(), special)
    assert np.flatnonzero(mask).tolist() == [9, 10, 32, 256, 257, 258, 259, 260]
