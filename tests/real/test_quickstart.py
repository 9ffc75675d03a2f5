"""The quickstart on the real teacher, with a budget of a minute, and what it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxdistill.checkpoint.open import open_config
from jaxdistill.formats.safetensors import open_safetensors

pytestmark = [pytest.mark.real, pytest.mark.timeout(280)]

TOOL = Path(__file__).parents[2] / "tools" / "quickstart.py"


def quickstart(out: Path) -> str:
    """Its standard output; a plain environment, as a user has it: one CPU device."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, str(TOOL), "--seconds", "60", "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_minute_of_quickstart(tmp_path):
    out = tmp_path / "run"
    printed = quickstart(out)

    models = json.loads((out / "evaluation.json").read_text())["models"]
    assert set(models) == {"teacher", "random", "pruned", "distilled"}
    bits = {name: model["all_text"]["bits_per_byte"] for name, model in models.items()}
    # Chance costs bits, importance a part of that; even two steps win some of it back.
    assert 1.0 < bits["teacher"] < 1.4
    assert bits["teacher"] + 0.4 < bits["pruned"] < 3.0
    assert bits["random"] > bits["pruned"] + 1.0
    assert bits["distilled"] < bits["pruned"] - 0.02
    assert models["distilled"]["all_text"]["kl_nats"] < models["pruned"]["all_text"]["kl_nats"]
    assert len(models["teacher"]["text"]) == 6

    student = open_config(out / "train" / "student")
    assert len(student.layers) == 18
    with open_safetensors(out / "train" / "student") as tensors:
        assert np.all(np.isfinite(tensors.read("model.layers.17.mlp.down_proj.weight")))
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {p.name for p in (out / "train/student").iterdir()}
    assert "distilled" in printed
    assert "total" in printed
    assert "<svg" in (out / "report.html").read_text()
    assert (out / "samples.json").exists()


def test_bits_per_byte_of_the_teacher_equal_a_direct_sum():
    """The evaluation's packing, chunks and byte counts against scores of one text at a time."""
    import jax
    import jax.numpy as jnp

    from jaxdistill.assets import asset
    from jaxdistill.checkpoint.open import open_model
    from jaxdistill.evaluate.text import evaluate_text
    from jaxdistill.models.decoder import Rows, apply, scores

    model = open_model(asset("smollm2"))
    lines = asset("heldout").read_text().splitlines()
    texts = [json.loads(line)["text"][:400] for line in (lines[0], lines[60], lines[120])]
    found = evaluate_text({"teacher": model}, {"some": texts})["teacher"]["some"]
    nats = bytes_seen = 0.0
    for text in texts:
        encoding = model.tokenizer.encode(text)
        ids = jnp.asarray(encoding.ids)[None]
        rows = Rows(tokens=ids, positions=jnp.arange(ids.shape[1])[None], segment_ids=jnp.ones_like(ids))
        outputs = apply(model.config, model.params, rows)
        log_probs = jax.nn.log_softmax(scores(outputs.hidden, outputs.head))[0]
        nats -= float(np.asarray(log_probs, np.float64)[np.arange(ids.shape[1] - 1), encoding.ids[1:]].sum())
        bytes_seen += len(text.encode()) - encoding.offsets[0, 1]
    assert found.bytes == bytes_seen
    np.testing.assert_allclose(found.bits_per_byte, nats / np.log(2) / bytes_seen, rtol=1e-5)
