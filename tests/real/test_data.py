"""The data room on the real tokenizer and text."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from jaxdistill.assets import asset
from jaxdistill.data.chat import ChatFormat
from jaxdistill.data.evaluation import eval_batches
from jaxdistill.data.pipeline import DataConfig, make_loader
from jaxdistill.tokenizers import load_tokenizer

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "chat.json").read_text(encoding="utf-8"))
CASES = [case for case in GOLDEN["cases"] if case["template"] == "smollm2"]

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(asset("smollm2"))


@pytest.mark.parametrize("case", CASES)
def test_smollm2_conversations_equal_transformers(tokenizer, case):
    form = ChatFormat(tokenizer)
    settings = {"add_generation_prompt": case["add_generation_prompt"]}
    assert form.render(case["messages"], **settings) == case["text"]
    assert form.encode(case["messages"], **settings).ids.tolist() == case["ids"]


def test_smollm2_supervises_what_the_assistant_says(tokenizer):
    messages = CASES[2]["messages"]
    ids, supervised, _ = ChatFormat(tokenizer).supervise(messages)
    starts = np.flatnonzero(np.diff(supervised.astype(int), prepend=0) == 1)
    ends = np.flatnonzero(np.diff(supervised.astype(int), append=0) == -1) + 1
    said = [tokenizer.decode(ids[start:end], skip_special=False) for start, end in zip(starts, ends, strict=True)]
    assert said == ["Yes 😀.<|im_end|>", "No<|im_end|>"]


def test_held_out_bytes_are_exact(tokenizer):
    lines = asset("heldout").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    batches = eval_batches(texts, tokenizer, length=512, batch_size=8)
    evaluated = sum(int((batch["target_bytes"] * batch["loss_mask"]).sum()) for batch in batches)
    first = sum(int(encoding.offsets[0, 1]) for encoding in tokenizer.encode_batch(texts))
    assert evaluated == sum(len(text.encode()) for text in texts) - first


def test_the_loader_keeps_up_with_a_trainer(tokenizer):
    """Rows of real passages: well filled, and far faster than two cores can train on (about 1,000 tokens/s)."""
    loader = make_loader(DataConfig(path=str(asset("boolq-passages")), field="text"), tokenizer)
    next(loader)
    start, before = time.perf_counter(), loader.statistics.tokens
    for _ in range(50):
        next(loader)
    tokens_per_second = (loader.statistics.tokens - before) / (time.perf_counter() - start)
    padding = loader.statistics.padding_fraction
    print(f"{tokens_per_second:,.0f} tokens/s, {padding:.1%} padding")
    loader.close()
    assert tokens_per_second > 20_000
    assert padding < 0.06
