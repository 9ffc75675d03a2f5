"""Tokenizers of every kind behind one interface: ids, byte offsets into the original text, special tokens by role."""

from jaxdistill.tokenizers.base import Encoding, SpecialTokens, Tokenizer, TokenizerError
from jaxdistill.tokenizers.byte_level import ByteTokenizer
from jaxdistill.tokenizers.huggingface import HuggingFaceTokenizer
from jaxdistill.tokenizers.load import load_tokenizer
from jaxdistill.tokenizers.sentencepiece_model import SentencePieceTokenizer

__all__ = [
    "ByteTokenizer",
    "Encoding",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "SpecialTokens",
    "Tokenizer",
    "TokenizerError",
    "load_tokenizer",
]
