"""What a run starts from, measures, refuses, writes and gives back."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import llama, params
from train_cases import LENGTH, STEPS, TEACHER, checkpoints, held_out_of, metrics, poisoned, run, saved, steps_of

from jaxdistill.checkpoint.model import is_model, save_model
from jaxdistill.checkpoint.open import open_model
from jaxdistill.checkpoint.retention import Retention
from jaxdistill.data.pipeline import DataConfig, make_loader
from jaxdistill.data.sources import DataError
from jaxdistill.losses.hidden import HiddenMatch
from jaxdistill.losses.terms import CrossEntropy
from jaxdistill.models.decoder import apply
from jaxdistill.models.schema import abstract_params, init_params
from jaxdistill.optimizer import Optax
from jaxdistill.prune.baselines import weight_magnitude
from jaxdistill.prune.choose import Target, choose
from jaxdistill.prune.depth import best_window, layers_when_dropped
from jaxdistill.prune.measure import WeightMagnitude
from jaxdistill.prune.plan import depth_plan
from jaxdistill.sharding import Layout, MeshConfig
from jaxdistill.specs import Norm
from jaxdistill.tokenizers import load_tokenizer
from jaxdistill.tokenizers.byte_level import ByteTokenizer
from jaxdistill.train import loop, setup
from jaxdistill.train.config import (
    CheckpointConfig,
    HeldOutConfig,
    LogConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
    batch_divisors,
)
from jaxdistill.train.setup import Tokenizers
from jaxdistill.types import Batch, Tap, as_batch


def scores(model, tokens: np.ndarray) -> np.ndarray:
    """Next-token log-probabilities of one row, float64 [length, vocab], by the head's definition."""
    row = np.zeros((1, LENGTH), np.int32)
    row[0, : len(tokens)] = tokens
    real = (np.arange(LENGTH) < len(tokens)).astype(np.int32)[None]
    batch = Batch(
        tokens=jnp.asarray(row),
        targets=jnp.zeros_like(row),
        loss_mask=jnp.ones(row.shape),
        positions=jnp.arange(LENGTH, dtype=jnp.int32)[None],
        segment_ids=jnp.asarray(real),
        target_bytes=jnp.asarray(real),
    )
    out = jax.jit(apply, static_argnums=0)(model.config, model.params, batch)
    logits = np.asarray(out.hidden[0, : len(tokens)], np.float64) @ np.asarray(out.head.kernel, np.float64).T
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def test_held_out_values_are_those_of_a_direct_computation(files, tmp_path):
    """9 short documents of UTF-8 bytes do not fill the batch's 8 rows evenly."""
    student = open_model(run(files.config(tmp_path, export="huggingface")).student)
    teacher = open_model(files.teacher)
    texts = [json.loads(line)["text"].encode() for line in files.held_out.read_text().splitlines()]
    kl, cross_entropy, agreements, predicted = 0.0, 0.0, 0, 0
    for text in texts:
        tokens = np.frombuffer(text, np.uint8)
        assert 1 < len(tokens) <= LENGTH
        p, q = scores(teacher, tokens[:-1]), scores(student, tokens[:-1])
        kl += (np.exp(p) * (p - q)).sum()
        cross_entropy -= q[np.arange(len(tokens) - 1), tokens[1:]].sum()
        agreements += (p.argmax(-1) == q.argmax(-1)).sum()
        predicted += len(tokens) - 1
    found = held_out_of(tmp_path)[STEPS]
    np.testing.assert_allclose(found["kl_nats"], kl / predicted, rtol=1e-4)
    np.testing.assert_allclose(found["cross_entropy_nats"], cross_entropy / predicted, rtol=1e-5)
    np.testing.assert_allclose(found["bits_per_byte"], cross_entropy / np.log(2) / predicted, rtol=1e-5)
    assert found["agreement"] == agreements / predicted


def test_every_checkpoint_is_evaluated_and_the_best_is_kept(files, tmp_path):
    """Gradient ascent: the first checkpoint is the best and outlives the others."""
    config = files.config(
        tmp_path,
        optimizer=Optax(optax.sgd(-0.05)),
        held_out=HeldOutConfig(path=str(files.held_out), every=4),
        checkpoints=CheckpointConfig(every=3, retention=Retention(last=1, best=1)),
    )
    result = run(config)
    found = held_out_of(tmp_path)
    assert list(found) == [0, 3, 4, 6, 8]
    assert found[0]["kl_nats"] < found[3]["kl_nats"] < found[6]["kl_nats"] < found[8]["kl_nats"]
    assert checkpoints(tmp_path).steps() == [3, 8]
    assert checkpoints(tmp_path).best() == 3
    assert checkpoints(tmp_path).info(3)["held_out"] == found[3]
    assert result.held_out == found[8]
    assert "learning_rate" not in steps_of(tmp_path)[0]


def test_steps_that_are_not_finite_are_skipped_and_counted(files, tmp_path):
    config = files.config(
        tmp_path,
        losses=poisoned(1, 2),
        log=LogConfig(every=2, tensorboard=False),
        checkpoints=CheckpointConfig(every=1, retention=Retention(last=10)),
        steps=4,
    )
    run(config)
    assert [line.get("skipped", 0) for line in steps_of(tmp_path)] == [0, 1, 1, 0]
    lines = steps_of(tmp_path)
    assert lines[1]["loss"] is None
    assert lines[1]["terms"] == {}
    after = {step: saved(tmp_path, step)[0] for step in (1, 3, 4)}
    unchanged = [n for n in after[1] if n.startswith(("params", "opt_state"))]
    assert all(np.array_equal(after[1][n], after[3][n]) for n in unchanged)
    assert not all(np.array_equal(after[3][n], after[4][n]) for n in unchanged)
    assert after[3]["skipped"].tolist() == [2, 2]
    assert after[4]["skipped"].tolist() == [0, 2]


def test_too_many_bad_steps_stop_the_run_and_name_the_last_good_checkpoint(files, tmp_path):
    config = files.config(tmp_path, losses=poisoned(*range(4, 8)), stop_after_skipped=3)
    with pytest.raises(loop.TrainingStopped, match="3 steps in a row, up to step 7") as stopped:
        run(config)
    assert str(checkpoints(tmp_path).path(6)) in str(stopped.value)


def test_layers_of_highest_block_influence_are_kept(files, tmp_path):
    """1 - cos(input, output), averaged over the tokens of the first two training batches, by definition."""
    student = StudentConfig(prune=Target(layers=2), calibration_batches=2)
    kept = run(files.config(tmp_path, student=student, steps=1)).plan.layers
    loader = make_loader(files.config(tmp_path).data, load_tokenizer("bytes"))
    teacher = open_model(files.teacher)
    total, count = np.zeros(3), 0
    for rows in (next(loader) for _ in range(2)):
        streams = block_streams(teacher, Batch(**{k: jnp.asarray(v) for k, v in rows.items()}))
        real = rows["segment_ids"] > 0
        for layer in range(3):
            a, b = (np.asarray(streams[layer + i], np.float64) for i in (0, 1))
            cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
            total[layer] += (1 - cosine)[real].sum()
        count += real.sum()
    loader.close()
    assert kept == tuple(sorted(np.argsort(-total / count)[:2].tolist()))


def block_streams(model, batch) -> list[np.ndarray]:
    """The residual stream before the first and after each block."""

    def both(values, mask):
        return values["input"], values["output"]

    taps = {"both": Tap(points=("input", "output"), reduce=both)}
    tapped = jax.jit(lambda params, batch: apply(model.config, params, batch, taps=taps).taps)(model.params, batch)
    before, after = tapped["both"]
    return [before[0], *after]


def test_a_student_starts_from_its_own_path_and_finishes_as_a_model(files, tmp_path):
    """No learning: what comes out is what stood at `student.path`, cut to the layers asked for."""
    own = llama(vocab=264, layers=4)
    params = init_params(own, jax.random.key(5))
    save_model(tmp_path / "own", own, params, write_tokenizer=load_tokenizer("bytes").save)
    chosen = StudentConfig(path=str(tmp_path / "own"), prune=Target(layers=(1, 3)))
    config = files.config(
        tmp_path / "run", student=chosen, optimizer=Optax(optax.sgd(0.0)), steps=1, export="huggingface"
    )
    student = open_model(run(config).student)
    assert len(student.config.layers) == 2
    up = student.params["segments"]["0"]["ffn"]["up"]["kernel"]
    assert np.array_equal(up, params["segments"]["0"]["ffn"]["up"]["kernel"][jnp.array([1, 3])])
    assert student.tokenizer.fingerprint == load_tokenizer("bytes").fingerprint


def test_the_exported_student_holds_the_trained_parameters(files, whole, tmp_path):
    """Resumed copies of a finished run, exported in each way."""
    state, _ = saved(whole, STEPS)
    for export in ("huggingface", "jaxdistill"):
        out = tmp_path / export
        shutil.copytree(whole, out)
        student = open_model(run(files.config(out, export=export)).student)
        assert is_model(out / "student") == (export == "jaxdistill")
        named = {
            "params/student/" + jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(student.params)
        }
        assert named.keys() == {n for n in state if n.startswith("params/student/")}
        assert all(np.array_equal(leaf, state[name]) for name, leaf in named.items())
    assert run(files.config(whole)).student is None


def test_a_student_of_unequal_layers_trains_on_text_alone_and_exports_in_our_format(files, tmp_path, capsys):
    """And says what Hugging Face's format lacks: here, that heads divide channels."""
    layer = TEACHER.layers[0]
    wide = dataclasses.replace(layer, ffn=dataclasses.replace(layer.ffn, mlp=48))
    shape = dataclasses.replace(TEACHER, embed=18, layers=(layer, wide))
    config = files.config(
        tmp_path,
        teacher=TeacherConfig(),
        student=StudentConfig(model=shape, tokenizer="bytes"),
        losses={"cross_entropy": CrossEntropy()},
        export="huggingface",
        steps=2,
    )
    result = run(config)
    assert is_model(result.student)
    assert open_model(result.student).config == shape
    printed = capsys.readouterr().err
    assert "writing jaxdistill's format: " in printed
    assert "transformers loads a llama only if" in printed
    assert set(result.held_out) == {"cross_entropy_nats", "bits_per_byte"}


def student_of_zeros(path, tokenizer, vocab=264):
    model = llama(vocab=vocab)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_params(model))
    save_model(path, model, params, write_tokenizer=tokenizer.save)
    return StudentConfig(path=str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": DataConfig(length=32)}, "nothing to train on"),
        ({"teacher": TeacherConfig(), "student": StudentConfig()}, "no model"),
        ({"student": StudentConfig(model=llama(vocab=200))}, "vocabulary of at least 261"),
        ({"student": StudentConfig(model=llama(vocab=300))}, "264 ids and the student's 300"),
        ({"data": DataConfig(path="/nowhere.jsonl")}, "nowhere"),
        ({"held_out": HeldOutConfig(path="/nothing.txt")}, "nothing"),
        ({"log": LogConfig(wandb_project="p")}, r"pip install 'jaxdistill\[wandb\]'"),
        ({"accumulate": 3}, "nearest legal sizes are 6 or 9"),
        ({"student": StudentConfig(trainable=("typo.*",))}, "no parameter matches"),
        ({"student": StudentConfig(prune=Target(layers=(0, 7)))}, "different indices from 0 to 2"),
        ({"student": StudentConfig(prune=Target(mlp=33))}, "mlp of layer 0: 33 of 32 are to be kept"),
        ({"losses": {"states": HiddenMatch(layers=((0, 3),))}}, r"\[\(0, 3\)\]; the student has 2 layers"),
        (
            {"losses": {"states": HiddenMatch(layers=((1, 0),))}, "student": StudentConfig(prune=Target(layers=1))},
            "the student has 1 layers and the teacher 3",
        ),
        (
            {"losses": {"states": HiddenMatch(layers=((-1, 2), (1, 2)))}},
            r"the pairs \[\(1, 2\)\] more than once",
        ),
        (
            {"losses": {"states": HiddenMatch()}, "student": StudentConfig(model=llama(vocab=264))},
            "is not known; give pairs",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_models_are_read(files, tmp_path, monkeypatch, changes, message):
    if changes.get("student", StudentConfig()).trainable == ("*",):
        monkeypatch.setattr(loop, "open_teacher", None)  # reading the teacher would raise another error
    with pytest.raises((ValueError, DataError), match=message):
        run(files.config(tmp_path, **changes))


def test_pairs_of_layers_are_checked_against_a_plan_before_models_are_read(files, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "open_teacher", None)
    depth_plan(TEACHER, (0, 2)).save(tmp_path / "plan.json")
    student = StudentConfig(plan=str(tmp_path / "plan.json"))
    with pytest.raises(ValueError, match=r"\[\(2, 2\)\]; the student has 2 layers and the teacher 3"):
        run(files.config(tmp_path, student=student, losses={"states": HiddenMatch(layers=((2, 2),))}))


@pytest.mark.parametrize(
    ("chosen", "changes", "message"),
    [
        ({"prune": Target(embed=12)}, {}, "embed would be 12, which the 8 devices that split it do not divide"),
        ({"prune": Target(embed=8), "norm_repair": "exact"}, {}, "norm_repair is 'exact'"),
        (
            {"prune": Target(embed=10)},
            {"mesh": MeshConfig(fsdp=1, data=8), "export": "huggingface"},
            "transformers loads a llama only if",
        ),
    ],
)
def test_students_that_cannot_be_made_are_refused_before_models_are_read(
    files, tmp_path, monkeypatch, chosen, changes, message
):
    monkeypatch.setattr(loop, "open_teacher", None)
    if "norm_repair" in chosen:
        uncentred = dataclasses.replace(TEACHER, norm=Norm(kind="layer"))
        monkeypatch.setattr(setup, "open_config", lambda path: uncentred)
    with pytest.raises(ValueError, match=message):
        run(files.config(tmp_path, student=StudentConfig(**chosen), **changes), devices=8)


def test_a_student_is_cut_out_of_its_own_path_by_its_own_importance(files, tmp_path):
    """As in the second round of iterative pruning: the teacher stays the original."""
    own = llama(vocab=264, layers=2, mlp=24)
    values = params(own, seed=3)
    save_model(tmp_path / "own", own, values, write_tokenizer=load_tokenizer("bytes").save)
    chosen = StudentConfig(
        path=str(tmp_path / "own"), prune=Target(mlp=8), scorer=WeightMagnitude(), calibration_batches=1
    )
    config = files.config(tmp_path / "run", student=chosen)
    setup.check_shapes(config)
    student = setup.make_student(config, open_model(files.teacher), setup.Places(Layout(), Layout()))
    assert student.plan == choose(own, weight_magnitude(own, values), Target(mlp=8))
    assert student.config == Target(mlp=8).resize(own)


@pytest.mark.parametrize("depth", ["loss", "block-by-kl"])
def test_layers_of_a_student_are_chosen_by_leaving_them_out(files, tmp_path, depth):
    student = StudentConfig(prune=Target(layers=2, mlp=8), scorer=WeightMagnitude(), calibration_batches=1, depth=depth)
    config = files.config(tmp_path, student=student)
    teacher = open_model(files.teacher)
    text = setup.calibration_of(config, teacher, Layout(), lambda done, total: None)
    if depth == "loss":
        scores = layers_when_dropped(text, by="loss")
        expected = tuple(sorted(int(i) for i in np.argsort(-scores)[:2]))
    else:
        expected = best_window(text, 2, by="kl")
    chosen = setup.make_student(config, teacher, setup.Places(Layout(), Layout())).plan
    assert chosen.layers == expected


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({}, "say how many to keep with student.prune.layers"),
        ({"prune": Target(layers=(0, 1))}, "say how many to keep with student.prune.layers"),
        ({"plan": "plan.json"}, "StudentConfig.plan is given"),
    ],
)
def test_a_way_to_choose_layers_needs_their_number(files, tmp_path, chosen, message):
    with pytest.raises(ValueError, match=message):
        files.config(tmp_path, student=StudentConfig(depth="loss", **chosen)).check()


def test_a_run_without_a_directory_is_refused(files):
    with pytest.raises(ValueError, match="no run directory"):
        run(dataclasses.replace(files.config(files.root), out=""))


def test_a_directory_that_cannot_be_reached_is_refused(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="nonsense://bucket/run cannot be reached"):
        run(dataclasses.replace(files.config(files.root), out="nonsense://bucket/run"))
    assert list(tmp_path.iterdir()) == []


def test_vocabularies_that_differ_are_refused_before_models_are_read(files, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "open_teacher", None)
    renamed = ByteTokenizer(("<bos>", "<eos>", "<other>", "<|im_start|>", "<|im_end|>"))
    student = student_of_zeros(tmp_path / "renamed", renamed)
    with pytest.raises(ValueError, match="differ in 1 ids; id 258 is b'<other>' / b'<pad>'"):
        run(files.config(tmp_path / "run", student=student))
    student = student_of_zeros(tmp_path / "longer", load_tokenizer("bytes"), vocab=300)
    with pytest.raises(ValueError, match="264 ids and the student's 300"):
        run(files.config(tmp_path / "run", student=student))


def test_rows_longer_than_a_models_context_are_refused_before_models_are_read(files, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "open_teacher", None)
    data = DataConfig(path=str(files.text), length=TEACHER.max_length + 1, batch_size=8)
    with pytest.raises(ValueError, match=r"data\.length is 2049 and the teacher's context 2048"):
        run(files.config(tmp_path, data=data))


def test_a_student_that_the_run_did_not_make_is_never_given_back_as_its_own(files, tmp_path):
    (tmp_path / "student").mkdir()
    with pytest.raises(ValueError, match="has no checkpoint of the run that made it"):
        run(files.config(tmp_path, export="huggingface"))


def test_held_out_text_is_read_as_the_text_of_training_is(files, tmp_path):
    """From the same field, and with the begin token, so that a document's first byte is predicted too."""
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"body": "abc"}) + "\n")
    (tmp_path / "text.jsonl").write_text(json.dumps({"body": "some words to learn from"}) + "\n")
    data = DataConfig(
        path=str(tmp_path / "text.jsonl"), field="body", length=LENGTH, batch_size=8, prepend_bos=True, append_eos=False
    )
    config = files.config(tmp_path / "run", data=data, held_out=HeldOutConfig(path=str(held_out)))
    tokenizer = load_tokenizer("bytes")
    [batch] = loop.held_out_batches(config, Tokenizers(tokenizer))
    assert batch["targets"][batch["loss_mask"] > 0].tolist() == list(b"abc")
    assert batch["tokens"][0, :3].tolist() == [tokenizer.special.bos, *b"ab"]


def test_held_out_conversations_are_told_the_day_of_the_training_text(files, tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    data = DataConfig(path="unused", length=LENGTH, batch_size=8, template_date="2025-03-09")
    config = files.config(tmp_path / "run", data=data, held_out=HeldOutConfig(path=str(tmp_path / "held_out.jsonl")))
    dated = ByteTokenizer(
        chat_template="{% for m in messages %}{% if m.role == 'user' %}{{ strftime_now('%Y') }}"
        "{% else %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    [batch] = loop.held_out_batches(config, Tokenizers(dated))
    assert batch["tokens"][0, :4].tolist() == list(b"2025")


def test_ids_that_the_models_lack_are_refused():
    rows = {"tokens": np.array([[1, 4]]), "targets": np.array([[4, 5]])}
    with pytest.raises(ValueError, match="token id 5 and the models have 5 ids"):
        as_batch(rows, vocab=5)


@pytest.mark.parametrize(
    ("sizes", "batch", "accumulate", "length", "message"),
    [
        ({"fsdp": 8}, 12, 1, 32, "nearest legal sizes are 8 or 16"),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 6, 1, 32, "nearest legal sizes are 4 or 8"),
        ({"fsdp": 4, "tensor": 2}, 6, 2, 32, "nearest legal sizes are 8"),
        ({"sequence": 4, "fsdp": 2}, 8, 1, 30, "use a multiple of 4"),
        ({"fsdp": 8}, 16, 2, 32, None),
        ({"sequence": 4, "fsdp": 2}, 2, 1, 32, None),
    ],
)
def test_batches_that_the_mesh_does_not_divide(sizes, batch, accumulate, length, message):
    config = TrainConfig(
        out="run",
        mesh=MeshConfig(**sizes),
        data=DataConfig(batch_size=batch, length=length),
        accumulate=accumulate,
    )
    if message is None:
        return batch_divisors(config, 8)
    with pytest.raises(ValueError, match=message):
        batch_divisors(config, 8)


def test_rows_that_processes_cannot_share_are_refused():
    config = TrainConfig(out="x", mesh=MeshConfig(fsdp=1, tensor=8))
    with pytest.raises(ValueError, match=r"data 1 x fsdp 1 devices split the rows of a batch, which 2"):
        batch_divisors(config, 8, processes=2)


def test_lines_of_metrics_and_descriptions(files, whole):
    lines = [line for line in metrics(whole) if "held_out" not in line]
    assert list(lines[0]) == [
        "step",
        "tokens",
        "seconds",
        "learning_rate",
        "loss",
        "terms",
        "gradient_norm",
        "tokens_per_second",
        "floor_share",
    ]
    assert [line["tokens"] for line in lines] == [8 * LENGTH * step for step in range(1, STEPS + 1)]
    assert all(line["terms"]["kl"] == pytest.approx(line["loss"], rel=1e-5) for line in lines)
    assert all(line["loss"] > 0 for line in lines)
    assert all(line["tokens_per_second"] > 0 and line["gradient_norm"] > 0 for line in lines)
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    # Half a cosine from 1e-2 to a tenth of it over 8 steps, no warm-up: round(0.05 x 8) is 0.
    expected = [1e-2 * (0.1 + 0.45 * (1 + np.cos(np.pi * step / 8))) for step in range(8)]
    np.testing.assert_allclose([line["learning_rate"] for line in lines], expected, rtol=1e-5)
    config = json.loads((whole / "config.json").read_text())
    assert (config["type"], config["steps"], config["optimizer"]["type"]) == ("TrainConfig", STEPS, "AdamW")
    versions = json.loads((whole / "versions.json").read_text())
    assert versions["jax"] == jax.__version__


def test_the_host_waits_for_a_step_only_when_the_next_is_under_way(files, tmp_path, monkeypatch):
    events = []
    device_get, programs = jax.device_get, loop.Programs

    class Recorded(programs):
        def __init__(self, *given, **named):
            super().__init__(*given, **named)
            jitted = self.train_step

            class Lowered:
                def lower(self, *arguments):
                    return self

                def compile(self):
                    return lambda *arguments: (events.append("step"), jitted(*arguments))[1]

            self.train_step = Lowered()

    monkeypatch.setattr(loop, "Programs", Recorded)
    monkeypatch.setattr(jax, "device_get", lambda x: (events.append("read"), device_get(x))[1])
    config = files.config(
        tmp_path,
        log=LogConfig(every=100, tensorboard=False),
        held_out=HeldOutConfig(),
        checkpoints=CheckpointConfig(every=100),
        steps=4,
    )
    run(config)
    assert events == ["step", "step", "read", "step", "read", "step", "read", "read"]
