"""SmolLM2 for real tokenizers: every id has a row, and most of them a good reason."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.assets import asset
from jaxdistill.checkpoint.open import open_model
from jaxdistill.models.decoder import Rows, apply, scores
from jaxdistill.models.suffixes import build_trie, longest_suffixes
from jaxdistill.retokenize import map_vocabulary, retokenize_model
from jaxdistill.tokenizers import ByteTokenizer, load_tokenizer
from jaxdistill.tokenizers.vocabulary import ordinary_ids

pytestmark = pytest.mark.real

TEXT = "The capital of France is Paris. Water boils at 100 degrees Celsius, and ice melts at zero degrees."


@pytest.fixture(scope="module")
def model():
    return open_model(asset("smollm2"))


def tokenizer_of(name: str):
    return ByteTokenizer() if name == "bytes" else load_tokenizer(asset("tokenizers") / name)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("tokenizer.llama2", {"role": 3, "exact": 18805, "decomposed": 13171, "drawn": 21}),
        ("tokenizer.default", {"role": 3, "exact": 21291, "decomposed": 11474}),  # Unigram, 32,768 tokens
        ("bytes", {"role": 3, "exact": 237, "drawn": 21}),
    ],
)
def test_rows_for_real_vocabularies(model, name, counts):
    """SmolLM2 has no token for 21 bytes, which UTF-8 does not use. Between subwords the loss starts far
    below that of chance; from subwords to bytes it does not."""
    new, vocabulary = tokenizer_of(name), model.tokenizer.token_bytes()
    config, params, rows = retokenize_model(
        model.config, model.params, model.tokenizer, new, key=jax.random.key(0), multiple=64
    )
    print(name, rows.counts)
    for kind in {**counts, **rows.counts}:
        assert rows.counts.get(kind, 0) == pytest.approx(counts.get(kind, 0), rel=0.01), kind
    assert len(rows.kinds) == new.vocab_size
    for spelled, sources, kind in zip(new.token_bytes(), rows.sources, rows.kinds, strict=True):
        assert (kind == "drawn") == (not sources)
        if kind in ("exact", "decomposed"):
            assert b"".join(vocabulary[token] for token in sources) == spelled
    table = params["embedding"]["kernel"]
    assert table.shape == (config.vocab, config.embed)
    assert bool(jnp.isfinite(table).all())
    ids = new.encode(TEXT).ids[None]
    at = Rows(jnp.asarray(ids), jnp.arange(ids.shape[1])[None], jnp.ones_like(ids))
    outputs = jax.jit(lambda p: apply(config, p, at))(params)
    log_probs = jax.nn.log_softmax(scores(outputs.hidden[0, :-1], outputs.head))
    nats = -np.take_along_axis(np.asarray(log_probs), ids[0, 1:, None], axis=1).mean()
    print(name, "nats per token", nats, "of", np.log(config.vocab))
    assert name == "bytes" or nats < 0.6 * np.log(config.vocab)


def test_most_bytes_of_english_end_a_long_token(model):
    """The tokens of the text itself are among those that end there."""
    trie = build_trie(ordinary_ids(model.tokenizer), {}, vocab=256)
    data = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int32)[None]
    found = np.asarray(longest_suffixes(jnp.asarray(trie), data, np.ones_like(data), vocab=256))[0]
    vocabulary, encoding = model.tokenizer.token_bytes(), model.tokenizer.encode(TEXT)
    for token, (_, end) in zip(encoding.ids, encoding.offsets, strict=True):
        assert vocabulary[found[end - 1]].endswith(vocabulary[token])
    assert np.mean([len(vocabulary[token]) for token in found]) > 3


def test_a_model_for_its_own_tokenizer_is_itself(model):
    rows = map_vocabulary(model.tokenizer, model.tokenizer)
    assert {kind: count for kind, count in rows.counts.items() if kind != "role"} == {"exact": 49150}
    assert [ids for ids in rows.sources if len(ids) != 1] == []
    moved = [token for token, ids in enumerate(rows.sources) if ids != (token,)]
    assert moved == []
