"""The raw-byte tokenizer: one token per UTF-8 byte, and a few special tokens after them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np

from jaxdistill.formats.paths import AnyPath
from jaxdistill.tokenizers.base import (
    Encoding,
    SpecialTokens,
    companion_files,
    save_files,
    special_tokens,
    utf8,
)
from jaxdistill.tokenizers.huggingface import HuggingFaceTokenizer
from jaxdistill.tokenizers.vocabulary import byte_alphabet

DEFAULT_SPECIAL = ("<bos>", "<eos>", "<pad>", "<|im_start|>", "<|im_end|>")


class ByteTokenizer:
    """Ids 0 to 255 are the bytes; special tokens follow, by default bos, eos, pad and the turn marks of ChatML.

    Lossless for every text, no prefix space, nothing unknown.
    """

    def __init__(self, special_strings: Sequence[str] = DEFAULT_SPECIAL, *, chat_template: str | None = None):
        self._strings = tuple(special_strings)
        self.chat_template = chat_template
        named = {text: 256 + index for index, text in enumerate(self._strings)}
        self.special: SpecialTokens = special_tokens(
            named, bos=named.get("<bos>"), eos=named.get("<eos>"), pad=named.get("<pad>")
        )

    @property
    def vocab_size(self) -> int:
        return 256 + len(self._strings)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        # Through the exported form, so that what `save` wrote and `load_tokenizer` reads has the same fingerprint.
        return HuggingFaceTokenizer(self._definition(), self.special).fingerprint

    @cached_property
    def _special_pattern(self) -> re.Pattern[bytes] | None:
        longest_first = sorted((text.encode("utf-8") for text in self._strings), key=len, reverse=True)
        return re.compile(b"(" + b"|".join(map(re.escape, longest_first)) + b")") if longest_first else None

    def encode(self, text: str, *, parse_special: bool = False) -> Encoding:
        data = utf8(text)
        parts = self._special_pattern.split(data) if parse_special and self._special_pattern else [data]
        # A capturing split alternates ordinary text and special tokens, starting with text.
        ids = [
            np.array([self.special.all[part.decode("utf-8")]], np.int32)
            if index % 2
            else np.frombuffer(part, np.uint8).astype(np.int32)
            for index, part in enumerate(parts)
        ]
        widths = [np.array([len(part)]) if index % 2 else np.ones(len(part)) for index, part in enumerate(parts)]
        ends = np.cumsum(np.concatenate(widths)).astype(np.int64)
        return Encoding(np.concatenate(ids), np.stack([np.append(0, ends)[:-1], ends], axis=1))

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = False) -> list[Encoding]:
        return [self.encode(text, parse_special=parse_special) for text in texts]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        vocabulary = self.token_bytes()
        kept = (int(token) for token in ids)
        data = b"".join(vocabulary[token] for token in kept if token < 256 or not skip_special)
        return data.decode("utf-8", errors="replace")

    def token_bytes(self) -> list[bytes]:
        return self._vocabulary

    @cached_property
    def _vocabulary(self) -> list[bytes]:
        return [bytes([byte]) for byte in range(256)] + [text.encode("utf-8") for text in self._strings]

    def _definition(self) -> str:
        """The same tokenizer as a tokenizer.json: byte-level BPE without merges."""
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        definition = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": index, "content": text} | flags for text, index in self.special.all.items()],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "vocab": {text: byte for byte, text in enumerate(byte_alphabet())} | dict(self.special.all),
                "merges": [],
            },
        }
        return json.dumps(definition, ensure_ascii=False)

    def save(self, directory: AnyPath) -> None:
        files = companion_files(self.special, self.chat_template)
        save_files(directory, {"tokenizer.json": self._definition()} | files)
