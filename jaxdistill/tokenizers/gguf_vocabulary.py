"""Tokenizers inside GGUF files: byte-level BPE ("gpt2") and SentencePiece BPE ("llama"), from the metadata.

The pre-tokenizers reproduce what llama.cpp's `tokenizer.ggml.pre` names stand for, in the terms of tokenizer.json. A
name that is not in the table is refused: a nearly right pre-tokenizer gives ids that the model was not trained on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jaxdistill.tokenizers.base import SpecialTokens, Tokenizer, TokenizerError, bos_post_processor, special_tokens
from jaxdistill.tokenizers.huggingface import HuggingFaceTokenizer, parse_definition
from jaxdistill.tokenizers.sentencepiece_export import ModelProto, Trainer
from jaxdistill.tokenizers.sentencepiece_model import SentencePieceTokenizer, from_model

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
"""GGUF token types; their numbers are SentencePiece's."""

KINDS = ("gpt2", "llama")

_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
_BYTES_ONLY = _GPT2 | {"use_regex": False}
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS_AND_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _BYTES_ONLY]}


_SINGLE_DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _GPT2]}
_LLAMA3 = _split(_CONTRACTIONS_AND_WORDS + r"|\p{N}{1,3}" + _TAIL)
_QWEN2 = _split(_CONTRACTIONS_AND_WORDS + r"|\p{N}" + _TAIL)

PRE_TOKENIZERS: Mapping[str, Mapping[str, Any]] = {
    "gpt-2": {"pre_tokenizer": _GPT2},
    "smollm": {"pre_tokenizer": _SINGLE_DIGITS},
    "starcoder": {"pre_tokenizer": _SINGLE_DIGITS},
    "refact": {"pre_tokenizer": _SINGLE_DIGITS},
    "command-r": {"pre_tokenizer": _SINGLE_DIGITS},
    "llama3": {"pre_tokenizer": _LLAMA3, "ignore_merges": True},
    "llama-v3": {"pre_tokenizer": _LLAMA3, "ignore_merges": True},
    "llama-bpe": {"pre_tokenizer": _LLAMA3, "ignore_merges": True},
    "qwen2": {"pre_tokenizer": _QWEN2, "normalizer": {"type": "NFC"}},
}
"""`tokenizer.ggml.pre` → parts of tokenizer.json."""


def from_metadata(metadata: Mapping[str, Any], *, source: str) -> Tokenizer:
    """The tokenizer that the `tokenizer.*` keys of a GGUF file describe."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None or "tokenizer.ggml.tokens" not in metadata:
        raise TokenizerError(
            f"{source} has no tokenizer (`tokenizer.ggml.model` and `tokenizer.ggml.tokens` are missing); use a GGUF "
            "file of a whole language model, or give the tokenizer's own file"
        )
    if kind not in KINDS:
        raise TokenizerError(
            f"{source} has a tokenizer of kind tokenizer.ggml.model = {kind!r}; supported: {', '.join(KINDS)}. Use the "
            "tokenizer.json or tokenizer.model of the original checkpoint"
        )
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type")
    if types is None or len(types) != len(tokens):
        raise TokenizerError(
            f"{source} has {len(tokens)} tokens but {0 if types is None else len(types)} token types "
            "(`tokenizer.ggml.token_type`); copy or convert the file again"
        )
    if len(set(tokens)) != len(tokens):
        repeated = next(token for index, token in enumerate(tokens) if token in tokens[:index])
        raise TokenizerError(f"{source} lists the token {repeated!r} twice; convert the file again")
    build = _byte_level if kind == "gpt2" else _sentencepiece
    return build(metadata, tokens, types, source)


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int], source: str) -> HuggingFaceTokenizer:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre is None or pre not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"{source} names the pre-tokenizer tokenizer.ggml.pre = {pre!r}; supported: {', '.join(PRE_TOKENIZERS)}. "
            "Use the tokenizer.json of the original checkpoint, so that the ids are exact"
        )
    merges = [merge.split(" ") for merge in metadata.get("tokenizer.ggml.merges", [])]
    special = _roles(metadata, tokens, types)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    parts = PRE_TOKENIZERS[pre]
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": token, "special": kind != USER_DEFINED} | flags
            for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ],
        "normalizer": parts.get("normalizer"),
        "pre_tokenizer": parts["pre_tokenizer"],
        "post_processor": bos_post_processor(special) if metadata.get("tokenizer.ggml.add_bos_token") else None,
        "decoder": _BYTES_ONLY,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": parts.get("ignore_merges", False),
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    text = json.dumps(definition, ensure_ascii=False)
    parse_definition(text, source=f"the vocabulary of {source}")
    return HuggingFaceTokenizer(text, special, metadata.get("tokenizer.chat_template"))


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], source: str
) -> SentencePieceTokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise TokenizerError(
            f"{source} has {len(tokens)} tokens but {0 if scores is None else len(scores)} scores "
            "(`tokenizer.ggml.scores`), which a SentencePiece vocabulary needs; copy or convert the file again"
        )
    special = _roles(metadata, tokens, types)
    # The library needs the unknown piece to be where the trainer settings say; its type marks it.
    unknown = types.index(UNKNOWN) if UNKNOWN in types else None
    proto = ModelProto()
    for token, score, kind in zip(tokens, scores, types, strict=True):
        # Converters write user-defined runs of spaces as spaces; the model holds them escaped.
        proto.pieces.add(piece=token.replace(" ", "▁"), score=score, type=kind)
    proto.trainer_spec.model_type = Trainer.BPE
    proto.trainer_spec.byte_fallback = BYTE in types
    for role, index in (("bos", special.bos), ("eos", special.eos), ("pad", special.pad), ("unk", unknown)):
        setattr(proto.trainer_spec, f"{role}_id", -1 if index is None else index)
        if index is not None:
            setattr(proto.trainer_spec, f"{role}_piece", proto.pieces[index].piece)
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    proto.normalizer_spec.remove_extra_whitespaces = metadata.get("tokenizer.ggml.remove_extra_whitespaces", False)
    model = proto.SerializeToString(deterministic=True)
    from_model(model, source=f"the vocabulary of {source}")
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", True)
    return SentencePieceTokenizer(model, special, metadata.get("tokenizer.chat_template"), add_bos=add_bos)


def _roles(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> SpecialTokens:
    def role(name: str) -> int | None:
        return metadata.get(f"tokenizer.ggml.{name}_token_id")

    named = {token: index for index, token in enumerate(tokens) if types[index] in (UNKNOWN, CONTROL)}
    symbols = {token: index for index, token in enumerate(tokens) if types[index] == USER_DEFINED}
    ends = {index for name in ("eot", "eom") if (index := role(name)) is not None}
    return special_tokens(
        named,
        bos=role("bos"),
        eos=role("eos"),
        pad=role("padding"),
        unk=role("unknown"),
        extra_stops=ends | special_tokens(symbols).stop,
    )
