"""What every tokenizer offers: ids with byte offsets into the original text, special tokens by role, a vocabulary."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxdistill.formats.paths import AnyPath, any_path, atomic_file

TURN_ENDS = frozenset({"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|eot|>", "<end_of_turn>", "<turn|>"})
"""Spellings of special tokens that end a turn, over the published families."""

TURN_OR_TEXT_ENDS = TURN_ENDS | {"<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "[EOS]"}
"""The same with those that end a text; they become `stop`."""


class TokenizerError(ValueError):
    """A tokenizer that cannot be loaded, or a text that cannot be encoded; says what was given and what to do."""


class Encoding(NamedTuple):
    """A tokenized text.

    ids: int32 [tokens]. offsets: int64 [tokens, 2], start and end of each token in bytes of `text.encode("utf-8")`.
    Offsets are contiguous: the first start is 0, each end is the next start, the last end is the byte length, so every
    byte of the text is accounted for exactly once. A token may have width zero (a dummy prefix). Bytes that a lossy
    tokenizer drops belong to the following token, or to the last one at the end of the text. A text of which nothing
    is left (only spaces, for some) has no tokens and no offsets.
    """

    ids: np.ndarray
    offsets: np.ndarray


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """The ids with a role, and every special token by its string.

    stop: ids that end a turn or a text, the end-of-sequence token among them. A role that the file does not name is
    None: nothing is guessed.
    """

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    unk: int | None = None
    stop: frozenset[int] = frozenset()
    all: Mapping[str, int] = dataclasses.field(default_factory=dict)


class Tokenizer(Protocol):
    """Text to ids and back; see `load_tokenizer` for the kinds.

    vocab_size: number of ids, added tokens included. chat_template: Jinja source, if the file or directory has one.
    fingerprint: sha256 of what defines the ids and the roles (not of the chat template), equal across processes.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def special(self) -> SpecialTokens: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str, *, parse_special: bool = False) -> Encoding:
        """Ids and byte offsets of a text. Special tokens are never added.

        parse_special: True turns the strings of special tokens into their ids (text from a chat template); False
        reads them as ordinary text (text from people).
        """
        ...

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = False) -> list[Encoding]:
        """`encode` of each text, on all cores where the library can."""
        ...

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ids, as the tokenizer's own library gives it (invalid UTF-8 becomes U+FFFD)."""
        ...

    def token_bytes(self) -> list[bytes]:
        """What each id contributes to decoded text, as bytes; special tokens contribute their string.

        A dummy prefix or WordPiece's joining space is part of the token (b" the"), continuations have none (b"ing").
        """
        ...

    def save(self, directory: AnyPath) -> None:
        """Writes tokenizer.json and its companions so that transformers' AutoTokenizer gives equal ids."""
        ...


def special_tokens(
    all_special: Mapping[str, int],
    *,
    bos: int | None = None,
    eos: int | None = None,
    pad: int | None = None,
    unk: int | None = None,
    extra_stops: Iterable[int] = (),
) -> SpecialTokens:
    """Roles plus the stop set: eos, what the file names, and the special tokens known to end a turn or a text."""
    stop = {token for text, token in all_special.items() if text in TURN_OR_TEXT_ENDS} | set(extra_stops)
    stop |= set() if eos is None else {eos}
    return SpecialTokens(bos=bos, eos=eos, pad=pad, unk=unk, stop=frozenset(stop), all=dict(all_special))


def utf8(text: str) -> bytes:
    """The bytes that offsets count; lone surrogates have none and are refused."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text has a lone surrogate (U+{ord(text[error.start]):04X} at character {error.start}), which has no "
            "UTF-8 bytes; decode the source with errors='replace' before tokenizing"
        ) from error


def roles_fingerprint(special: SpecialTokens) -> str:
    """The roles as canonical text, for fingerprints."""
    roles = dataclasses.asdict(special) | {"stop": sorted(special.stop), "all": sorted(special.all.items())}
    return json.dumps(roles, sort_keys=True)


def save_files(directory: AnyPath, files: Mapping[str, str | bytes]) -> None:
    """Writes each file under a temporary name first, so that a failing write keeps what was there."""
    for name, content in files.items():
        with atomic_file(any_path(directory) / name) as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)


def bos_post_processor(special: SpecialTokens) -> dict[str, Any] | None:
    """The part of a tokenizer.json that puts the beginning-of-sequence token before a text, for other programs."""
    name = next((text for text, token in special.all.items() if token == special.bos), None)
    if name is None:
        return None
    begin, first = {"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = [{"SpecialToken": {"id": name, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, *second],
        "special_tokens": {name: {"id": name, "ids": [special.bos], "tokens": [name]}},
    }


def companion_files(special: SpecialTokens, chat_template: str | None) -> dict[str, str | bytes]:
    """tokenizer_config.json, special_tokens_map.json and the chat template, as transformers reads them."""
    by_id = {token: text for text, token in special.all.items()}
    roles = {"bos_token": special.bos, "eos_token": special.eos, "pad_token": special.pad, "unk_token": special.unk}
    names = {role: by_id[token] for role, token in roles.items() if token is not None and token in by_id}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= names
    if chat_template is not None:
        config["chat_template"] = chat_template
    files: dict[str, str | bytes] = {
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False),
        "special_tokens_map.json": json.dumps(names, indent=2, ensure_ascii=False),
    }
    if chat_template is not None:
        files["chat_template.jinja"] = chat_template
    return files
