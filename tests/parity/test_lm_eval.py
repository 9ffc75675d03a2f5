"""The lm-eval adapter against transformers on the same strings, and a whole task through lm-eval itself."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import LAYOUTS, llama

from jaxdistill.checkpoint.open import Model
from jaxdistill.evaluate import Scoring
from jaxdistill.models.export import write_hf
from jaxdistill.models.schema import abstract_params, param_shardings
from jaxdistill.tokenizers import ByteTokenizer

pytestmark = pytest.mark.parity

CONFIG = llama(vocab=261)
PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " a city that lies on the Seine"),
    ("Grüße", " aus Köln"),
    ("", "no context"),
]
SCORING = Scoring(length=32, batch_size=2)


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval", reason="needs the extra [eval]")


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), abstract_params(CONFIG))
    return Model(CONFIG, params, ByteTokenizer())


@pytest.fixture(scope="module")
def transformers_model(model, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("hf") / "model"
    write_hf(directory, model.config, model.params, dtype="float32", tokenizer=model.tokenizer)
    return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()


def adapter(model, scoring=SCORING):
    from jaxdistill.evaluate.lm_eval_adapter import LmEvalModel

    return LmEvalModel(model, scoring=scoring)


def requests(lm_eval, kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=args, idx=0) for args in arguments]


def by_transformers(hf, context: bytes, continuation: bytes) -> tuple[float, bool]:
    import torch

    ids = [256] * (not context) + list(context + continuation)
    with torch.no_grad():
        said = torch.log_softmax(hf(torch.tensor([ids])).logits[0].double(), -1)
    first = len(ids) - len(continuation)
    targets = ids[first:]
    total = sum(said[first - 1 + i, token].item() for i, token in enumerate(targets))
    greedy = all(said[first - 1 + i].argmax().item() == token for i, token in enumerate(targets))
    return total, greedy


@pytest.mark.parametrize("layout", ["one device", "fsdp 4 x tensor 2"])
def test_log_likelihoods_are_those_of_transformers(lm_eval, model, transformers_model, layout):
    layout = LAYOUTS[layout]()
    placed = Model(CONFIG, jax.device_put(model.params, param_shardings(CONFIG, layout)), model.tokenizer)
    # What the model itself would say next is the one continuation that is greedy.
    greedy_pair = ("abc", model.tokenizer.decode(_greedy(transformers_model, b"abc", 1)))
    pairs = [*PAIRS, greedy_pair]
    found = adapter(placed, Scoring(length=32, batch_size=2, layout=layout)).loglikelihood(
        requests(lm_eval, "loglikelihood", pairs)
    )
    expected = [by_transformers(transformers_model, c.encode(), t.encode()) for c, t in pairs]
    np.testing.assert_allclose([total for total, _ in found], [total for total, _ in expected], rtol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert expected[-1][1]


def _greedy(hf, prompt: bytes, count: int) -> list[int]:
    import torch

    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            # ASCII letters only, so that the continuation is text that gives the same ids.
            ids.append(int(hf(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_rolling_likelihood_covers_every_token_once(lm_eval, model, transformers_model):
    text = "A text of which every byte is predicted."
    [found] = adapter(model).loglikelihood_rolling(requests(lm_eval, "loglikelihood_rolling", [(text,)]))
    expected, _ = by_transformers(transformers_model, b"", text.encode())
    assert found == pytest.approx(expected, rel=1e-4)


def test_generation_stops_at_a_string(lm_eval, model):
    settings = {"max_gen_toks": 6, "until": ["zzz"], "do_sample": False}
    [whole] = adapter(model).generate_until(requests(lm_eval, "generate_until", [("abc", settings)]))
    assert whole
    cut = settings | {"until": [whole[1:]]}
    assert adapter(model).generate_until(requests(lm_eval, "generate_until", [("abc", cut)])) == [whole[:1]]


def test_a_task_runs_through_lm_eval(lm_eval, model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    rows = [{"question": f"Question {n}?", "options": ["yes", "no, never"], "gold": n % 2} for n in range(6)]
    (tmp_path / "items.json").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "local_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    results = lm_eval.simple_evaluate(adapter(model), tasks=[task], bootstrap_iters=0)["results"]["local_choice"]
    from jaxdistill.evaluate import ChoiceItem, multiple_choice

    items = [ChoiceItem(context=r["question"], options=tuple(r["options"]), answer=r["gold"]) for r in rows]
    ours = multiple_choice(model, items, scoring=SCORING)
    assert results["acc,none"] == ours.summed
    assert results["acc_norm,none"] == ours.per_byte
