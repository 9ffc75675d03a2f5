"""Writes tokenizers.json: ids of awkward texts by references that are not our code.

SmolLM2: byte-level BPE written out from its definition (the pre-tokenizer of llama.cpp's "smollm", merges in order) on
the vocabulary of the GGUF file, read by the `gguf` library. SentencePiece models: the sentencepiece library. Qwen 3:
transformers. Run with the extra `[parity]`: `python tests/golden/make_tokenizers.py`.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import regex
import sentencepiece
from gguf import GGUFReader
from transformers import AutoTokenizer

from jaxdistill.assets import asset

TEXTS = [
    "The capital of France is",
    "Hello world! 123",
    "  multiple   spaces 1  22\n\n\n   333",
    "def f(x):\n    return x**2  # naïve Café déjà vu\n\tpass\r\n",
    "It's we'll I'VE 'tis don't",
    "e\u0301 ﬁ ①②③ ½ ١٢٣ Ⅷ",
    "東京は日本の首都です。한국어 中文1字2",
    "😀👩\u200d👩\u200d👧🇫🇷 \U00013000",
    "a\u00a0b\u3000c\u200bd\u2028e\x85f\x0bg",
    " lead and trail \t ",
    "<not a|token> <s>x</s>",
]
CHATS = [
    "<|im_start|>system\nYou are 1 helper<|im_end|>\n<|im_start|>user\nHi  2<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>x<|im_end|><|im_end|> y",
]
SENTENCEPIECE = ("tokenizer.llama2", "tokenizer.mistral-v3", "tokenizer.gemma3", "tokenizer.default")
SMOLLM = [
    regex.compile(r"\p{N}"),
    regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
]


def pieces(text: str) -> list[str]:
    """Each expression in turn cuts every piece into its matches and what lies between them."""
    parts = [text]
    for expression in SMOLLM:
        cut: list[str] = []
        for part in parts:
            position = 0
            for match in expression.finditer(part):
                cut += [part[position : match.start()], match.group()]
                position = match.end()
            cut.append(part[position:])
        parts = [part for part in cut if part]
    return parts


def byte_alphabet() -> dict[int, str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


class Reference:
    """SmolLM2's tokenizer from the definition of byte-level BPE."""

    def __init__(self, file: Path):
        fields = GGUFReader(file).fields
        tokens = fields["tokenizer.ggml.tokens"].contents()
        types = fields["tokenizer.ggml.token_type"].contents()
        merges = fields["tokenizer.ggml.merges"].contents()
        self.ids = {token: index for index, token in enumerate(tokens)}
        self.rank = {tuple(merge.split(" ")): index for index, merge in enumerate(merges)}
        self.special = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]
        self.alphabet = byte_alphabet()

    def piece(self, piece: str) -> list[int]:
        symbols = [self.alphabet[byte] for byte in piece.encode()]
        while True:
            pairs = [(self.rank.get(pair, len(self.rank)), at) for at, pair in enumerate(pairwise(symbols))]
            rank, at = min(pairs, default=(len(self.rank), 0))
            if rank == len(self.rank):
                # A byte that the vocabulary lacks has no token.
                return [self.ids[symbol] for symbol in symbols if symbol in self.ids]
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]

    def encode(self, text: str) -> list[int]:
        return [token for piece in pieces(text) for token in self.piece(piece)]

    def encode_chat(self, text: str) -> list[int]:
        parts = regex.split("(" + "|".join(regex.escape(token) for token in self.special) + ")", text)
        return [
            token
            for index, part in enumerate(parts)
            for token in ([self.ids[part]] if index % 2 else self.encode(part))
        ]


def golden() -> dict:
    smollm2, others = Reference(asset("smollm2")), asset("tokenizers")
    qwen = AutoTokenizer.from_pretrained(others / "qwen3-tokenizer")
    ids = {
        "smollm2": [smollm2.encode(text) for text in TEXTS],
        "qwen3-tokenizer": [
            qwen(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in TEXTS
        ],
    }
    for name in SENTENCEPIECE:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(others / name))
        ids[name] = [processor.encode(text) for text in TEXTS]
    chats = {
        "smollm2": [smollm2.encode_chat(text) for text in CHATS],
        "qwen3-tokenizer": [qwen(text, add_special_tokens=False)["input_ids"] for text in CHATS],
    }
    return {"texts": TEXTS, "ids": ids, "chats": CHATS, "chat_ids": chats}


if __name__ == "__main__":
    target = Path(__file__).with_name("tokenizers.json")
    target.write_text(json.dumps(golden(), ensure_ascii=True) + "\n")
