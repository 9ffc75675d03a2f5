"""Two tokenizers whose every token is written here, so that what they do to a text can be read and stays as it is."""

from __future__ import annotations

import json

_PLAIN_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def _added(names) -> list[dict]:
    return [{"id": index, "content": name} | _PLAIN_FLAGS for index, name in names]


def _alphabet() -> list[str]:
    """GPT-2's letters for the 256 bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, spare = [], 256
    for byte in range(256):
        letters.append(chr(byte if byte in kept else spare))
        spare += byte not in kept
    return letters


def prefix_space_json() -> str:
    """Like SentencePiece's: a space before the text, runs of spaces as one, bytes where there is no piece."""
    pieces = ["▁", "▁the", "▁fox", "▁is", "▁na", "▁it", "s", ".", "▁jump", "ing", "ve", "\n", "qu", "ick"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    spaces = [
        {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "},
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": _added([(0, "<unk>"), (1, "<s>"), (2, "</s>")]),
            "normalizer": {"type": "Sequence", "normalizers": spaces},
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
            "model": {
                "type": "Unigram",
                "unk_id": 0,
                "byte_fallback": True,
                "vocab": [[name, -1.0 if name in pieces else -10.0] for name in names],
            },
        }
    )


def byte_level_json() -> str:
    """GPT-2's kind: bytes, joined by the merges written here; no token at the beginning of a text."""
    merges = [("t", "h"), ("th", "e"), ("Ġ", "f"), ("Ġf", "o"), ("Ġfo", "x"), ("Ġ", "i"), ("Ġi", "s"), ("u", "m")]
    merges += [("i", "n"), ("in", "g"), ("ð", "Ł"), ("ðŁ", "ĺ"), ("Ġ", "n"), ("Ġn", "a")]
    spaces = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    names = [*_alphabet(), *("".join(pair) for pair in merges), "<|endoftext|>"]
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": _added([(len(names) - 1, "<|endoftext|>")]),
            "pre_tokenizer": spaces,
            "decoder": spaces,
            "model": {
                "type": "BPE",
                "vocab": {name: index for index, name in enumerate(names)},
                "merges": [" ".join(pair) for pair in merges],
            },
        }
    )


def written(root) -> dict[str, str]:
    """Kind → a path for `load_tokenizer`. Directories are made below `root`; their chat templates differ."""
    turn = "{% for m in messages %}[[ m.role ]]: [[ m.content ]]END{% endfor %}"
    turn = turn.replace("[[", "{{").replace("]]", "}}") + "{% if add_generation_prompt %}assistant: {% endif %}"
    headed = turn.replace("{% for", "<s>{% for", 1).replace("END", "</s>")
    roles = {
        "prefix_space": (prefix_space_json(), {"bos_token": "<s>", "eos_token": "</s>", "chat_template": headed}),
        "byte_level": (
            byte_level_json(),
            {"eos_token": "<|endoftext|>", "chat_template": turn.replace("END", "<|endoftext|>\n")},
        ),
    }
    for name, (definition, config) in roles.items():
        (root / name).mkdir()
        (root / name / "tokenizer.json").write_text(definition)
        (root / name / "tokenizer_config.json").write_text(json.dumps(config))
    return {name: str(root / name) for name in roles} | {"bytes": "bytes"}
