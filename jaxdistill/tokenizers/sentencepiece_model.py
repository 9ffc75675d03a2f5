"""SentencePiece models (`tokenizer.model`): unigram or BPE, with or without byte fallback."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import sentencepiece

from jaxdistill.formats.paths import AnyPath
from jaxdistill.tokenizers.base import (
    Encoding,
    SpecialTokens,
    TokenizerError,
    bos_post_processor,
    companion_files,
    roles_fingerprint,
    save_files,
    special_tokens,
    utf8,
)
from jaxdistill.tokenizers.offsets import exact_offsets, refined_offsets
from jaxdistill.tokenizers.sentencepiece_export import ModelProto, Piece, tokenizer_json
from jaxdistill.tokenizers.vocabulary import byte_fallback


class SentencePieceTokenizer:
    """A SentencePiece model behind our interface.

    Special tokens are the model's control and unknown pieces. User-defined symbols are found in any text, as the
    library does. With `parse_special`, each stretch between special tokens is encoded as a text of its own, so it gets
    the model's dummy prefix (as the published Llama 2 and Mistral tokenizer.json files do). The dummy prefix "▁" has
    no byte in the text: alone it is a token of width zero, otherwise the first token carries one space too many.

    A "▁" in a text is a space to SentencePiece, so it does not come back from `decode`. Models that normalise (NFKC,
    collapsed spaces) are lossy: offsets then come from the library's own byte spans, and bytes that were dropped
    belong to the following token, at the end of the text to the last one.
    """

    def __init__(
        self, model: bytes, special: SpecialTokens, chat_template: str | None = None, *, add_bos: bool = False
    ):
        self._model = model
        # For the exported tokenizer.json alone: our `encode` never adds special tokens.
        self._add_bos = add_bos
        self.special = special
        self.chat_template = chat_template
        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(model)

    def __reduce__(self):
        rebuild = functools.partial(SentencePieceTokenizer, add_bos=self._add_bos)
        return rebuild, (self._model, self.special, self.chat_template)

    @functools.cached_property
    def _proto(self) -> Any:
        return ModelProto.FromString(self._model)

    @property
    def vocab_size(self) -> int:
        return self._processor.GetPieceSize()

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        return hashlib.sha256(self._model + roles_fingerprint(self.special).encode("utf-8")).hexdigest()

    def encode(self, text: str, *, parse_special: bool = False) -> Encoding:
        return self.encode_batch([text], parse_special=parse_special)[0]

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = False) -> list[Encoding]:
        for text in texts:
            utf8(text)
        if not parse_special or self._special_pattern is None:
            return self._encode_plain(list(texts))
        # A capturing split alternates ordinary text and special tokens, starting with text.
        parts = [self._special_pattern.split(text) for text in texts]
        plain = iter(self._encode_plain([part for each in parts for part in each[0::2]]))
        return [self._joined(each, plain) for each in parts]

    def _joined(self, parts: list[str], plain: Iterable[Encoding]) -> Encoding:
        """Puts the encodings of the stretches and the special tokens between them back together."""
        remaining, position, ids, offsets = iter(plain), 0, [], []
        for index, part in enumerate(parts):
            length = len(utf8(part))
            if index % 2:
                found = Encoding(np.array([self.special.all[part]], np.int32), np.array([[0, length]], np.int64))
            else:
                found = next(remaining)
            ids.append(found.ids)
            offsets.append(found.offsets + position)
            position += length
        return Encoding(np.concatenate(ids), _contiguous(np.concatenate(offsets), position))

    def _encode_plain(self, texts: list[str]) -> list[Encoding]:
        batch = self._processor.encode(texts, return_type="numpy") if texts else []
        return [self._placed(text, ids) for text, ids in zip(texts, batch, strict=True)]

    def _placed(self, text: str, ids: np.ndarray) -> Encoding:
        data, vocabulary = utf8(text), self.token_bytes()
        lengths = self._lengths[ids]
        offsets = exact_offsets(data, [vocabulary[token] for token in ids.tolist()], lengths)
        if offsets is None:
            offsets = self._library_offsets(text, lengths, len(data))
        return Encoding(ids, offsets)

    def _library_offsets(self, text: str, lengths: np.ndarray, text_bytes: int) -> np.ndarray:
        pieces = self._processor.encode(text, return_type="proto").pieces
        starts = np.fromiter((piece.begin for piece in pieces), np.int64, len(pieces))
        ends = np.fromiter((piece.end for piece in pieces), np.int64, len(pieces))
        # The library gives all bytes of a character that fell back to bytes to the last of its tokens.
        for index in range(len(pieces) - 2, -1, -1):
            if starts[index] == ends[index] and self._is_byte[pieces[index].id]:
                ends[index] = ends[index + 1]
        return refined_offsets(starts, ends, lengths, text_bytes)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        tokens = [int(token) for token in ids]
        if skip_special:
            return self._processor.decode(tokens)
        names = {index: text for text, index in self.special.all.items()}
        texts: list[str] = []
        run: list[int] = []
        for token in [*tokens, None]:
            if token is not None and token not in names:
                run.append(token)
                continue
            texts.append(self._processor.decode(run) if run else "")
            run = []
            texts.append("" if token is None else names[token])
        return "".join(texts)

    def token_bytes(self) -> list[bytes]:
        return self._vocabulary

    @functools.cached_property
    def _vocabulary(self) -> list[bytes]:
        space = " " if self._proto.normalizer_spec.escape_whitespaces else "▁"
        return [
            bytes([byte_fallback(piece.piece) or 0])
            if piece.type == Piece.BYTE
            else piece.piece.replace("▁", space).encode("utf-8")
            for piece in self._proto.pieces
        ]

    @functools.cached_property
    def _lengths(self) -> np.ndarray:
        return np.fromiter((len(piece) for piece in self._vocabulary), np.int64, len(self._vocabulary))

    @functools.cached_property
    def _is_byte(self) -> np.ndarray:
        return np.array([piece.type == Piece.BYTE for piece in self._proto.pieces])

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str] | None:
        longest_first = sorted(self.special.all, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None

    def save(self, directory: AnyPath) -> None:
        post_processor = bos_post_processor(self.special) if self._add_bos else None
        definition = tokenizer_json(self._proto, post_processor)
        files = companion_files(self.special, self.chat_template)
        save_files(directory, {"tokenizer.model": self._model, "tokenizer.json": definition} | files)


def from_model(
    model: bytes, *, source: str, config: Mapping[str, Any] | None = None, chat_template: str | None = None
) -> SentencePieceTokenizer:
    """A tokenizer from the bytes of a SentencePiece model and a parsed tokenizer_config.json (roles)."""
    try:
        proto = ModelProto.FromString(model)
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(model)
    except Exception as error:  # protobuf's DecodeError and the library's RuntimeError have no common base
        raise TokenizerError(
            f"{source} is not a SentencePiece model ({type(error).__name__}: {error}); copy the file again"
        ) from error
    config = config or {}
    _refuse_added_tokens(proto, config, source)
    pieces = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    control = {
        piece.piece: index for index, piece in enumerate(proto.pieces) if piece.type in (Piece.CONTROL, Piece.UNKNOWN)
    }

    def role(name: str, default: int) -> int | None:
        token = config.get(name)
        token = token["content"] if isinstance(token, dict) else token
        index = pieces.get(token, -1) if token else default
        return None if index < 0 else index

    symbols = {piece.piece: i for i, piece in enumerate(proto.pieces) if piece.type == Piece.USER_DEFINED}
    special = special_tokens(
        control,
        bos=role("bos_token", processor.bos_id()),
        eos=role("eos_token", processor.eos_id()),
        pad=role("pad_token", processor.pad_id()),
        unk=role("unk_token", processor.unk_id()),
        extra_stops=special_tokens(symbols).stop,
    )
    return SentencePieceTokenizer(model, special, chat_template, add_bos=config.get("add_bos_token", False))


def _refuse_added_tokens(proto: Any, config: Mapping[str, Any], source: str) -> None:
    beyond = {
        int(index): token["content"]
        for index, token in config.get("added_tokens_decoder", {}).items()
        if int(index) >= len(proto.pieces)
    }
    if beyond:
        raise TokenizerError(
            f"{source} has {len(proto.pieces)} pieces, but tokenizer_config.json beside it adds the tokens {beyond}; "
            "a SentencePiece model cannot hold them: save the tokenizer with transformers as tokenizer.json"
        )


def _contiguous(offsets: np.ndarray, text_bytes: int) -> np.ndarray:
    """Closes the gaps that stretches without tokens leave: their bytes belong to the following token."""
    if len(offsets):
        offsets[-1, 1] = text_bytes
        offsets[:, 0] = np.concatenate([[0], offsets[:-1, 1]])
    return offsets
