"""Runs whose teacher has another tokenizer: from text to a student, resumed bit for bit, on a mesh; what is refused."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from tiny import llama
from tiny_tokenizers import places
from train_cases import LENGTH, ROWS, STEPS, assert_same_end, held_out_of, run, steps_of

from jaxdistill import partition
from jaxdistill.checkpoint.open import open_model
from jaxdistill.data.pipeline import DataConfig
from jaxdistill.losses.alm import ALM
from jaxdistill.losses.hidden import HiddenMatch
from jaxdistill.losses.terms import CrossEntropy, ForwardKL
from jaxdistill.models.lora import Lora
from jaxdistill.sharding import Layout, MeshConfig
from jaxdistill.specs import SuffixTable
from jaxdistill.tokenizers import load_tokenizer
from jaxdistill.train.config import Correction, StudentConfig, TeacherConfig
from jaxdistill.train.setup import Places, check_shapes, make_student, open_teacher, tokenizers_of

__all__ = ["places"]

STUDENT = llama(vocab=500, layers=2, embed=24)
LOSSES = {
    "alm": ALM(temperature=100.0, merge_threshold=None, weight=1000.0),
    "hidden": HiddenMatch(layers=((-1, -1),), distance="channelwise", weight=0.1),
    "cross_entropy": CrossEntropy(weight=0.01),
}


@pytest.fixture(scope="module")
def config(files, places):
    """A byte-level teacher and a fresh student with a byte-pair tokenizer."""

    def make(out, **changes):
        given = {
            "student": StudentConfig(model=STUDENT, tokenizer=str(places["byte_level"])),
            "data": DataConfig(path=str(files.text), length=LENGTH, teacher_length=3 * LENGTH, batch_size=ROWS),
            "losses": LOSSES,
        }
        return files.config(out, **{**given, **changes})

    return make


@pytest.fixture(scope="module")
def whole(files, config):
    out = files.root / "aligned"
    run(config(out, export="huggingface"))
    return out


def test_a_student_with_its_own_tokenizer_learns(whole, places):
    lines = steps_of(whole)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert {*lines[0]["terms"]} == {"alm", "hidden", "cross_entropy"}
    assert lines[-1]["terms"]["alm"] < lines[0]["terms"]["alm"]
    found = held_out_of(whole)
    assert {*found[0]} == {"alm", "cross_entropy_nats", "bits_per_byte"}
    assert found[STEPS]["alm"] < found[0]["alm"]
    student = open_model(whole / "student")
    assert student.config.vocab == 500
    assert student.tokenizer.fingerprint == load_tokenizer(places["byte_level"]).fingerprint


def test_bits_per_byte_count_the_students_tokens(whole, files, places):
    """Held-out documents are whole in the student's rows: their bytes but for those of first tokens."""
    tokenizer = load_tokenizer(places["byte_level"])
    texts = [json.loads(line)["text"] for line in files.held_out.read_text().splitlines()]
    encodings = tokenizer.encode_batch(texts)
    targets = sum(len(each.ids) - 1 for each in encodings)
    counted = sum(int(each.offsets[-1, 1] - each.offsets[0, 1]) for each in encodings)
    found = held_out_of(whole)[STEPS]
    np.testing.assert_allclose(
        found["bits_per_byte"], found["cross_entropy_nats"] * targets / math.log(2) / counted, rtol=1e-5
    )


def test_a_stopped_run_resumes_bit_for_bit(config, whole, tmp_path):
    stopped = run(config(tmp_path), stop_after=5)
    assert stopped.step == 5
    run(config(tmp_path))
    assert_same_end(tmp_path, whole)
    assert steps_of(tmp_path) == steps_of(whole)
    assert held_out_of(tmp_path) == held_out_of(whole)


@pytest.mark.slow
def test_a_mesh_changes_nothing(config, whole, tmp_path):
    run(config(tmp_path, mesh=MeshConfig(fsdp=4, tensor=2), accumulate=2), devices=8, stop_after=3)
    for given, expected in zip(steps_of(tmp_path), steps_of(whole), strict=False):
        np.testing.assert_allclose(given["loss"], expected["loss"], rtol=1e-4)


def test_the_whole_teacher_can_be_its_own_student(files, config, tmp_path):
    """One tokenizer on both sides: chunks of one token, and a loss of 0 where nothing was changed."""
    same = config(
        tmp_path,
        student=StudentConfig(),
        losses={"alm": ALM()},
        data=DataConfig(path=str(files.text), length=LENGTH, batch_size=ROWS),
        steps=1,
    )
    run(same)
    assert abs(held_out_of(tmp_path)[0]["alm"]) < 1e-7


@pytest.fixture(scope="module")
def moved(files, config, places):
    """The teacher moved from bytes to byte pairs, with adapters beside its own arrays."""
    student = StudentConfig(tokenizer=str(places["byte_level"]), lora=Lora(rank=2), trainable=("embedding.*", "head.*"))

    def make(out, **changes):
        return config(out, student=student, losses={"alm": LOSSES["alm"]}, **changes)

    return make


def test_a_model_moves_to_another_tokenizer(files, moved, places, tmp_path):
    out = tmp_path / "whole"
    run(moved(out, export="jaxdistill"))
    found = held_out_of(out)
    assert found[STEPS]["alm"] < found[0]["alm"]
    student = open_model(out / "student")
    new = load_tokenizer(places["byte_level"])
    assert student.config.vocab == new.vocab_size
    assert student.tokenizer.fingerprint == new.fingerprint
    run(moved(tmp_path / "stopped"), stop_after=5)
    run(moved(tmp_path / "stopped"))
    assert_same_end(tmp_path / "stopped", out)


def test_a_moved_student_begins_with_the_rows_of_the_old_tokens(files, moved, places):
    """And its layers are the teacher's arrays."""
    config = moved(files.root / "unused")
    where = Places(Layout(), Layout())
    teacher = open_teacher(config, where)
    student = make_student(config, teacher, where)
    new, old = load_tokenizer(places["byte_level"]), np.asarray(teacher.params["embedding"]["kernel"])
    rows = np.asarray(student.trainable["embedding"]["kernel"])
    for token, spelled in enumerate(new.token_bytes()):
        if token not in new.special.all.values():
            np.testing.assert_allclose(rows[token], old[list(spelled)].mean(0), rtol=1e-5, atol=1e-7)
    assert sum(student.moved.values()) == new.vocab_size
    frozen = partition.names(student.frozen)
    theirs = partition.names(teacher.params)
    assert frozen
    assert all(leaf is theirs[name] for name, leaf in frozen.items())


@pytest.mark.slow
def test_a_student_of_bytes_keeps_the_old_embedding(config, whole, tmp_path):
    """The teacher's own array, which does not learn; the student that is written reads it."""
    bytes_ = config(
        tmp_path,
        teacher=TeacherConfig(path=str(whole / "student")),
        student=StudentConfig(tokenizer="bytes", suffixes=True),
        losses={"alm": LOSSES["alm"]},
        export="jaxdistill",
        steps=2,
    )
    teacher = open_teacher(bytes_, Places(Layout(), Layout()))
    student = make_student(bytes_, teacher, Places(Layout(), Layout()))
    assert student.frozen["suffixes"]["embedding"]["kernel"] is teacher.params["embedding"]["kernel"]
    run(bytes_, stop_after=1)
    run(bytes_)
    written = open_model(tmp_path / "student")
    assert written.config.suffixes == student.config.suffixes
    jax.tree.map(np.testing.assert_array_equal, written.params["suffixes"], student.frozen["suffixes"])
    adapted = dataclasses.replace(bytes_.student, lora=Lora(rank=2), trainable=("embedding.*", "head.*"))
    with_adapters = make_student(dataclasses.replace(bytes_, student=adapted), teacher, Places(Layout(), Layout()))
    assert "suffixes" not in with_adapters.trainable
    assert all(
        leaf is theirs
        for leaf, theirs in zip(
            *map(jax.tree.leaves, (with_adapters.frozen["segments"], teacher.params["segments"])), strict=True
        )
    )
    named = dataclasses.replace(bytes_.student, trainable=("suffixes.*", "embedding.*"))
    chosen = make_student(dataclasses.replace(bytes_, student=named), teacher, Places(Layout(), Layout()))
    assert {*partition.names(chosen.trainable)} == {"suffixes.embedding.kernel", "embedding.kernel"}
    reads = TeacherConfig(path=str(tmp_path / "student"), correction=Correction(losses={"text": CrossEntropy()}))
    with pytest.raises(ValueError, match="reads suffixes: their table is no weight"):
        check_shapes(dataclasses.replace(bytes_, teacher=reads, student=StudentConfig(), losses={"kl": ForwardKL()}))
    with pytest.raises(ValueError, match="move the model that it was made from"):
        tokenizers_of(dataclasses.replace(bytes_, teacher=TeacherConfig(path=str(tmp_path / "student"))))
    with pytest.raises(ValueError, match='use the tokenizer "bytes"'):
        tokenizers_of(
            dataclasses.replace(bytes_, student=StudentConfig(tokenizer=str(whole / "student"), suffixes=True))
        )


def test_text_alone_can_train_a_moved_model(files, config, places, tmp_path):
    """Next-token training without a teacher, to compare with."""
    run(
        config(
            tmp_path,
            teacher=TeacherConfig(),
            student=StudentConfig(path=str(files.teacher), tokenizer=str(places["byte_level"])),
            losses={"cross_entropy": CrossEntropy()},
            data=DataConfig(path=str(files.text), length=LENGTH, batch_size=ROWS),
            steps=2,
        )
    )
    assert {*held_out_of(tmp_path)[2]} == {"cross_entropy_nats", "bits_per_byte"}


def test_weights_by_gradient_magnitude_run(config, tmp_path):
    run(config(tmp_path, weighting="gradient_magnitude", steps=2))
    assert all(math.isfinite(line["loss"]) for line in steps_of(tmp_path))


def test_what_is_refused(files, config, tmp_path):
    kl = config(tmp_path, losses={"kl": ForwardKL()}, data=DataConfig(path=str(files.text), length=LENGTH))
    with pytest.raises(ValueError, match=r"the student's 500; losses on scores need .* with an ALM term"):
        tokenizers_of(kl)
    with pytest.raises(ValueError, match=r"data.teacher_length is set and no loss compares two tokenizations"):
        dataclasses.replace(kl, data=DataConfig(path="x", teacher_length=3)).check()
    with pytest.raises(ValueError, match=r"\['alm', 'hidden'\] compare the student with a teacher and there is none"):
        config(tmp_path, teacher=TeacherConfig()).check()
    with pytest.raises(ValueError, match=r"data.teacher_length is 9999 and the teacher's context 2048"):
        tokenizers_of(config(tmp_path, data=DataConfig(path="x", length=8, teacher_length=9999)))
    with pytest.raises(ValueError, match="weighting is 'norms'; allowed are fixed, gradient_magnitude"):
        config(tmp_path, weighting="norms")
    frozen = StudentConfig(tokenizer="bytes", lora=Lora(rank=2))
    with pytest.raises(ValueError, match=r"makes a new embedding.* it would never learn"):
        config(tmp_path, student=frozen).check()
    with pytest.raises(ValueError, match='give tokenizer="bytes" too'):
        StudentConfig(suffixes=True)
    with pytest.raises(ValueError, match="no Hugging Face format can hold; give --export jaxdistill"):
        config(tmp_path, student=StudentConfig(tokenizer="bytes", suffixes=True), export="huggingface").check()
    with pytest.raises(ValueError, match="leave it out"):
        StudentConfig(model=dataclasses.replace(STUDENT, suffixes=SuffixTable(vocab=3, nodes=9)), tokenizer="bytes")
    with pytest.raises(ValueError, match=r"\['kl'\] are ALM terms under names"):
        config(tmp_path, losses={"kl": ALM()})
    balanced = LOSSES | {"hidden": HiddenMatch(layers=((-1, -1),), balance="alm")}
    with pytest.raises(ValueError, match="both set its size"):
        config(tmp_path, losses=balanced, weighting="gradient_magnitude")
    with pytest.raises(ValueError, match="the student has 2 layers and the teacher 3"):
        check_shapes(config(tmp_path, losses={"hidden": HiddenMatch(layers=((0, 7),)), "alm": ALM()}))
