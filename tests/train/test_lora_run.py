"""Runs that train adapters: what they share with the teacher, resume, and give back."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import llama
from train_cases import ROWS, STEPS, assert_same_end, held_out_of, run, saved, steps_of

from jaxdistill import partition
from jaxdistill.checkpoint.compatible import check_compatible
from jaxdistill.checkpoint.open import open_model
from jaxdistill.data.packing import to_arrays
from jaxdistill.losses.terms import CrossEntropy
from jaxdistill.models.lora import Lora
from jaxdistill.optimizer import AdamW, WarmupCosine
from jaxdistill.prune.choose import Target
from jaxdistill.sharding import DEFAULT_RULES, MeshConfig
from jaxdistill.train.config import MAY_CHANGE, Correction, StudentConfig, TeacherConfig, as_document
from jaxdistill.train.loop import train
from jaxdistill.train.setup import Places, Programs, make_student, open_teacher

LORA = Lora(rank=4, scale=8.0)
ADAPTING = {"student": StudentConfig(lora=LORA), "losses": {"cross_entropy": CrossEntropy()}}
"""On the text: from its teacher a student that starts as the teacher learns nothing."""


@pytest.fixture(scope="module")
def whole_lora(files):
    """A run without interruption, and what it returned."""
    out = files.root / "lora"
    return out, run(files.config(out, **ADAPTING, export="jaxdistill"))


def buffers(params) -> dict[str, tuple[int, ...]]:
    """Where in memory each shard of each leaf is."""
    return {
        name: tuple(shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards)
        for name, leaf in partition.names(params).items()
    }


def prepared(config, devices: int):
    """A run's teacher, student and programs before the first step."""
    with pytest.MonkeyPatch.context() as patch:
        if devices == 1:
            patch.setattr(jax, "device_count", lambda: 1)
        places = Places.of(config)
        teacher = open_teacher(config, places)
        student = make_student(config, teacher, places)
        return teacher, student, Programs(config, student, teacher, places)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("path", ["of the teacher", None])
def test_a_frozen_base_is_the_teachers_own_memory_and_is_never_donated(files, tmp_path, devices, path):
    """Donated memory that a teacher shares is a run-time error, a copy of it a second model."""
    config = files.config(
        tmp_path,
        teacher=TeacherConfig(path=str(files.teacher), parameter_dtype="bfloat16"),
        student=StudentConfig(path=path and str(files.teacher), lora=LORA),
        mesh=MeshConfig(fsdp=4, tensor=2),
    )
    teacher, student, programs = prepared(config, devices)
    assert buffers(student.frozen) == buffers(teacher.params)
    assert all(name.endswith(("lora_down", "lora_up")) for name in partition.names(student.trainable))
    assert {leaf.dtype for leaf in jax.tree.leaves(student.frozen)} == {jnp.dtype("bfloat16")}
    before = jax.tree.map(np.asarray, teacher.params)
    batch = programs.put(to_arrays([[]] * ROWS, config.data.length))
    state = programs.start(student.trainable, None)
    for _ in range(2):
        state, _ = programs.train_step(state, student.frozen, teacher.params, batch)
    jax.tree.map(np.testing.assert_array_equal, teacher.params, before)


@pytest.mark.slow
def test_what_is_trained_in_full_beside_adapters_is_a_copy(files, tmp_path):
    """Also where rules of its own place the student elsewhere, and where a teacher that learns is in the state, which
    is donated."""
    chosen = StudentConfig(lora=LORA, trainable=("embedding.*", "*.norm.scale"))
    teacher, student, _ = prepared(files.config(tmp_path, student=chosen), 1)
    shared = buffers(teacher.params)
    trained = {n: b for n, b in buffers(student.trainable).items() if "lora" not in n}
    assert "embedding.kernel" in trained
    assert all(name.endswith("norm.scale") for name in trained.keys() - {"embedding.kernel"})
    assert not set(trained.values()) & set(shared.values())
    assert buffers(student.frozen).items() <= shared.items()
    elsewhere = dataclasses.replace(chosen, rules=DEFAULT_RULES.replace(embed=None))
    result = run(files.config(tmp_path / "rules", student=elsewhere, steps=2), devices=8)
    assert result.step == 2
    corrected = TeacherConfig(path=str(files.teacher), correction=Correction())
    result = run(files.config(tmp_path / "corrected", teacher=corrected, student=StudentConfig(lora=LORA), steps=2))
    assert result.step == 2


def test_adapters_resume_bit_for_bit_and_alone_are_saved(files, whole_lora, tmp_path):
    out, _ = whole_lora
    config = files.config(tmp_path, **ADAPTING)
    run(config, stop_after=5)
    run(config)
    assert_same_end(tmp_path, out)
    names = [name for name in saved(tmp_path, STEPS)[0] if name.startswith(("params/student/", "opt_state"))]
    assert not [name for name in names if name.endswith(("kernel", "scale"))]
    assert [name for name in names if name.startswith("params/student/") and name.endswith("lora_up")]


@pytest.mark.slow
def test_a_mesh_trains_adapters_as_one_device_does(files, whole_lora, tmp_path):
    config = files.config(tmp_path, **ADAPTING, mesh=MeshConfig(fsdp=4, tensor=2), accumulate=2)
    run(config, devices=8)
    losses, expected = ([line["loss"] for line in steps_of(out)] for out in (tmp_path, whole_lora[0]))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_the_exported_student_is_the_base_plus_what_was_learnt(files, whole_lora, tmp_path):
    out, result = whole_lora
    held_out = held_out_of(out)
    assert held_out[0]["kl_nats"] == pytest.approx(0, abs=1e-7)  # the base, and so the teacher
    state, _ = saved(out, STEPS)
    student, teacher = open_model(result.student), open_model(files.teacher)
    assert student.config == teacher.config
    moved = 0
    for name, value in partition.names(student.params).items():
        base = np.asarray(partition.names(teacher.params)[name], np.float64)
        stem = f"params/student/{name.replace('.', '/').removesuffix('kernel')}"
        if f"{stem}lora_up" in state:
            down, up = (np.asarray(state[stem + part], np.float64) for part in ("lora_down", "lora_up"))
            layers = [np.tensordot(d, u, axes=1) for d, u in zip(down, up, strict=True)]
            moved += np.abs(layers).max()
            base = base + LORA.scale / LORA.rank * np.stack(layers)
        np.testing.assert_allclose(value, base, rtol=1e-5, atol=1e-6, err_msg=name)
    assert moved > 0
    measured = run(files.config(tmp_path, student=StudentConfig(path=str(result.student)), steps=1))
    assert measured.step == 1
    assert held_out_of(tmp_path)[0] == pytest.approx(held_out[STEPS], rel=1e-5, abs=1e-7)


@pytest.mark.slow
def test_a_pruned_student_with_adapters_learns(files, tmp_path):
    chosen = StudentConfig(prune=Target(layers=(0, 2)), lora=Lora(rank=4, targets=("*.ffn.*",)))
    rate = AdamW(learning_rate=WarmupCosine(peak=2e-3))
    result = run(files.config(tmp_path, student=chosen, optimizer=rate, export="huggingface"))
    held_out = held_out_of(tmp_path)
    assert held_out[STEPS]["kl_nats"] < held_out[0]["kl_nats"]
    assert len(open_model(result.student).config.layers) == 2


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"lora": LORA, "trainable": ("segments.*",)}, r"both name segments\.0\.mixer\.query\.kernel \(7 kernels"),
        ({"lora": Lora(targets=("*.router.*",))}, r"no kernel matches lora.targets '\*\.router\.\*'"),
    ],
)
def test_targets_that_cannot_be_are_refused_before_models_are_read(files, tmp_path, monkeypatch, student, message):
    def read(*_, **__):
        raise AssertionError("a model was read")

    monkeypatch.setattr("jaxdistill.train.setup.open_model", read)
    with pytest.raises(ValueError, match=message):
        train(files.config(tmp_path, student=StudentConfig(**student)))


def test_a_fresh_model_has_nothing_to_adapt():
    with pytest.raises(ValueError, match="nothing to adapt"):
        StudentConfig(model=llama(), lora=LORA)


def test_a_run_from_before_adapters_resumes(files, tmp_path):
    config = files.config(tmp_path)
    before = as_document(config)
    del before["student"]["lora"]
    check_compatible(before, as_document(config), may_change=MAY_CHANGE)
    adapting = dataclasses.replace(config, student=dataclasses.replace(config.student, lora=LORA))
    with pytest.raises(ValueError, match=r"student\.lora\.rank"):
        check_compatible(before, as_document(adapting), may_change=MAY_CHANGE)
