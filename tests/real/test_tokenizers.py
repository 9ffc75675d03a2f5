"""The real tokenizers: ids against the committed goldens, offsets and round trips on held-out text."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from jaxdistill.assets import asset
from jaxdistill.tokenizers import Tokenizer, load_tokenizer

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "tokenizers.json").read_text())
LOSSY = ("tokenizer.default", "qwen3-tokenizer")

pytestmark = pytest.mark.real


@cache
def real(name: str) -> Tokenizer:
    return load_tokenizer(asset("smollm2") if name == "smollm2" else asset("tokenizers") / name)


@pytest.fixture(scope="module")
def held_out() -> list[str]:
    """Ten documents of each of the six domains."""
    lines = asset("heldout").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines[::5]]


@pytest.mark.parametrize("name", GOLDEN["ids"])
def test_ids_equal_the_reference(name):
    tokenizer = real(name)
    for text, ids in zip(GOLDEN["texts"], GOLDEN["ids"][name], strict=True):
        assert tokenizer.encode(text).ids.tolist() == ids, text
    for text, ids in zip(GOLDEN["chats"], GOLDEN["chat_ids"].get(name, []), strict=False):
        assert tokenizer.encode(text, parse_special=True).ids.tolist() == ids, text


@pytest.mark.parametrize("name", GOLDEN["ids"])
def test_offsets_and_export_on_held_out_text(name, held_out, tmp_path):
    tokenizer = real(name)
    vocabulary = tokenizer.token_bytes()
    encodings = tokenizer.encode_batch(held_out)
    for text, encoding in zip(held_out, encodings, strict=True):
        data, offsets = text.encode(), encoding.offsets
        assert offsets[0, 0] == 0
        assert offsets[-1, 1] == len(data)
        assert (offsets[1:, 0] == offsets[:-1, 1]).all()
        assert (offsets[:, 0] <= offsets[:, 1]).all()
        if name not in LOSSY:
            assert tokenizer.decode(encoding.ids) == text
            spelled = b"".join(vocabulary[token] for token in encoding.ids)
            assert spelled in (data, b" " + data)
    tokenizer.save(tmp_path)
    for encoding, again in zip(encodings, load_tokenizer(tmp_path).encode_batch(held_out), strict=True):
        np.testing.assert_array_equal(encoding.ids, again.ids)


def test_smollm2_roles():
    tokenizer = real("smollm2")
    assert tokenizer.vocab_size == 49152
    special = tokenizer.special
    assert (special.bos, special.eos, special.pad, special.unk) == (1, 2, 2, 0)
    assert special.stop == {0, 2}
    assert len(special.all) == 17
    assert tokenizer.chat_template is not None
    assert "<|im_start|>" in tokenizer.chat_template
