"""Vocabularies as bytes: what each token of a tokenizer.json contributes to decoded text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from jaxdistill.tokenizers.base import Tokenizer, TokenizerError

SUPPORTED_DECODERS = (
    "BPEDecoder, ByteFallback, ByteLevel, Fuse, Metaspace, Replace (of a string), Sequence, Strip, WordPiece"
)


@cache
def byte_alphabet() -> tuple[str, ...]:
    """The character that stands for each of the 256 bytes in byte-level BPE (GPT-2's printable alphabet)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    stand_ins = iter(range(256, 512))
    return tuple(chr(byte if byte in printable else next(stand_ins)) for byte in range(256))


@cache
def _alphabet_bytes() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(byte_alphabet())}


def byte_level_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; a token outside the alphabet (an added one) is its own UTF-8."""
    table = _alphabet_bytes()
    try:
        return bytes([table[character] for character in token])
    except KeyError:
        return token.encode("utf-8")


def byte_fallback(token: str) -> int | None:
    """The byte of a token spelled `<0xNN>`, None for any other token."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None


def token_decoder(decoder: Mapping[str, Any] | None) -> Callable[[str], bytes]:
    """Token string → the bytes that it contributes inside a text, from the `decoder` of a tokenizer.json.

    Steps that look at the whole text (Fuse; Strip, which removes the dummy prefix at the start) do not change what a
    token inside it contributes. Raises TokenizerError for a decoder whose tokens have no bytes of their own.
    """
    if decoder is None:
        return lambda token: token.encode("utf-8")
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return byte_level_bytes
    replacements = [replacement for step in steps for replacement in _replacements(step)]
    falls_back = "ByteFallback" in kinds
    word_pieces = [step["prefix"] for step in steps if step["type"] == "WordPiece"]

    def contributed(token: str) -> bytes:
        if falls_back and (byte := byte_fallback(token)) is not None:
            return bytes([byte])
        for old, new in replacements:
            token = token.replace(old, new)
        for prefix in word_pieces:
            token = token.removeprefix(prefix) if token.startswith(prefix) else " " + token
        return token.encode("utf-8")

    return contributed


def _replacements(step: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The string replacements that one decoder step makes in a token."""
    kind = step["type"]
    if kind in ("ByteFallback", "Fuse", "Strip", "WordPiece"):
        return []
    if kind == "Metaspace":
        return [(step["replacement"], " ")]
    if kind == "BPEDecoder":
        return [(step["suffix"], " ")]
    if kind == "Replace" and "String" in step["pattern"]:
        return [(step["pattern"]["String"], step["content"])]
    raise TokenizerError(
        f"tokenizer.json has the decoder step {kind!r}, whose tokens have no bytes of their own; supported: "
        f"{SUPPORTED_DECODERS}. Convert the tokenizer to one of these"
    )


def ordinary_ids(tokenizer: Tokenizer) -> dict[bytes, int]:
    """The id of each token that is not special, by its bytes. Of tokens with the same bytes it is the first that is no
    byte fallback: text is encoded with that one."""
    vocabulary, special = tokenizer.token_bytes(), set(tokenizer.special.all.values())
    single = [bytes([byte]) for byte in range(256)]
    # Vocabularies that fall back to bytes hold all of them in a row.
    starts = (start for start, token in enumerate(vocabulary) if token == b"\0")
    first = next((start for start in starts if vocabulary[start : start + 256] == single), len(vocabulary))
    fallbacks = range(first, first + 256)
    found: dict[bytes, int] = {}
    for token in sorted(range(len(vocabulary)), key=fallbacks.__contains__):
        if vocabulary[token] and token not in special:
            found.setdefault(vocabulary[token], token)
    return found
