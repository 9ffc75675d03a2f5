"""The map between two vocabularies: every token's nearest by the definition of the distance, computed the plain way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill.align import edit_distance
from jaxdistill.align.edit_distance import minimum_edit_map
from jaxdistill.assets import asset
from jaxdistill.tokenizers import load_tokenizer


def levenshtein(one: bytes, other: bytes) -> int:
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        above, row = row, [i]
        for j, b in enumerate(other, 1):
            row.append(min(above[j - 1] + (a != b), above[j] + 1, row[j - 1] + 1))
    return row[-1]


def by_definition(student: list[bytes], teacher: list[bytes]) -> list[int]:
    """The nearest id, the highest of equal spellings, then the lowest of equal distances."""
    last = {token: index for index, token in enumerate(teacher)}
    return [min((levenshtein(token, other), index) for other, index in last.items())[1] for token in student]


WORDS = st.lists(st.binary(max_size=7) | st.text("ab ", max_size=9).map(str.encode), min_size=1, max_size=25)


@given(WORDS, WORDS)
@settings(max_examples=300, deadline=None)
def test_every_id_is_the_nearest(student, teacher):
    found = minimum_edit_map(student, teacher)
    assert found.dtype == np.int32
    assert found.tolist() == by_definition(student, teacher)


def test_bytes_that_share_a_bit_and_repeat(monkeypatch):
    """With few bits nearly all are shared, and the bound must stay one."""
    rng = np.random.default_rng(0)
    student, teacher = (
        [bytes(rng.choice([97, 98, 225, 0], rng.integers(1, 14)).astype(np.uint8)) for _ in range(120)]
        for _ in range(2)
    )
    expected = by_definition(student, teacher)
    assert minimum_edit_map(student, teacher).tolist() == expected
    monkeypatch.setattr(edit_distance, "SIGNATURE_WORDS", 1)
    assert minimum_edit_map(student, teacher).tolist() == expected


def test_long_tokens():
    rng = np.random.default_rng(1)
    teacher = [b" " * n for n in range(1, 140)] + [bytes(rng.integers(97, 100, 300).astype(np.uint8))]
    student = [b" " * 150, b"=" * 64, teacher[-1][:290] + b"x" * 3, b""]
    assert minimum_edit_map(student, teacher).tolist() == by_definition(student, teacher) == [138, 0, 139, 0]


def test_a_piece_of_text_is_preferred_to_a_single_byte_of_the_same_spelling():
    """SentencePiece has b"a" twice: among its bytes, which text never becomes, and among its pieces."""
    assert minimum_edit_map([b"a", b"ax"], [b"<s>", b"a", b"b", b"a"]).tolist() == [3, 3]


def test_equal_vocabularies_map_to_themselves():
    tokens = [bytes([a, b]) for a in range(30) for b in range(30)]
    assert minimum_edit_map(tokens, tokens).tolist() == list(range(900))


def test_progress_counts_what_has_no_equal():
    seen = []
    minimum_edit_map([b"a", b"b", b"c", b"b"], [b"a"], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 2), (1, 2)]


def test_an_empty_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocabulary is empty; give"):
        minimum_edit_map([b"a"], [])


@pytest.mark.real
def test_real_vocabularies():
    """Llama 2's pieces in SmolLM2's: equal spellings, and some of those that have none."""
    student = load_tokenizer(asset("tokenizers") / "tokenizer.llama2").token_bytes()
    teacher = load_tokenizer(asset("smollm2")).token_bytes()
    known = set(teacher)
    missing = [token for token in student if token not in known]
    equal = [token for token in student if token in known]
    assert len(missing) > 10_000
    assert [teacher[index] for index in minimum_edit_map(equal, teacher)] == equal
    some = [missing[index] for index in np.random.default_rng(0).choice(len(missing), 3, replace=False)]
    assert minimum_edit_map(some, teacher).tolist() == by_definition(some, teacher)
