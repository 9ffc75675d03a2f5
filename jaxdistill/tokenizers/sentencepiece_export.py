"""SentencePiece models as tokenizer.json, with equal ids."""

from __future__ import annotations

import base64
import json
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from jaxdistill.tokenizers.base import TokenizerError

# Generated at import by protobuf, so without static types.
_messages: Any = sentencepiece_model_pb2
ModelProto = _messages.ModelProto
Piece = ModelProto.SentencePiece
Trainer = _messages.TrainerSpec
SPACE = "▁"

UNREACHABLE = -1e6
"""Unigram score of pieces that a text never contains (`<s>`, `<0x41>`): tokenizer.json has no piece types.

It keeps them out as long as the vocabulary has their characters, which it lacks only if it was trained on no "<".
"""


def tokenizer_json(proto: Any, post_processor: dict[str, Any] | None = None) -> str:
    """The text of a tokenizer.json that gives the ids of a SentencePiece model (`ModelProto`)."""
    kind, settings = proto.trainer_spec.model_type, proto.normalizer_spec
    models = {Trainer.BPE: _bpe, Trainer.UNIGRAM: _unigram}
    if kind not in models:
        raise TokenizerError(
            f"a SentencePiece model of type {Trainer.ModelType.Name(kind)} has no tokenizer.json form; supported: "
            "BPE, UNIGRAM"
        )
    if proto.trainer_spec.treat_whitespace_as_suffix or any(piece.type == Piece.UNUSED for piece in proto.pieces):
        raise TokenizerError(
            "a SentencePiece model with unused pieces or with whitespace as a suffix has no tokenizer.json form; "
            "keep its tokenizer.model"
        )
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(proto),
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(settings)},
        "pre_tokenizer": None,
        "post_processor": post_processor,
        "decoder": {"type": "Sequence", "decoders": _decoders(settings)},
        "model": models[kind](proto),
    }
    return json.dumps(definition, ensure_ascii=False)


def _added_tokens(proto: Any) -> list[dict[str, Any]]:
    """Control and unknown pieces as special tokens; user-defined symbols as tokens found in the normalised text."""
    added = []
    for index, piece in enumerate(proto.pieces):
        if piece.type in (Piece.CONTROL, Piece.UNKNOWN, Piece.USER_DEFINED):
            special = piece.type != Piece.USER_DEFINED
            flags = {"single_word": False, "lstrip": False, "rstrip": False}
            added.append({"id": index, "content": piece.piece, "special": special, "normalized": not special} | flags)
    return added


def _normalizers(settings: Any) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if settings.precompiled_charsmap:
        charsmap = base64.b64encode(settings.precompiled_charsmap).decode("ascii")
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if settings.remove_extra_whitespaces:
        # Only the space character: the character map has turned other whitespace into it, or kept it on purpose.
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if settings.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return steps


def _decoders(settings: Any) -> list[dict[str, Any]]:
    steps = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    return steps + ([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if settings.add_dummy_prefix else [])


def _bpe(proto: Any) -> dict[str, Any]:
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == Piece.NORMAL}
    merges = [
        (-score, -len(left), left, token[len(left) :])
        for token, score in scores.items()
        for left in (token[:cut] for cut in range(1, len(token)))
        if left in scores and token[len(left) :] in scores
    ]
    # Among equal scores (Llama's runs of spaces) the library merges leftmost first: it grows one run to its full length
    # before the next. Ranks express this by putting the longest left part first.
    merges.sort(key=lambda merge: merge[:2])
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": proto.pieces[proto.trainer_spec.unk_id].piece,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": proto.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": {piece.piece: index for index, piece in enumerate(proto.pieces)},
        "merges": [[left, right] for _, _, left, right in merges],
    }


def _unigram(proto: Any) -> dict[str, Any]:
    found = (Piece.NORMAL, Piece.USER_DEFINED)
    return {
        "type": "Unigram",
        "unk_id": proto.trainer_spec.unk_id,
        "vocab": [[piece.piece, piece.score if piece.type in found else UNREACHABLE] for piece in proto.pieces],
        "byte_fallback": proto.trainer_spec.byte_fallback,
    }
