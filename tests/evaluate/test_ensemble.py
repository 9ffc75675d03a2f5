"""Models that are evaluated as one: the mean of their scores, or of their probabilities, by a plain loop."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from evaluate_cases import byte_model, log_probs, placed
from tiny import LAYOUTS

from jaxdistill.evaluate import Scoring, ensemble, evaluate_text, multiple_choice
from jaxdistill.evaluate.choice import ChoiceItem
from jaxdistill.losses.chunked import term_values
from jaxdistill.losses.terms import CrossEntropy
from jaxdistill.tokenizers import ByteTokenizer
from jaxdistill.types import Head, Outputs

TEXT = "three models read this"
MODELS = {"a": byte_model(1), "b": byte_model(2, layers=1), "c": byte_model(3, vocab=272)}


def expected_nats(averaged: str) -> float:
    """-log p of every byte but the first, in float64."""
    ids = list(TEXT.encode())
    each = np.stack([log_probs(model, ids)[:, :264] for model in MODELS.values()])
    # Every model's distribution is over the ids that all have.
    each -= np.log(np.exp(each).sum(-1, keepdims=True))
    mixed = np.log(np.exp(each).mean(0)) if averaged == "probabilities" else each.mean(0)
    mixed -= np.log(np.exp(mixed).sum(-1, keepdims=True))
    return -sum(mixed[i, ids[i + 1]] for i in range(len(ids) - 1))


@pytest.mark.parametrize("layout", ["one device", "fsdp 4 x tensor 2"])
@pytest.mark.parametrize("averaged", ["scores", "probabilities"])
def test_bits_per_byte_of_an_ensemble(averaged, layout):
    place = LAYOUTS[layout]()
    models = {name: placed(model, place) for name, model in MODELS.items()}
    models["together"] = ensemble(models, averaged)
    scoring = Scoring(length=64, batch_size=2, layout=place)
    found = evaluate_text(models, {"text": [TEXT]}, teacher="a", scoring=scoring)
    np.testing.assert_allclose(found["together"]["text"].nats, expected_nats(averaged), rtol=1e-5)
    assert found["together"]["text"].kl_nats > 0, "and it is compared with a teacher of its vocabulary"


def test_an_ensemble_chooses_options():
    items = [ChoiceItem(context="what", options=("this", "that"), answer=0)]
    together = ensemble({name: MODELS[name] for name in "ab"}, "scores")
    assert multiple_choice(together, items, scoring=Scoring(length=64)).items == 1


def test_what_cannot_be_averaged_is_refused():
    with pytest.raises(ValueError, match=r"at least two models; given: \['a'\]"):
        ensemble({"a": MODELS["a"]}, "scores")
    with pytest.raises(ValueError, match="allowed are scores, probabilities"):
        ensemble(MODELS, "weights")
    other = dataclasses.replace(MODELS["b"], tokenizer=ByteTokenizer(("<a>", "<b>", "<c>")))
    with pytest.raises(ValueError, match=r"'a' and 'b' have different tokens \(261 and 259 ids\)"):
        ensemble({"a": MODELS["a"], "b": other}, "scores")


def test_an_ensemble_is_not_trained():
    head = Head(np.ones((8, 4), np.float32), members=(2, 2))

    def loss(hidden):
        values = term_values(
            {"nats": CrossEntropy()},
            Outputs(hidden, head),
            None,
            targets=np.zeros((1, 3), np.int32),
            loss_mask=np.ones((1, 3), np.float32),
            chunk=2,
        )
        return values["nats"].sum()

    with pytest.raises(ValueError, match="train one model at a time"):
        jax.grad(loss)(np.ones((1, 3, 4), np.float32))
