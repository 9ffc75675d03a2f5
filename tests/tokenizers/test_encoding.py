"""Offsets into the original bytes, on every kind of tokenizer and random Unicode."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import KINDS, TEXTS

from jaxdistill.tokenizers import TokenizerError

LOSSLESS = ("bytes", "byte_level", "sentencepiece_bpe")


def assert_contiguous(encoding, text: str) -> None:
    size, ids, offsets = len(text.encode()), encoding.ids, encoding.offsets
    assert ids.dtype == np.int32
    assert offsets.dtype == np.int64
    assert offsets.shape == (len(ids), 2)
    if len(ids):
        assert offsets[0, 0] == 0
        assert offsets[-1, 1] == size
        assert (offsets[1:, 0] == offsets[:-1, 1]).all()
        assert (offsets[:, 0] <= offsets[:, 1]).all()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, parse_special=st.booleans())
@example(text="", parse_special=False)
@example(text="e\u0301a", parse_special=False)
@example(text="  </s> <|im_end|>  ", parse_special=True)
def test_every_byte_is_accounted_for_exactly_once(loaded, kind, text, parse_special):
    encoding = loaded[kind].encode(text, parse_special=parse_special)
    assert_contiguous(encoding, text)
    assert len(encoding.ids) or kind in ("word_piece", "sentencepiece_unigram") or text == ""


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
@example(text=" leading")
@example(text="😀😃 👩‍👩‍👧")
def test_lossless_tokens_spell_their_bytes(loaded, kind, text):
    tokenizer = loaded[kind]
    if kind == "sentencepiece_bpe":
        text = text.replace("▁", "_")  # SentencePiece reads its own space symbol as a space
    vocabulary, data = tokenizer.token_bytes(), text.encode()
    encoding = tokenizer.encode(text)
    for index, (token, (start, end)) in enumerate(zip(encoding.ids, encoding.offsets, strict=True)):
        piece = vocabulary[token]
        prefix = b" " if kind == "sentencepiece_bpe" and index == 0 else b""
        assert prefix + data[start:end] == piece
    assert tokenizer.decode(encoding.ids, skip_special=False) == text


@pytest.mark.parametrize("kind", KINDS)
def test_batch_equals_single(loaded, kind):
    texts = ["", "the dog", "Café 😀\n", "  <|im_end|></s> e\u0301x"]
    for parse_special in (False, True):
        batch = loaded[kind].encode_batch(texts, parse_special=parse_special)
        for text, encoding in zip(texts, batch, strict=True):
            alone = loaded[kind].encode(text, parse_special=parse_special)
            np.testing.assert_array_equal(encoding.ids, alone.ids)
            np.testing.assert_array_equal(encoding.offsets, alone.offsets)
    assert loaded[kind].encode_batch([]) == []


@pytest.mark.parametrize("kind", ["bytes", "byte_level", "sentencepiece_bpe"])
def test_tokens_end_inside_characters(loaded, kind):
    """A character that the vocabulary lacks (four bytes) becomes tokens that end inside it."""
    encoding = loaded[kind].encode("a\U00013000b")
    ends = set(encoding.offsets[:, 1].tolist())
    assert {2, 3, 4, 5} <= ends


def test_composed_character_keeps_its_mark(loaded):
    """NFC turns e + U+0301 (3 bytes) into é (2 bytes): the mark stays with the e, not with what follows."""
    tokenizer = loaded["byte_level_nfc"]
    encoding = tokenizer.encode("xe\u0301z")
    start, end = encoding.offsets[-1]
    assert (start, end) == (4, 5)
    assert tokenizer.decode(encoding.ids) == "x\u00e9z"


def test_word_piece_spaces_belong_to_the_following_token(loaded):
    tokenizer = loaded["word_piece"]
    encoding = tokenizer.encode("The  dog \n")
    assert tokenizer.decode(encoding.ids) == "the dog"
    boundary = encoding.offsets[[tokenizer.token_bytes()[token][:2] == b" d" for token in encoding.ids]][0]
    assert boundary[0] == 3
    assert encoding.offsets[-1, 1] == 10
    assert len(tokenizer.encode(" \n").ids) == 0
    long = tokenizer.encode("dog " * 40)
    assert len(long.ids) >= 40, "the file's truncation to 8 tokens must not apply"


def test_unigram_normalises_and_points_into_the_original(loaded):
    tokenizer = loaded["sentencepiece_unigram"]
    text = "the   ﬁne  dog\n"
    encoding = tokenizer.encode(text)
    assert tokenizer.decode(encoding.ids) == "the fine dog"
    data = text.encode()
    spans = [data[start:end] for start, end in encoding.offsets]
    assert any("ﬁ".encode() in span for span in spans), "the ligature became two characters, but its bytes stay whole"
    assert spans[-1].endswith(b"\n"), "the newline that was dropped at the end belongs to the last token"
    assert_contiguous(encoding, text)


@pytest.mark.parametrize(
    ("kind", "mark", "name"),
    [("byte_level", "<|im_end|>", "<|im_end|>"), ("sentencepiece_bpe", "</s>", "</s>"), ("bytes", "<eos>", "<eos>")],
)
def test_special_tokens_only_when_asked(loaded, kind, mark, name):
    tokenizer = loaded[kind]
    special = tokenizer.special.all[name]
    text = f"the {mark}dog"
    assert special not in tokenizer.encode(text).ids
    parsed = tokenizer.encode(text, parse_special=True)
    found = parsed.offsets[parsed.ids == special]
    assert found.tolist() == [[4, 4 + len(mark)]]
    assert tokenizer.decode(tokenizer.encode(text).ids) == text, "as text, nothing is lost"
    assert mark not in tokenizer.decode(parsed.ids)
    assert mark in tokenizer.decode(parsed.ids, skip_special=False)


def test_dummy_prefix_has_no_bytes(loaded):
    """SentencePiece puts "▁" before a text; a space that is in the text keeps its byte."""
    tokenizer = loaded["sentencepiece_bpe"]
    encoding = tokenizer.encode("\tx")
    assert encoding.offsets[0].tolist() == [0, 0]
    assert tokenizer.token_bytes()[encoding.ids[0]] == b" "


@pytest.mark.parametrize("kind", KINDS)
def test_lone_surrogates_are_refused(loaded, kind):
    with pytest.raises(TokenizerError, match=r"lone surrogate \(U\+D800 at character 1\).*errors='replace'"):
        loaded[kind].encode("a\ud800")


@pytest.mark.parametrize("kind", KINDS)
def test_pickles(loaded, kind):
    """Data workers receive pickled tokenizers; special tokens stay ordinary text there."""
    again = pickle.loads(pickle.dumps(loaded[kind]))
    text = "dog <|im_end|></s><eos>"
    np.testing.assert_array_equal(again.encode(text).ids, loaded[kind].encode(text).ids)
    assert again.fingerprint == loaded[kind].fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_vocabulary_size_bounds_ids(loaded, kind):
    tokenizer = loaded[kind]
    assert len(tokenizer.token_bytes()) == tokenizer.vocab_size
    assert all(0 <= token < tokenizer.vocab_size for token in tokenizer.special.all.values())
