"""Finding the tokenizer that a path holds, by what the file contains rather than by what it is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxdistill.formats.gguf import open_gguf
from jaxdistill.formats.paths import AnyPath, any_path
from jaxdistill.tokenizers import gguf_vocabulary, huggingface, sentencepiece_model
from jaxdistill.tokenizers.base import Tokenizer, TokenizerError
from jaxdistill.tokenizers.byte_level import ByteTokenizer

ALLOWED = (
    "a directory with tokenizer.json or tokenizer.model, a tokenizer.json, a SentencePiece model, a GGUF file, or the "
    "word 'bytes'"
)


def load_tokenizer(path: AnyPath) -> Tokenizer:
    """The tokenizer of a path: a directory, a tokenizer.json, a SentencePiece model, a GGUF file, or "bytes".

    In a directory tokenizer.json is preferred to tokenizer.model. Roles and the chat template come from the
    tokenizer_config.json, special_tokens_map.json and chat_template.jinja of the same directory. A file is recognised
    by its content, so a SentencePiece model may have any name. Raises TokenizerError.
    """
    if str(path) == "bytes":
        return ByteTokenizer()
    place = any_path(path)
    if place.is_dir():
        found = next((place / name for name in ("tokenizer.json", "tokenizer.model") if (place / name).is_file()), None)
        if found is None:
            raise TokenizerError(f"the directory {place} has no tokenizer; allowed: {ALLOWED}")
        place = found
    if not place.is_file():
        raise TokenizerError(f"there is no file {place}; allowed: {ALLOWED}")
    return _load_file(place)


def _load_file(file: Path) -> Tokenizer:
    with file.open("rb") as stream:
        start = stream.read(64)
    if start.startswith(b"GGUF"):
        with open_gguf(file) as source:
            return gguf_vocabulary.from_metadata(source.metadata, source=str(file))
    config = _config(file.parent)
    template = _chat_template(file.parent, config)
    if start.lstrip().startswith(b"{") or file.suffix == ".json":
        definition = _text(file)
        return huggingface.from_definition(definition, source=str(file), config=config, chat_template=template)
    # A SentencePiece model is a protobuf message whose first field (number 1, a piece) has the tag byte 0x0a.
    if start.startswith(b"\n") or file.suffix == ".model":
        return sentencepiece_model.from_model(
            file.read_bytes(), source=str(file), config=config, chat_template=template
        )
    raise TokenizerError(
        f"{file} is a tokenizer of an unknown kind (it starts with {start[:12]!r}); allowed: {ALLOWED}"
    )


def _config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json: the roles of both, the former first."""
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        merged |= {key: value for key, value in _json(directory / name).items() if value is not None}
    return merged


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, chat_template.json or the config's; of several named templates the default one."""
    if (directory / "chat_template.jinja").is_file():
        return _text(directory / "chat_template.jinja")
    template = _json(directory / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):
        return next((each["template"] for each in template if each["name"] == "default"), None)
    return template


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        parsed = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise TokenizerError(f"{file} is not JSON ({error}); copy it again or remove it") from error
    if not isinstance(parsed, dict):
        raise TokenizerError(f"{file} holds {type(parsed).__name__}, not a JSON object; copy it again or remove it")
    return parsed


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{file} is not UTF-8 text ({error}); copy it again") from error
