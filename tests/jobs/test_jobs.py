"""The commands on a tiny model, from end to end: what they write, what they print, what they leave alone."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import llama
from tiny import params as tiny_params

from jaxdistill import cli
from jaxdistill.checkpoint.model import save_model
from jaxdistill.checkpoint.open import open_model
from jaxdistill.checkpoint.run import RunCheckpoints
from jaxdistill.generate import Sampling, generate
from jaxdistill.jobs.convert import convert_model
from jaxdistill.jobs.generate import generate_text
from jaxdistill.models.export import write_hf
from jaxdistill.models.load import CheckpointInParts
from jaxdistill.models.schema import abstract_params, count_parameters, schema
from jaxdistill.tokenizers import ByteTokenizer

CONFIG = llama(vocab=261)
PARAMETERS = f"{count_parameters(CONFIG):,}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two models in our format, with the byte tokenizer."""
    directory = tmp_path_factory.mktemp("models")
    for name, seed in (("large", 0), ("small", 1)):
        rng = np.random.default_rng(seed)
        params = jax.tree.map(
            lambda x, r=rng: jnp.asarray(r.normal(size=x.shape), jnp.float32), abstract_params(CONFIG)
        )
        save_model(directory / name, CONFIG, params, write_tokenizer=ByteTokenizer().save)
    return directory


def run(capsys, *arguments) -> str:
    assert cli.run([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("to", "kind"), [("hf", "a Hugging Face directory"), ("jaxdistill", "a jaxdistill checkpoint")]
)
def test_convert_writes_the_same_model_and_says_what_it_is(saved, tmp_path, capsys, to, kind):
    printed = run(capsys, "convert", saved / "large", tmp_path / "out", "--to", to)
    assert f"{tmp_path}/out: {kind}" in printed
    assert PARAMETERS in printed
    before, after = open_model(saved / "large"), open_model(tmp_path / "out")
    assert after.config == before.config
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    assert after.tokenizer.fingerprint == before.tokenizer.fingerprint


class Interrupted(Exception):
    pass


@dataclasses.dataclass
class Reads:
    names: list[str] = dataclasses.field(default_factory=list)
    fail_at: str | None = None


@pytest.fixture
def reads(monkeypatch):
    """Names of the parts that are read of Hugging Face directories; reading fails at the one called `reads.fail_at`."""
    found = Reads()
    read = CheckpointInParts.read

    def noted(self, name, expert=None):
        if name == found.fail_at:
            raise Interrupted
        found.names.append(name)
        return read(self, name, expert)

    monkeypatch.setattr(CheckpointInParts, "read", noted)
    return found


def interrupted_conversion(reads, source, target) -> None:
    reads.fail_at = "final_norm.scale"
    with pytest.raises(Interrupted):
        convert_model(str(source), str(target), to="jaxdistill", dtype="float32")
    assert not target.exists()
    reads.fail_at = None
    reads.names.clear()


def hf_model(to, seed: int = 0):
    write_hf(to, CONFIG, tiny_params(CONFIG, seed), dtype="float32", tokenizer=ByteTokenizer())
    return to


def test_an_interrupted_conversion_goes_on(tmp_path, reads):
    source = hf_model(tmp_path / "hf")
    interrupted_conversion(reads, source, tmp_path / "out")
    convert_model(str(source), str(tmp_path / "out"), to="jaxdistill", dtype="float32")
    # The part that was in flight may not have been noted.
    assert 1 <= len(reads.names) <= 2


def test_a_conversion_of_files_that_have_changed_begins_again(tmp_path, reads):
    source = hf_model(tmp_path / "hf")
    interrupted_conversion(reads, source, tmp_path / "out")
    new = hf_model(tmp_path / "new", seed=1)
    shutil.copyfile(new / "model.safetensors", source / "model.safetensors")
    convert_model(str(source), str(tmp_path / "out"), to="jaxdistill", dtype="float32")
    expected = open_model(new).params
    jax.tree.map(np.testing.assert_array_equal, open_model(tmp_path / "out").params, expected)


def test_what_another_version_has_written_is_not_continued(tmp_path, reads, monkeypatch):
    source = hf_model(tmp_path / "hf")
    with monkeypatch.context() as patch:
        patch.setattr("jaxdistill.jobs.convert.__version__", "0.0.1")
        interrupted_conversion(reads, source, tmp_path / "out")
    convert_model(str(source), str(tmp_path / "out"), to="jaxdistill", dtype="float32")
    assert len(reads.names) == len(schema(CONFIG))


def test_convert_stores_the_dtype_that_is_asked_for(saved, tmp_path, capsys):
    printed = run(capsys, "convert", saved / "large", tmp_path / "out", "--dtype", "bfloat16")
    size = 2 * count_parameters(CONFIG)
    assert f"{size:,} bytes (11 bfloat16)" in printed


def test_inspect_tells_of_tensors_without_reading_them(saved, capsys):
    printed = run(capsys, "inspect", saved / "large", "--tensors")
    assert "layers      2\n" in printed
    assert "attention 4 heads of 4, 2 key-value heads" in printed
    assert "bos 256 '<bos>', eos 257 '<eos>', pad 258 '<pad>'" in printed
    rows = [line.split() for line in printed.splitlines()]
    assert ["embedding/kernel", "vocab,", "embed", "261x16", "float32"] in rows
    assert ["segments/0/ffn/up/kernel", "layers,", "embed,", "mlp", "2x16x32", "float32"] in rows


def test_generate_continues_the_prompt(saved, capsys):
    model = open_model(saved / "large")
    ids = list(b"Once upon")
    [made] = generate(
        model.config, model.params, [ids], max_new_tokens=5, temperature=0.0, stop=model.tokenizer.special.stop
    )
    printed = run(capsys, "generate", saved / "large", "--prompt", "Once upon", "--max-new-tokens", 5)
    assert printed == model.tokenizer.decode(ids + made) + "\n"


def test_generate_begins_with_the_token_that_texts_begin_with_if_asked(saved, capsys):
    model = open_model(saved / "large")
    for prompt, flags in (("Once upon", ["--prepend-bos"]), ("", [])):
        ids = list(prompt.encode())
        [made] = generate(
            model.config,
            model.params,
            [[model.tokenizer.special.bos, *ids]],
            max_new_tokens=5,
            temperature=0.0,
            stop=model.tokenizer.special.stop,
        )
        printed = run(capsys, "generate", saved / "large", f"--prompt={prompt}", "--max-new-tokens", 5, *flags)
        assert printed == model.tokenizer.decode(ids + made) + "\n"


def test_generate_refuses_two_beginnings(saved):
    with pytest.raises(ValueError, match="chat and prepend_bos are both set"):
        generate_text(
            str(saved / "large"), "Hi", max_new_tokens=1, sampling=Sampling(), seed=0, chat=True, prepend_bos=True
        )


def test_evaluate_prints_one_table_and_writes_the_numbers(saved, tmp_path, capsys):
    (tmp_path / "prose.txt").write_text("It was a bright cold day in April.\n")
    (tmp_path / "items.jsonl").write_text(
        json.dumps({"question": "Why?", "options": "A. yes\nB. no", "answer": "B. no"}) + "\n"
    )
    printed = run(
        capsys,
        *("evaluate", saved / "small", "--teacher", saved / "large", "--text", tmp_path / "prose.txt"),
        *("--choices", tmp_path / "items.jsonl", "--length", 64, "--out", tmp_path / "out.json"),
    )
    header, titles, *rows = printed.splitlines()
    assert "items, 1 items" in header
    assert titles.split() == ["model", "prose", "KL,", "nats", "top-1", "equal", "summed", "per", "byte"]
    assert [row.split()[0] for row in rows] == ["large", "small"]
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["teacher"] == "large"
    assert document["models"]["small"]["text"]["prose"]["tokens"] == 34
    assert document["models"]["small"]["text"]["prose"]["kl_nats"] > 0


def test_domains_come_from_a_field_and_no_more_text_is_read_than_asked_for(saved, tmp_path, capsys):
    rows = [{"text": "a" * 100, "kind": "x"}, {"text": "b" * 30, "kind": "y"}, {"text": "c" * 100, "kind": "x"}]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(
        capsys,
        *("evaluate", saved / "small", "--text", tmp_path / "mixed.jsonl", "--domain-field", "kind", "--length", 64),
        *("--bytes-per-domain", 50, "--bytes-per-document", 40, "--out", tmp_path / "out.json"),
    )
    text = json.loads((tmp_path / "out.json").read_text())["models"]["small"]["text"]
    # 40 + 10 bytes of two documents, 30 of one; the first of each document is predicted by nothing.
    assert {domain: found["bytes"] for domain, found in text.items()} == {"x": 48, "y": 29}


def test_inspect_tells_of_a_run(tmp_path, capsys):
    checkpoints = RunCheckpoints(tmp_path / "checkpoints")
    for step, metric in ((10, 0.5), (20, 0.25)):
        info = {"held_out": {"kl_nats": metric}}
        checkpoints.save(step, {"x": jnp.zeros(3)}, {}, info, metric=metric)
    checkpoints.close()
    lines = [
        {"step": 20, "tokens": 4000, "loss": 0.75},
        {"step": 20, "held_out": {"kl_nats": 0.25, "bits_per_byte": 1.5}},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"torn')
    printed = run(capsys, "inspect", tmp_path)
    for shown in (
        "step 20, 4,000 tokens, loss 0.7500",
        "step 20: kl_nats 0.2500, bits_per_byte 1.5000",
        "checkpoints  step 10, step 20",
        "best         step 20: kl_nats 0.2500",
    ):
        assert shown in printed


def test_report_writes_the_page(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "tokens": 10, "loss": 2.0}))
    assert run(capsys, "report", tmp_path) == f"{tmp_path}/report.html\n"
    assert "Training loss" in (tmp_path / "report.html").read_text()
