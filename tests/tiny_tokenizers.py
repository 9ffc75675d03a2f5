"""Tiny tokenizers of every kind, trained once per session on a few sentences, and texts to try them on."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from jaxdistill.tokenizers import load_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps.",
    "def encode(self, text):\n    return [self.table[byte] for byte in text.encode('utf-8')]\n",
    "Ein naïver Café-Besitzer über Flüsse; 1234 Wörter, 56 Sätze. ﬁne ①②③",
    "東京は日本の首都です。 中文字符 한국어 텍스트",
    "Emoji 😀😃 family 👩‍👩‍👧 flags 🇫🇷\ttabs  and   spaces\u00a0\u3000end",
    "if a < b and b > c: d = e / f",
] * 8

KINDS = ("bytes", "byte_level", "byte_level_nfc", "word_piece", "sentencepiece_bpe", "sentencepiece_unigram")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

AWKWARD = ["😀", "👩\u200d👩\u200d👧", "e\u0301", "\u0301", "ﬁ", "①", "東京", "한", " ", "  ", "\n", "\r\n", "\t"]
AWKWARD += ["\u00a0", "\u3000", "\u200b", "\x00", "\x85", "\ufeff", "the", "Café", "12", "İ", "\U0001f1eb\U0001f1f7"]
AWKWARD += ["▁", "<|im_end|>", "</s>", "<turn>"]
TEXTS = st.lists(st.one_of(st.sampled_from(AWKWARD), st.text(max_size=6)), max_size=12).map("".join)


def byte_level_json(*, normalizer=None) -> str:
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def word_piece_json() -> str:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[PAD]", "[UNK]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(pad_token="[PAD]", length=8)
    return tokenizer.to_str()


def sentencepiece_model(**settings) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, minloglevel=3, num_threads=2, **settings
    )
    return model.getvalue()


def _directory(root: Path, name: str, files: dict[str, str | bytes]) -> Path:
    directory = root / name
    directory.mkdir()
    for file, content in files.items():
        (directory / file).write_bytes(content.encode() if isinstance(content, str) else content)
    return directory


@pytest.fixture(scope="session")
def places(tmp_path_factory) -> dict[str, Path | str]:
    """Kind → what `load_tokenizer` takes."""
    root = tmp_path_factory.mktemp("tokenizers")
    config = json.dumps({"eos_token": "<|endoftext|>", "bos_token": {"content": "<|im_start|>"}})
    bpe = {"vocab_size": 480, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    lossless = {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "split_by_whitespace": True}
    return {
        "bytes": "bytes",
        "byte_level": _directory(
            root, "byte_level", {"tokenizer.json": byte_level_json(), "tokenizer_config.json": config}
        ),
        "byte_level_nfc": _directory(root, "nfc", {"tokenizer.json": byte_level_json(normalizer=normalizers.NFC())}),
        "word_piece": _directory(root, "word_piece", {"tokenizer.json": word_piece_json()}),
        "sentencepiece_bpe": _directory(
            root,
            "bpe",
            {"tokenizer.model": sentencepiece_model(**bpe, **lossless, user_defined_symbols=["<turn>"])},
        ),
        "sentencepiece_unigram": _directory(
            root, "unigram", {"tokenizer.model": sentencepiece_model(vocab_size=200, hard_vocab_limit=False)}
        ),
    }


@pytest.fixture(scope="session")
def loaded(places):
    """Kind → tokenizer."""
    return {kind: load_tokenizer(place) for kind, place in places.items()}
