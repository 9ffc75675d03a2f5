"""What there is to see of an alignment: every token once, and numbers that a direct computation gives."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import llama, params, slow
from written_tokenizers import written

from jaxdistill.checkpoint.open import Model, has_model
from jaxdistill.data.aligned import AlignedTokenizer
from jaxdistill.evaluate.alignment import Side, aligned_view
from jaxdistill.evaluate.scoring import Scoring
from jaxdistill.losses.alm import ALM
from jaxdistill.models.decoder import apply, head_of
from jaxdistill.tokenizers import load_tokenizer
from jaxdistill.types import Batch

TEXT = "the  fox is naïve.\njumping it 😀 is"
PAIR = {"prompt": "the fox is it?", "completion": " it is the fox 😀."}
SCORING = Scoring(length=64, batch_size=1)


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """A student on bytes and a teacher on a byte-level BPE, each with its tokenizer's vocabulary."""
    paths = written(tmp_path_factory.mktemp("written"))
    found = []
    for seed, kind in enumerate(("bytes", "byte_level")):
        tokenizer = load_tokenizer(paths[kind])
        config = llama(vocab=tokenizer.vocab_size + 3 * seed)
        found.append(Side(tokenizer, Model(config, params(config, seed, head_scale=4.0), tokenizer)))
    return found


def view_of(sides, record, *, merge_threshold: float | None = 0.1, **settings):
    align = AlignedTokenizer(
        *(side.tokenizer for side in sides), **{"prepend_bos": False, "append_eos": False, **settings}
    )
    [document] = align([record], ["text"])
    return aligned_view(document, *sides, term=ALM(merge_threshold=merge_threshold), scoring=SCORING)


def direct(side: Side, ids: list[int]) -> np.ndarray:
    """log p of every id at every position, float64 [tokens, vocab], from whole scores of one unpadded row."""
    config, weights = side.model.config, side.model.params
    row, ones = jnp.asarray(ids)[None], jnp.ones((1, len(ids)), jnp.int32)
    batch = Batch(row, row, ones.astype(jnp.float32), jnp.arange(len(ids))[None], ones, ones)
    hidden = np.asarray(apply(config, weights, batch).hidden[0], np.float64)
    scores = hidden @ np.asarray(head_of(config, weights).kernel, np.float64).T
    highest = scores.max(axis=1, keepdims=True)
    return scores - highest - np.log(np.exp(scores - highest).sum(axis=1, keepdims=True))


def tokens_of(view, side: int) -> list:
    return [token for cell in view.cells for token in cell.sides[side]]


@pytest.mark.parametrize("record", [{"text": TEXT}, slow(PAIR)], ids=["text", "pair"])
def test_likelihoods_are_those_of_a_direct_computation(sides, record):
    view = view_of(sides, record)
    for number, side in enumerate(sides):
        shown = tokens_of(view, number)
        log_probs = direct(side, [token.id for token in shown])
        assert shown[0].log_prob is None
        for at, token in enumerate(shown[1:]):
            assert token.log_prob == pytest.approx(log_probs[at, token.id], rel=1e-5)
    assert 0 < len(view.compared) < len(view.chunks)
    for cell in view.compared:
        sums = [sum(token.log_prob for token in side) for side in cell.sides]
        assert cell.nats == pytest.approx(sums)
        assert cell.difference == pytest.approx(sums[0] - sums[1])
    totals = [sum(cell.nats[number] for cell in view.compared) for number in (0, 1)]
    size = len(b"".join(token.text for cell in view.compared for token in cell.sides[0]))
    assert view.nats == pytest.approx(totals)
    assert view.bits_per_byte == pytest.approx([-total / size / math.log(2) for total in totals])


def test_groups_are_those_of_the_definition(sides):
    """Joined where the teacher's probability of white space or a special token is low; divergence by its formula."""
    unjoined = view_of(sides, {"text": TEXT}, merge_threshold=None)
    chances, own = [], []
    for number, side in enumerate(sides):
        shown = tokens_of(unjoined, number)
        probabilities = np.exp(direct(side, [token.id for token in shown]))
        vocabulary, special = side.tokenizer.token_bytes(), set(side.tokenizer.special.all.values())
        opening = [i for i, piece in enumerate(vocabulary) if piece[:1] in (b" ", b"\t", b"\n") or i in special]
        after = np.cumsum([len(cell.sides[number]) for cell in unjoined.cells]) - 1
        chances.append(probabilities[:, opening].sum(axis=1)[after])
        own.append([cell.nats for cell in unjoined.cells])
    compared = [index for index, cell in enumerate(unjoined.cells) if cell.compared]
    threshold = float(np.median(chances[1][compared]))
    expected, members = [], []
    for index in compared:
        members.append(index)
        last = index == compared[-1]
        if not last and chances[1][index] <= threshold:
            continue
        sums = []
        for number in (0, 1):
            ended = 0.0 if last else math.log(chances[number][index])
            sums.append(sum(own[number][member][number] for member in members) + ended)
        q, p = (math.exp(value / 100 - 1e-6) for value in sums)
        divergence = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        cells = [unjoined.cells[member] for member in members]
        expected.append((cells[0].chunk, cells[-1].chunk, *sums, divergence))
        members = []
    assert 2 < len(expected) < len(compared)
    view = view_of(sides, {"text": TEXT}, merge_threshold=threshold)
    assert len(view.groups) == len(expected)
    for group, wanted in zip(view.groups, expected, strict=True):
        assert group == pytest.approx(wanted, rel=2e-4)
    assert view.divergence == pytest.approx(np.mean([wanted[-1] for wanted in expected]), rel=2e-4)
    for index, group in enumerate(view.groups):
        inside = [cell.chunk for cell in view.cells if cell.group == index]
        assert inside == list(range(group.first, group.last + 1))
    assert [group[:2] for group in unjoined.groups] == [(cell.chunk, cell.chunk) for cell in unjoined.compared]


@pytest.mark.parametrize("kinds", [("prefix_space", "bytes"), ("prefix_space", "byte_level"), ("byte_level", "bytes")])
def test_every_token_is_shown_once_and_every_byte_is_in_a_chunk(tmp_path, kinds):
    paths = written(tmp_path)
    tokenizers = [load_tokenizer(paths[kind]) for kind in kinds]
    view = view_of([Side(each) for each in tokenizers], {"text": TEXT}, prepend_bos=kinds[1] == "bytes")
    [document] = AlignedTokenizer(*tokenizers, prepend_bos=kinds[1] == "bytes", append_eos=False)(
        [{"text": TEXT}], ["text"]
    )
    for number, (tokens, chunks) in enumerate(document.sides):
        shown = [(token.id, cell.chunk) for cell in view.cells for token in cell.sides[number]]
        assert shown == list(zip(tokens.ids.tolist(), chunks.tolist(), strict=True))
        assert view.tokens[number] == len(tokens)
        compared = np.append(False, document.supervised)[chunks]
        assert view.unsupervised[number] == np.count_nonzero(~compared)
    assert sum(cell.text_bytes for cell in view.chunks) == len(TEXT.encode())
    assert [cell.compared for cell in view.chunks] == document.supervised.tolist()
    alone = sum(len(cell.sides[0]) == 1 and len(cell.sides[1]) == 1 for cell in view.chunks)
    assert view.one_to_one == pytest.approx(alone / len(document.supervised))
    assert view.bytes_per_chunk == pytest.approx(len(TEXT.encode()) / len(document.supervised))
    assert view.groups == ()
    assert view.nats == view.bits_per_byte == [None, None]
    assert view.divergence is None


def test_one_model_gives_likelihoods_of_its_side_alone(sides):
    view, both = view_of([sides[0], Side(sides[1].tokenizer)], {"text": TEXT}), view_of(sides, {"text": TEXT})
    assert view.nats == [both.nats[0], None]
    assert [cell.nats for cell in view.compared] == [(cell.nats[0], None) for cell in both.compared]
    assert all(cell.difference is None and cell.group is None for cell in view.cells)


def test_a_text_that_is_one_token_has_nothing_to_compare(sides):
    view = view_of(sides, {"text": "x"})
    assert [(cell.chunk, cell.compared) for cell in view.cells] == [(1, False)]
    assert view.nats == [None, None]


def test_a_text_that_a_model_cannot_read_is_refused(sides):
    with pytest.raises(ValueError, match="the model 'student' takes at most 2048; give a shorter"):
        view_of(sides, {"text": "x" * (sides[0].model.config.max_length + 2)})


def test_what_claims_to_be_a_model(tmp_path):
    paths = written(tmp_path)
    assert not has_model("bytes")
    assert not has_model(paths["byte_level"])
    assert not has_model(paths["byte_level"] + "/tokenizer.json")
    assert has_model(tmp_path / "x.gguf")
    (tmp_path / "byte_level" / "config.json").write_text("{}")
    assert has_model(paths["byte_level"])
