"""Every pair of the real tokenizers: chunks against their definition, on random Unicode and on held-out text."""

from __future__ import annotations

import itertools
import json
from functools import cache

import numpy as np
import pytest
from align_reference import placed, walked
from hypothesis import given, settings
from tiny_tokenizers import TEXTS

from jaxdistill.align import align
from jaxdistill.assets import asset
from jaxdistill.checkpoint.open import open_model
from jaxdistill.data.aligned import AlignedTokenizer
from jaxdistill.data.chat import ChatFormat
from jaxdistill.data.pipeline import DataConfig, make_loader
from jaxdistill.evaluate import evaluate_text
from jaxdistill.jobs.inspect_alignment import AlignmentConfig, inspect_alignment
from jaxdistill.report.alignment import alignment_text
from jaxdistill.tokenizers import Tokenizer, load_tokenizer

pytestmark = pytest.mark.real

NAMES = (
    *("smollm2", "bytes", "tokenizer.default", "tokenizer.llama2", "tokenizer.mistral-v1", "tokenizer.mistral-v3"),
    *("tokenizer.gemma", "tokenizer.gemma3", "qwen3-tokenizer", "mistral_instruct_tokenizer_240323.model.v3"),
    "mistral_instruct_tokenizer_241114.model.v7",
)


@cache
def real(name: str) -> Tokenizer:
    if name == "bytes":
        return load_tokenizer("bytes")
    return load_tokenizer(asset("smollm2") if name == "smollm2" else asset("tokenizers") / name)


def assert_aligned(text: str) -> None:
    """All pairs of tokenizers on one text, in minimal chunks and in words."""
    sides = {name: placed(real(name), text) for name in NAMES}
    for pair in itertools.combinations(NAMES, 2):
        student, teacher = (sides[name] for name in pair)
        for words in (False, True):
            found = align(student, teacher, chunks="words" if words else "minimal")
            for ids, wanted in zip(found, walked(student, teacher, words=words), strict=True):
                np.testing.assert_array_equal(ids, wanted, err_msg=f"{pair} on {text!r}")
        if len(student.ends) and len(teacher.ends):
            widths = [
                np.bincount(ids, weights=np.diff(side.ends, prepend=0))
                for ids, side in zip(found, (student, teacher), strict=True)
            ]
            np.testing.assert_array_equal(*widths)
            assert widths[0][0] == 0
            assert widths[0].sum() == len(text.encode())


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_all_pairs_on_random_unicode(text):
    assert_aligned(text)


def test_all_pairs_on_held_out_text():
    """A document of each domain, with the awkward ends of what was cut out of pages."""
    rows = [json.loads(line) for line in asset("heldout").read_text(encoding="utf-8").splitlines()]
    for text in {row["type"]: row["text"][:2000] for row in rows}.values():
        assert_aligned(text)


@pytest.mark.parametrize(
    ("teacher", "share"), [("tokenizer.gemma3", 0.957), ("qwen3-tokenizer", 0.953), ("tokenizer.llama2", 0.888)]
)
def test_most_chunks_are_one_token_on_both_sides(teacher, share):
    """Shares that were measured before, by other code, on 200 passages."""
    texts = [json.loads(line)["text"] for line in asset("boolq-passages").read_text().splitlines()[:200]]
    alone = total = 0
    for text in texts:
        counts = [np.bincount(ids)[1:] for ids in align(*(placed(real(name), text) for name in ("smollm2", teacher)))]
        alone += int(np.sum((counts[0] == 1) & (counts[1] == 1)))
        total += len(counts[0])
    assert alone / total == pytest.approx(share, abs=0.01)


def test_conversations_of_two_published_templates():
    """The teacher's writes an empty thought before the answer, and would write earlier answers without it."""
    sides = (real("smollm2"), real("qwen3-tokenizer"))
    turns = [
        {"role": "user", "content": "What is the capital of Japan?"},
        {"role": "assistant", "content": "東京 (Tokyo), of course 😀."},
    ]
    (document,) = AlignedTokenizer(*sides, prepend_bos=False, append_eos=False)([{"messages": turns}], ["text"])
    said = []
    for (tokens, chunks), tokenizer in zip(document.sides, sides, strict=True):
        vocabulary, compared = tokenizer.token_bytes(), document.supervised[chunks - 1] & (chunks > 0)
        said.append(b"".join(vocabulary[token] for token in tokens.ids[compared]).decode())
        assert (ChatFormat(tokenizer).locate(turns).contents >= 0).all()
    assert said == ["東京 (Tokyo), of course 😀.<|im_end|>"] * 2


def test_what_there_is_to_see_of_smollm2_beside_llama2():
    """The model's likelihoods beside a tokenizer alone: totals as its own held-out scoring has them."""
    text = "The capital of Japan is Tokyo. Anthropomorphic frogs 😀 discuss jurisprudence."
    both = {"student": str(asset("smollm2")), "teacher": str(asset("tokenizers") / "tokenizer.llama2")}
    config = AlignmentConfig(text=text, append_eos=False, **both)
    view = inspect_alignment(config)
    shown = alignment_text(view, width=100)
    assert "[·jurisprudence]" in shown
    assert "[·juris│pr│ud│ence]" in shown
    assert r"[·\xf0\x9f\x98]" in shown
    assert r"[·│\xf0│\x9f│\x98]" in shown
    model = open_model(asset("smollm2"))
    measured = evaluate_text({"model": model}, {"text": [text]})["model"]["text"]
    # The first token is predicted by nothing on either side, and is a chunk of its own.
    assert view.bits_per_byte == [pytest.approx(measured.bits_per_byte, rel=1e-4), None]
    assert view.one_to_one > 0.7


def test_the_loader_of_pairs_keeps_up_and_fills_its_rows():
    config = DataConfig(path=str(asset("boolq-passages")), teacher_length=576)
    loader = make_loader(config, real("smollm2"), teacher_tokenizer=real("tokenizer.llama2"))
    for _ in range(30):
        batch = next(loader)
    statistics = loader.statistics
    loader.close()
    shares = statistics.tokens / statistics.positions, statistics.teacher_tokens / statistics.teacher_positions
    print(f"{statistics}; used {shares[0]:.1%} of the student's and {shares[1]:.1%} of the teacher's positions")
    assert min(shares) > 0.85
    assert batch["chunks"].max(axis=1).min() > 0.7 * 512
