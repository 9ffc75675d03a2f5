"""Held-out text: every number by its definition, whatever the packing, the chunks and the mesh."""

from __future__ import annotations

import math

import numpy as np
import pytest
from evaluate_cases import byte_model, log_probs, placed
from tiny import LAYOUTS

from jaxdistill.evaluate import Evaluation, Scoring, ensemble, evaluate_text, excerpts, scoring
from jaxdistill.tokenizers import ByteTokenizer

DOMAINS = {
    "prose": ["It was a bright cold day in April.", "Grüße!", "x"],
    "code": ["def f(x):\n    return x + 1\n", "a = 1", "b = 2\nc = 3"],
}
SMALL = Scoring(length=16, batch_size=2)


@pytest.fixture(scope="module")
def models():
    return {"teacher": byte_model(0, layers=3), "student": byte_model(1), "other": byte_model(2)}


@pytest.fixture(scope="module")
def evaluated(models):
    return evaluate_text(models, DOMAINS, teacher="teacher", scoring=SMALL)


def by_definition(model, teacher, texts, length):
    """(nats, KL, agreements, targets) of windows of `length` targets that do not see each other."""
    nats = kl = agreements = count = 0.0
    for text in texts:
        ids = list(text.encode())
        for start in range(0, len(ids) - 1, length):
            inputs, targets = ids[start : start + length][: len(ids) - 1 - start], ids[start + 1 : start + length + 1]
            mine, theirs = log_probs(model, inputs), log_probs(teacher, inputs)
            for at, target in enumerate(targets):
                nats -= mine[at, target]
                kl += (np.exp(theirs[at]) * (theirs[at] - mine[at])).sum()
                agreements += mine[at].argmax() == theirs[at].argmax()
                count += 1
    return nats, kl, agreements, count


@pytest.mark.parametrize("name", ["student", "other"])
@pytest.mark.parametrize("domain", list(DOMAINS))
def test_every_number_is_that_of_the_definition(models, evaluated, name, domain):
    nats, kl, agreements, count = by_definition(models[name], models["teacher"], DOMAINS[domain], SMALL.length)
    found = evaluated[name][domain]
    # The first byte of each text is predicted by nothing.
    assert found.tokens == found.bytes == count == sum(len(t.encode()) - 1 for t in DOMAINS[domain])
    np.testing.assert_allclose(found.bits_per_byte, nats / math.log(2) / count, rtol=1e-5)
    np.testing.assert_allclose(found.kl_nats_per_token, kl / count, rtol=1e-5)
    assert found.top_one_agreement == agreements / count


def test_the_teacher_is_measured_and_not_compared_with_itself(models, evaluated):
    nats, kl, _, _ = by_definition(models["teacher"], models["teacher"], DOMAINS["code"], SMALL.length)
    found = evaluated["teacher"]["code"]
    np.testing.assert_allclose(found.nats, nats, rtol=1e-5)
    assert kl == 0
    assert found.kl_nats_per_token is None
    assert found.top_one_agreement is None


def test_a_copy_of_the_teacher_is_at_distance_zero(models):
    found = evaluate_text({"t": models["teacher"], "s": byte_model(0, layers=3)}, DOMAINS, teacher="t", scoring=SMALL)
    assert abs(found["s"]["code"].kl_nats_per_token) < 1e-5
    assert found["s"]["code"].top_one_agreement == 1


def assert_equal_scores(found, expected):
    for name, domains in expected.items():
        for domain, score in domains.items():
            for field, value in vars(score).items():
                given = getattr(found[name][domain], field)
                assert (given is None) == (value is None)
                if value is not None:
                    np.testing.assert_allclose(given, value, rtol=1e-5, err_msg=f"{name} {domain} {field}")


@pytest.mark.parametrize("layout", ["fsdp 8", "fsdp 4 x tensor 2", "sequence 2 x fsdp 4"])
def test_every_mesh_gives_the_same_numbers(models, evaluated, layout):
    layout = LAYOUTS[layout]()
    # Two rows: fewer than the mesh divides, so that empty ones are added.
    on_mesh = Scoring(length=16, batch_size=2, layout=layout)
    spread = {name: placed(models[name], layout) for name in ("teacher", "student")}
    found = evaluate_text(spread, DOMAINS, teacher="teacher", scoring=on_mesh)
    assert_equal_scores(found, {name: evaluated[name] for name in spread})


def test_empty_rows_and_chunks_change_nothing(models, evaluated):
    pair = {name: models[name] for name in ("teacher", "student")}
    # The texts fill six rows.
    found = evaluate_text(pair, DOMAINS, teacher="teacher", scoring=Scoring(length=16, batch_size=11, chunk=5))
    assert_equal_scores(found, {name: evaluated[name] for name in pair})


def test_a_model_runs_once_for_each_batch_whoever_needs_it(models, monkeypatch):
    """A teacher, and an ensemble that it is a member of."""
    ran, run = [], scoring._hidden
    monkeypatch.setattr(scoring, "_hidden", lambda *given: ran.append(id(given[3])) or run(*given))
    together = ensemble({name: models[name] for name in ("teacher", "student")}, "scores")
    batches = []
    evaluate_text(
        models | {"together": together},
        DOMAINS,
        teacher="teacher",
        scoring=SMALL,
        progress=lambda done, total: batches.append(total),
    )
    assert len(batches) == batches[0] > 1
    assert [ran.count(id(model.params)) for model in models.values()] == [len(batches)] * len(models)


def test_another_vocabulary_has_bits_per_byte_alone(models):
    foreign = byte_model(3, vocab=257, tokenizer=ByteTokenizer(("<end>",)))
    both = {"teacher": models["teacher"], "foreign": foreign}
    found = evaluate_text(both, DOMAINS, teacher="teacher", scoring=SMALL)["foreign"]["code"]
    nats, _, _, count = by_definition(foreign, foreign, DOMAINS["code"], SMALL.length)
    np.testing.assert_allclose(found.bits_per_byte, nats / math.log(2) / count, rtol=1e-5)
    assert found.kl_nats_per_token is None
    with pytest.raises(ValueError, match=r"'foreign' cannot be compared.*vocabularies differ \(257 and 264 ids"):
        evaluate_text(both, DOMAINS, teacher="teacher", compare=["foreign"], scoring=SMALL)


def test_only_those_named_are_compared(models, evaluated):
    found = evaluate_text(models, DOMAINS, teacher="teacher", compare=["student"], scoring=SMALL)
    assert list(found) == list(models)
    assert found["other"]["code"].kl_nats is None
    assert found["student"]["code"].kl_nats == pytest.approx(evaluated["student"]["code"].kl_nats, rel=1e-5)
    assert found["other"]["code"].nats == pytest.approx(evaluated["other"]["code"].nats, rel=1e-5)


def test_with_a_begin_token_the_first_byte_counts(models):
    found = evaluate_text({"m": models["student"]}, {"d": ["ab"]}, prepend_bos=True, scoring=SMALL)["m"]["d"]
    said = log_probs(models["student"], [256, ord("a")])
    assert found.bytes == 2
    np.testing.assert_allclose(found.nats, -said[0, ord("a")] - said[1, ord("b")], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "nobody"}, "'nobody', which is not among the models"),
        ({"compare": ["student"]}, "no teacher is named"),
        ({"teacher": "teacher", "compare": ["nobody"]}, "'nobody' is to be compared and is not among"),
        ({"domains": {}}, "at least one of each"),
        ({"domains": {"empty": ["", "x"]}}, "'empty' has 2 texts and nothing to predict"),
        ({"models": {"small": byte_model(0, vocab=100)}}, r"'small' has a vocabulary of 100"),
        ({"models": {"short": byte_model(0, max_length=8)}}, "'short' takes at most 8"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(models, changes, message):
    given = {"models": models, "domains": DOMAINS, "scoring": SMALL} | changes
    with pytest.raises(ValueError, match=message):
        evaluate_text(given.pop("models"), given.pop("domains"), **given)


def test_excerpts_take_the_beginnings_and_cut_no_character():
    texts = ["Grüße an alle", "", "abcdef", "never reached"]
    # "ü" takes bytes 2 and 3: three bytes end inside it.
    assert excerpts(texts, total_bytes=8, document_bytes=3) == ["Gr", "abc", "ne"]
    assert excerpts(texts, total_bytes=4, document_bytes=100) == ["Grü"]


def test_all_text_weighs_every_byte_the_same(evaluated):
    all_text = Evaluation(text=evaluated, teacher="teacher").all_text("student")
    parts = evaluated["student"].values()
    assert all_text.bits_per_byte == pytest.approx(
        sum(p.nats for p in parts) / sum(p.bytes for p in parts) / math.log(2)
    )
    assert all_text.kl_nats_per_token == pytest.approx(sum(p.kl_nats for p in parts) / sum(p.tokens for p in parts))
