"""Our models against transformers' own, live: weights, scores, generation, and directories that we write."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdistill.assets import ASSETS, cache_directory
from jaxdistill.generate import generate
from jaxdistill.models.decoder import Rows, apply, scores
from jaxdistill.models.export import write_hf
from jaxdistill.models.families.family import ConfigError
from jaxdistill.models.load import read_model
from jaxdistill.models.schema import unstack
from jaxdistill.prune.baselines import random_importance
from jaxdistill.prune.choose import Target, choose
from jaxdistill.prune.slice import prune_model
from jaxdistill.tokenizers.load import load_tokenizer

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = tuple(sorted(folder.name for folder in (GOLDEN / "tiny_models").iterdir()))
KEPT = (0, 1, 2, 3, 5, 8, 13, 21, 28, 29)


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    path = cache_directory() / "smollm2" / ASSETS["smollm2"].files[0].name
    assert path.is_file(), f"{path} is missing; run `python tools/fetch_assets.py smollm2`."
    return path


@pytest.fixture(scope="module")
def ours(gguf_file):
    return read_model(gguf_file)


@pytest.fixture(scope="module")
def theirs(gguf_file):
    return hf_model(gguf_file.parent, gguf_file=gguf_file.name)


@pytest.fixture(scope="module")
def tokenizer(gguf_file):
    return load_tokenizer(gguf_file)


def hf_model(folder: Path, **arguments):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **arguments)
    return model.eval()


def hf_scores(model, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits.numpy()


def our_scores(config, params, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)

    def run(params):
        outputs = apply(config, params, Rows(tokens, positions, mask))
        return scores(outputs.hidden, outputs.head)

    return np.asarray(jax.jit(run)(params))


def rows_of(tokenizer, texts: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded tokens and their mask."""
    tokens, mask = np.zeros((len(texts), length), np.int32), np.zeros((len(texts), length), np.int32)
    for row, text in enumerate(texts):
        ids = tokenizer.encode(text).ids[:length]
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, 1
    return tokens, mask


@pytest.fixture(scope="module")
def text(tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """One text of each of six held-out domains, the last shorter than the row."""
    file = cache_directory() / "heldout" / "heldout.jsonl"
    assert file.is_file(), f"{file} is missing; run `python tools/fetch_assets.py heldout`."
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    long = {row["type"]: row["text"] for row in rows if len(row["text"]) > 1000}
    quote = next(row["text"] for row in rows if row["type"] == "quotes")
    tokens, mask = rows_of(tokenizer, [*long.values(), quote[:60]], 160)
    assert len(tokens) == 6
    assert mask[:5].all()
    assert 0 < mask[5].sum() < 40
    return tokens, mask


def tiny_rows() -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(1).integers(0, 48, (4, 30))
    return tokens, (np.arange(30) < np.array([30, 30, 13, 1])[:, None]).astype(np.int32)


@pytest.mark.parametrize("name", MODELS)
def test_committed_scores_are_still_those_of_transformers(name):
    with np.load(GOLDEN / "tiny_models.npz") as arrays:
        tokens, mask, expected = (arrays[f"{name}.{part}"] for part in ("tokens", "mask", "scores"))
    found = hf_scores(hf_model(GOLDEN / "tiny_models" / name), tokens, mask)
    np.testing.assert_allclose(found[mask == 1], expected[mask == 1], atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_tiny_models_score_alike_also_after_being_written(name, tmp_path):
    config, params = read_model(GOLDEN / "tiny_models" / name)
    tokens, mask = tiny_rows()
    original = hf_scores(hf_model(GOLDEN / "tiny_models" / name), tokens, mask)
    np.testing.assert_allclose(our_scores(config, params, tokens, mask)[mask == 1], original[mask == 1], atol=1e-4)
    write_hf(tmp_path / "out", config, params, dtype="float32")
    np.testing.assert_array_equal(hf_scores(hf_model(tmp_path / "out"), tokens, mask), original)


CUTS = {
    "heads": Target(heads=2),
    "key-value heads": Target(kv_heads=1),
    "neurons": Target(mlp=12),
    "channels": Target(embed=12),
    "layers": Target(layers=1),
    "all": Target(layers=2, mlp=12, heads=2),
}
REFUSED = {(name, cut) for name in ("phi3_long", "phi3_short") for cut in ("heads", "key-value heads", "channels")}
"""What transformers would not load: LongRoPE's factors are counted by embed / heads."""


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_cut_of_a_family_loads_in_transformers(name, cut, tmp_path):
    config, params = read_model(GOLDEN / "tiny_models" / name)
    target = dataclasses.replace(CUTS[cut], embed=config.embed // 2) if cut == "all" else CUTS[cut]
    config, params = prune_model(config, params, choose(config, random_importance(config, 0), target))
    if (name, cut) in REFUSED:
        with pytest.raises(ConfigError, match="when pruning"):
            write_hf(tmp_path / "out", config, params, dtype="float32")
        return
    assert_scores_of_transformers(config, params, tmp_path / "out")


def assert_scores_of_transformers(config, params, folder: Path) -> None:
    write_hf(folder, config, params, dtype="float32")
    tokens, mask = tiny_rows()
    expected = hf_scores(hf_model(folder), tokens, mask)
    np.testing.assert_allclose(our_scores(config, params, tokens, mask)[mask == 1], expected[mask == 1], atol=1e-4)


@pytest.mark.parametrize("name", ["llama3_rope", "qwen2_yarn", "qwen3", "olmo2"])
def test_merged_heads_load_in_transformers(name, tmp_path):
    config, params = read_model(GOLDEN / "tiny_models" / name)
    kept = config.layers[0].mixer.kv_heads
    plan = choose(config, random_importance(config, 0), Target(heads=kept), merge_heads=True)
    assert plan.head_partners != plan.widths["heads"]
    assert_scores_of_transformers(*prune_model(config, params, plan), tmp_path / "out")


def test_a_mixture_cut_in_all_axes_loads_in_transformers(tmp_path):
    config, params = read_model(GOLDEN / "tiny_models" / "mixture")
    target = Target(layers=1, embed=12, mlp=12, experts=3)
    config, params = prune_model(config, params, choose(config, random_importance(config, 0), target))
    assert_scores_of_transformers(config, params, tmp_path / "out")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", ["both", "new", "old"])
def test_written_config_is_the_same_to_transformers(name, layout, tmp_path):
    from transformers import AutoConfig

    config, params = read_model(GOLDEN / "tiny_models" / name)
    write_hf(tmp_path / "out", config, params, dtype="float32")
    file = tmp_path / "out" / "config.json"
    fields = json.loads(file.read_text())
    for key in {"both": (), "new": ("rope_theta", "rope_scaling"), "old": ("rope_parameters",)}[layout]:
        del fields[key]
    file.write_text(json.dumps(fields))
    unrelated = {"_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "transformers_version"}
    # What layer_types and no_rope_layers say better.
    unrelated |= {"max_window_layers", "_sliding_window_pattern", "no_rope_layer_interval"}
    found, expected = (
        {k: v for k, v in AutoConfig.from_pretrained(folder).to_dict().items() if k not in unrelated}
        for folder in (tmp_path / "out", GOLDEN / "tiny_models" / name)
    )
    if expected.get("head_dim") is None:  # Mixtral's and Qwen2's way to say hidden_size / heads
        expected["head_dim"] = expected["hidden_size"] // expected["num_attention_heads"]
    for rope in (found["rope_parameters"], expected["rope_parameters"]):
        for part in (rope, *(inner for inner in rope.values() if isinstance(inner, dict))):
            part.pop("type", None)
            # Ours are written out; that they say the same, scores tell.
            part.pop("attention_factor", None)
            part.pop("truncate", None)
            if part.get("partial_rotary_factor") == 1.0:
                del part["partial_rotary_factor"]
    # Where transformers 4 looked for it.
    assert found.keys() - expected.keys() <= {"hidden_activation", "sliding_window_pattern", "partial_rotary_factor"}
    assert {name: found[name] for name in expected} == expected


def test_every_tensor_of_the_gguf_file_equals_transformers_dequantisation(ours, theirs):
    config, params = ours
    flat = unstack(config, params)
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    assert theirs.lm_head.weight.data_ptr() == theirs.model.embed_tokens.weight.data_ptr()
    parts = {
        "input_layernorm": "mixer.norm.scale",
        "post_attention_layernorm": "ffn.norm.scale",
        "self_attn.q_proj": "mixer.query.kernel",
        "self_attn.k_proj": "mixer.key.kernel",
        "self_attn.v_proj": "mixer.value.kernel",
        "self_attn.o_proj": "mixer.output.kernel",
        "mlp.gate_proj": "ffn.gate.kernel",
        "mlp.up_proj": "ffn.up.kernel",
        "mlp.down_proj": "ffn.down.kernel",
    }
    names = {f"model.layers.{i}.{hf}.weight": f"layers.{i}.{our}" for i in range(30) for hf, our in parts.items()}
    names |= {"model.embed_tokens.weight": "embedding.kernel", "model.norm.weight": "final_norm.scale"}
    assert set(names) == set(state)
    assert set(names.values()) == set(flat)
    for hf, our in names.items():
        kernel = np.asarray(flat[our])
        if "proj" in hf:  # torch has [out, in], with the heads flattened
            kernel = kernel.reshape(-1, 576).T if "o_proj" in hf else kernel.reshape(kernel.shape[0], -1).T
        np.testing.assert_array_equal(kernel, state[hf], err_msg=hf)


def test_scores_of_real_text(ours, theirs, text):
    tokens, mask = text
    expected, found = hf_scores(theirs, tokens, mask), our_scores(*ours, tokens, mask)
    assert np.abs(expected[mask == 1]).max() > 20
    np.testing.assert_allclose(found[mask == 1], expected[mask == 1], atol=1e-3, rtol=0)


def test_greedy_generation_with_a_cache(ours, theirs, tokenizer):
    import torch

    prompts = ["The capital of France is", "def fibonacci(n):\n    "]
    ids = [tokenizer.encode(p).ids.tolist() for p in prompts]
    (end,) = {theirs.generation_config.eos_token_id}
    found = generate(*ours, ids, max_new_tokens=40, temperature=0.0, stop=frozenset({end}))
    for prompt, continuation in zip(ids, found, strict=True):
        attended = torch.ones(1, len(prompt), dtype=torch.long)
        made = theirs.generate(torch.tensor([prompt]), attention_mask=attended, max_new_tokens=40, do_sample=False)
        # transformers keeps the token that ended the text.
        assert [i for i in made[0, len(prompt) :].tolist() if i != end] == continuation
        assert len(continuation) > 20


def test_student_cut_from_the_teacher_loads_in_transformers(ours, tokenizer, text, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    # Depth and all widths: 432 channels, which 6 query heads divide, as transformers wants it.
    target = Target(layers=KEPT, embed=432, heads=6, mlp=1000)
    config, params = prune_model(*ours, choose(ours[0], random_importance(ours[0], 0), target))
    folder = write_hf(
        tmp_path / "student", config, params, dtype="float32", tokenizer=tokenizer, max_shard_bytes=100_000_000
    )
    tokens, mask = text
    student = hf_model(folder)
    assert sum(p.numel() for p in student.parameters()) == sum(leaf.size for leaf in jax.tree.leaves(params))
    np.testing.assert_allclose(
        our_scores(config, params, tokens, mask)[mask == 1], hf_scores(student, tokens, mask)[mask == 1], atol=1e-3
    )
    sentence = "Ünïcode, 数字 and\n\tcode: x += 1"
    assert AutoTokenizer.from_pretrained(folder)(sentence)["input_ids"] == tokenizer.encode(sentence).ids.tolist()
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.bos_token_id, generation.pad_token_id) == (tokenizer.special.bos, tokenizer.special.pad)
    assert set(generation.eos_token_id) == tokenizer.special.stop
    shutil.rmtree(folder)
