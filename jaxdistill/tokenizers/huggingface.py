"""Tokenizers of the `tokenizers` library: a tokenizer.json, with the roles and template of the files beside it."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers

from jaxdistill.formats.paths import AnyPath
from jaxdistill.tokenizers.base import (
    Encoding,
    SpecialTokens,
    TokenizerError,
    companion_files,
    roles_fingerprint,
    save_files,
    special_tokens,
    utf8,
)
from jaxdistill.tokenizers.offsets import character_starts, exact_offsets, matched_offsets, refined_offsets
from jaxdistill.tokenizers.vocabulary import token_decoder


class HuggingFaceTokenizer:
    """A tokenizer.json (byte-level BPE, BPE with byte fallback, Unigram, WordPiece) behind our interface.

    Special tokens are the added tokens that the file marks as special. Other added tokens (`<think>`) are found in any
    text, as the library does. Truncation and padding of the file are ignored, and its post-processor (which adds
    special tokens) is used only by those who load what `save` writes. A prefix space is added where the file says so
    (normalizer Prepend, Metaspace, ByteLevel's add_prefix_space): the first token then carries a space that has no
    byte in the text.

    Where a normalizer changed the text (NFC, lower-casing), offsets come from the library's character spans: dropped
    combining marks belong to the token before, anything else that was dropped to the token after.
    """

    def __init__(self, definition: str, special: SpecialTokens, chat_template: str | None = None):
        self.definition = definition
        self.special = special
        self.chat_template = chat_template
        self._plain = _encoder(definition)
        # Two encoders, because the library keeps this choice as a flag of the object, not of the call.
        self._plain.encode_special_tokens = True

    def __reduce__(self):
        return HuggingFaceTokenizer, (self.definition, self.special, self.chat_template)

    @cached_property
    def _parsing(self) -> tokenizers.Tokenizer:
        return _encoder(self.definition)

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes())

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        parts = json.loads(self._plain.to_str())
        for unused in ("version", "truncation", "padding", "post_processor"):
            parts.pop(unused, None)
        canonical = json.dumps(parts, sort_keys=True) + roles_fingerprint(self.special)
        return hashlib.sha256(canonical.encode("utf-8")).hexdigest()

    def encode(self, text: str, *, parse_special: bool = False) -> Encoding:
        return self.encode_batch([text], parse_special=parse_special)[0]

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = False) -> list[Encoding]:
        encoder = self._parsing if parse_special else self._plain
        raw = [utf8(text) for text in texts]
        # The fast call leaves out the library's own offsets: they are needed only for texts that it changed.
        found = encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._placed(encoder, text, data, each.ids) for text, data, each in zip(texts, raw, found, strict=True)]

    def _placed(self, encoder: tokenizers.Tokenizer, text: str, data: bytes, ids: list[int]) -> Encoding:
        tokens = np.asarray(ids, np.int32)
        vocabulary = self.token_bytes()
        pieces = [vocabulary[token] for token in ids]
        lengths = self._lengths[tokens]
        offsets = exact_offsets(data, pieces, lengths)
        if offsets is None:
            offsets = matched_offsets(data, pieces)
        if offsets is None:
            spans = np.asarray(encoder.encode(text, add_special_tokens=False).offsets, np.int64).reshape(-1, 2)
            spans[:, 1] = _with_marks(text, spans)
            spans = character_starts(text)[spans]
            offsets = refined_offsets(spans[:, 0], spans[:, 1], lengths, len(data))
        return Encoding(tokens, offsets)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        return self._plain.decode([int(token) for token in ids], skip_special_tokens=skip_special)

    def token_bytes(self) -> list[bytes]:
        return self._vocabulary

    @cached_property
    def _vocabulary(self) -> list[bytes]:
        contributed = token_decoder(json.loads(self.definition).get("decoder"))
        by_token = self._plain.get_vocab(with_added_tokens=True)
        added = self._plain.get_added_tokens_decoder()
        vocabulary = [b""] * (max(by_token.values(), default=-1) + 1)
        for token, index in by_token.items():
            vocabulary[index] = contributed(token)
        for index, token in added.items():
            # Found in the text before it is normalised: they are their own bytes whatever the decoder is.
            if token.special or not token.normalized:
                vocabulary[index] = token.content.encode("utf-8")
        return vocabulary

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.fromiter((len(piece) for piece in self._vocabulary), np.int64, len(self._vocabulary))

    def save(self, directory: AnyPath) -> None:
        definition = json.loads(self.definition)
        definition |= {"truncation": None, "padding": None}
        files = companion_files(self.special, self.chat_template)
        save_files(directory, {"tokenizer.json": json.dumps(definition, ensure_ascii=False)} | files)


def from_definition(
    definition: str, *, source: str, config: Mapping[str, Any] | None = None, chat_template: str | None = None
) -> HuggingFaceTokenizer:
    """A tokenizer from the text of a tokenizer.json and a parsed tokenizer_config.json (roles, later added tokens)."""
    config = config or {}
    parts, encoder = parse_definition(definition, source=source)
    if _added_later(encoder, config, source):
        definition = encoder.to_str()
    return HuggingFaceTokenizer(definition, _roles(encoder, parts, config), chat_template)


def parse_definition(definition: str, *, source: str) -> tuple[dict[str, Any], tokenizers.Tokenizer]:
    """The parsed JSON and the library's tokenizer; refuses what the library or our byte vocabulary cannot read."""
    try:
        parts = json.loads(definition)
        if not isinstance(parts, dict):
            raise ValueError("the top level is not an object")
        encoder = tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise TokenizerError(
            f"{source} is not a tokenizer.json that the `tokenizers` library reads ({error}); copy it again, or export "
            "it with `tokenizer.save_pretrained(...)`"
        ) from error
    token_decoder(parts.get("decoder"))
    return parts, encoder


def _encoder(definition: str) -> tokenizers.Tokenizer:
    encoder = tokenizers.Tokenizer.from_str(definition)
    encoder.no_truncation()
    encoder.no_padding()
    # A post-processor may trim spaces off the offsets even where it adds no tokens.
    encoder.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    return encoder


def _added_later(encoder: tokenizers.Tokenizer, config: Mapping[str, Any], source: str) -> bool:
    """Adds the tokens that only tokenizer_config.json names (`added_tokens_decoder`), at the ids it gives."""
    named = {int(index): token for index, token in config.get("added_tokens_decoder", {}).items()}
    missing = {index: token for index, token in sorted(named.items()) if encoder.token_to_id(token["content"]) is None}
    for index, token in missing.items():
        flags = {name: token.get(name, False) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        added = tokenizers.AddedToken(token["content"], **flags)
        (encoder.add_special_tokens if flags["special"] else encoder.add_tokens)([added])
        if encoder.token_to_id(token["content"]) != index:
            raise TokenizerError(
                f"tokenizer_config.json beside {source} gives the added token {token['content']!r} the id {index}, but "
                f"the next free id is {encoder.token_to_id(token['content'])}; export both files together"
            )
    return bool(missing)


def _roles(encoder: tokenizers.Tokenizer, parts: Mapping[str, Any], config: Mapping[str, Any]) -> SpecialTokens:
    """Roles from tokenizer_config.json; pad and unk also from tokenizer.json itself."""

    def role(name: str, fallback: str | None = None) -> int | None:
        token = config.get(name)
        token = token["content"] if isinstance(token, dict) else token
        token = token or fallback
        return encoder.token_to_id(token) if token else None

    model, padding = parts["model"], parts.get("padding") or {}
    unk = role("unk_token", model.get("unk_token"))
    if unk is None and model.get("type") == "Unigram":
        unk = model.get("unk_id")
    named = {token.content: index for index, token in encoder.get_added_tokens_decoder().items() if token.special}
    return special_tokens(
        named,
        bos=role("bos_token"),
        eos=role("eos_token"),
        pad=role("pad_token", padding.get("pad_token")),
        unk=unk,
    )


def _with_marks(text: str, spans: np.ndarray) -> np.ndarray:
    """Ends of character spans, moved over the combining marks that a normalizer composed or dropped."""
    if len(spans) == 0:
        return spans[:, 1]
    marks = np.fromiter((unicodedata.category(character)[0] == "M" for character in text), bool, len(text))
    positions = np.arange(len(text) + 1)
    # The next position that is not a mark, seen from each position: a running minimum from the right.
    next_plain = np.minimum.accumulate(np.where(np.append(marks, False), len(text), positions)[::-1])[::-1]
    next_start = np.append(spans[1:, 0], len(text))
    moved = np.minimum(next_plain[spans[:, 1]], next_start)
    return np.where(spans[:, 1] > spans[:, 0], np.maximum(spans[:, 1], moved), spans[:, 1])
