"""transformers loads what `save` writes and gives equal ids; the goldens are what their references still say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from jaxdistill.assets import asset
from jaxdistill.tokenizers import load_tokenizer

GOLDEN = Path(__file__).parent.parent / "golden"

pytestmark = pytest.mark.parity


def test_goldens_are_current(monkeypatch):
    monkeypatch.syspath_prepend(str(GOLDEN))
    sys.modules.pop("make_tokenizers", None)
    import make_tokenizers

    assert make_tokenizers.golden() == json.loads((GOLDEN / "tokenizers.json").read_text())


@pytest.mark.parametrize(
    "name", ["bytes", "smollm2", "qwen3-tokenizer", "tokenizer.llama2", "tokenizer.mistral-v3", "tokenizer.default"]
)
def test_auto_tokenizer_gives_equal_ids(name, tmp_path):
    from transformers import AutoTokenizer

    place = {"bytes": "bytes", "smollm2": asset("smollm2")}.get(name) or asset("tokenizers") / name
    tokenizer = load_tokenizer(place)
    tokenizer.save(tmp_path)
    # The directory of an exported model, where transformers looks at the model's type as well.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    reference = AutoTokenizer.from_pretrained(tmp_path)
    lines = asset("heldout").read_text(encoding="utf-8").splitlines()
    golden = json.loads((GOLDEN / "tokenizers.json").read_text())
    texts = [json.loads(line)["text"] for line in lines] + golden["texts"]
    for text, encoding in zip(texts, tokenizer.encode_batch(texts), strict=True):
        ids = reference(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert encoding.ids.tolist() == ids, text[:80]
    for text in [*golden["chats"], "<s>[INST] a [/INST] b</s>"]:
        ids = reference(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text, parse_special=True).ids.tolist() == ids
    roles = (reference.bos_token_id, reference.eos_token_id, reference.pad_token_id)
    assert roles == (tokenizer.special.bos, tokenizer.special.eos, tokenizer.special.pad)
    assert reference.chat_template == tokenizer.chat_template
