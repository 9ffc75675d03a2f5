"""The offset arithmetic on hand-made cases."""

from __future__ import annotations

import numpy as np

from jaxdistill.tokenizers.offsets import character_starts, exact_offsets, matched_offsets, refined_offsets
from jaxdistill.tokenizers.vocabulary import byte_alphabet, byte_fallback, byte_level_bytes, token_decoder


def exact(text: bytes, pieces: list[bytes]):
    return exact_offsets(text, pieces, np.array([len(piece) for piece in pieces], np.int64))


def refined(starts, ends, lengths, size):
    return refined_offsets(np.array(starts), np.array(ends), np.array(lengths), size).tolist()


def test_exact_offsets_follow_the_pieces():
    assert exact(b"ab\xf0\x9f\x98\x80", [b"a", b"b\xf0\x9f", b"\x98\x80"]).tolist() == [[0, 1], [1, 4], [4, 6]]
    assert exact(b"", []).tolist() == []


def test_dummy_prefix_is_one_space_too_many():
    assert exact(b"ab", [b" a", b"b"]).tolist() == [[0, 1], [1, 2]]
    assert exact(b" ab", [b" ", b" a", b"b"]).tolist() == [[0, 0], [0, 2], [2, 3]]


def test_other_texts_are_not_exact():
    assert exact(b"ab", [b"a", b"c"]) is None
    assert exact(b"ab", [b"a"]) is None
    assert exact(b"ab", [b"xa", b"b"]) is None


def test_matched_offsets_allow_prefixes_after_special_tokens():
    assert matched_offsets(b"<s>a", [b"<s>", b" a"]).tolist() == [[0, 3], [3, 4]]
    assert matched_offsets(b"<s>a", [b"<s>", b" b"]) is None
    assert matched_offsets(b"<s>ab", [b"<s>", b" a"]) is None


def test_tokens_of_one_character_share_its_bytes():
    # One four-byte character in three tokens of 1, 2 and 1 bytes, between two letters.
    assert refined([0, 1, 1, 1, 5], [1, 5, 5, 5, 6], [1, 1, 2, 1, 1], 6) == [[0, 1], [1, 2], [2, 4], [4, 5], [5, 6]]


def test_changed_characters_are_shared_in_proportion():
    # e + U+0301 (3 bytes) was composed to é (2 bytes) and split in two tokens.
    assert refined([0, 0], [3, 3], [1, 1], 3) == [[0, 1], [1, 3]]


def test_gaps_belong_to_the_following_token_and_the_end_to_the_last():
    assert refined([2, 6], [4, 8], [2, 2], 10) == [[0, 4], [4, 10]]
    assert refined([], [], [], 4) == []


def test_overlapping_chain():
    # "x" + the first byte of é | its second byte + "y": the library gives both tokens the whole character.
    assert refined([0, 1], [3, 4], [2, 2], 4) == [[0, 2], [2, 4]]


def test_character_starts_are_utf8_positions():
    text = "aé한😀"
    assert character_starts(text).tolist() == [0, 1, 3, 6, 10]
    assert character_starts("").tolist() == [0]


def test_byte_alphabet_is_a_bijection():
    alphabet = byte_alphabet()
    assert len(set(alphabet)) == 256
    assert alphabet[ord("A")] == "A"
    assert (alphabet[ord(" ")], alphabet[ord("\n")]) == ("Ġ", "Ċ")
    assert byte_level_bytes("Ġtheâ") == b" the\xe2"
    assert byte_level_bytes("<|東|>") == "<|東|>".encode()


def test_byte_fallback_tokens():
    assert byte_fallback("<0xE2>") == 0xE2
    assert byte_fallback("<0xZZ>") is None
    assert byte_fallback("<unk>") is None


def test_decoder_steps_give_bytes():
    llama = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    decode = token_decoder({"type": "Sequence", "decoders": llama})
    assert [decode(token) for token in ("▁the", "<0xE2>", "ing")] == [b" the", b"\xe2", b"ing"]
    pieces = token_decoder({"type": "WordPiece", "prefix": "##", "cleanup": True})
    assert [pieces(token) for token in ("the", "##ing")] == [b" the", b"ing"]
    suffixed = token_decoder({"type": "BPEDecoder", "suffix": "</w>"})
    assert suffixed("the</w>") == b"the "
