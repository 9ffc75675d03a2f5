"""From a configuration to what the loop needs: mesh, teacher, student, data, compiled steps."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill import partition
from jaxdistill.checkpoint.open import Model, open_config, open_model
from jaxdistill.data.aligned import following_ids
from jaxdistill.formats.paths import any_path, cache_directory
from jaxdistill.losses.aligned import Ends, check_terms_on_pairs
from jaxdistill.losses.alm import ALM
from jaxdistill.losses.chunked import default_chunk
from jaxdistill.losses.hidden import HiddenMatch, hidden_taps
from jaxdistill.losses.pairs import MinED
from jaxdistill.losses.router import RouterBalance, RouterZ
from jaxdistill.losses.terms import CrossEntropy, ForwardKL, Term, TopOneAgreement
from jaxdistill.models.decoder import Execution, apply
from jaxdistill.models.export import check_exportable
from jaxdistill.models.flops import adapter_flops, forward_flops, training_flops
from jaxdistill.models.lora import Lora, adapted, adapted_kernels, adapter_shardings, init_adapters
from jaxdistill.models.schema import init_params, param_shardings, weights
from jaxdistill.objective import AnyTerm
from jaxdistill.optimizer import side_by_side
from jaxdistill.prune.choose import choose, equal_importance
from jaxdistill.prune.depth import with_depth
from jaxdistill.prune.measure import Calibration, Progress, calibrate
from jaxdistill.prune.plan import PrunePlan
from jaxdistill.prune.slice import plan_cut, prune_model
from jaxdistill.retokenize import carried_ids, check_suffixes, retokenize_model
from jaxdistill.sharding import Layout, make_mesh, put_batch, put_global_batch
from jaxdistill.specs import MixtureOfExperts, ModelConfig
from jaxdistill.step import init_state, make_eval_step, make_train_step, state_shardings
from jaxdistill.tokenizers import Tokenizer, load_tokenizer
from jaxdistill.train.config import StudentConfig, TrainConfig
from jaxdistill.types import Batch, Outputs, Params, Tap, TrainState, as_batch


@dataclasses.dataclass(frozen=True)
class Places:
    """The mesh of a run, and where student and teacher live on it."""

    student: Layout
    teacher: Layout

    @classmethod
    def of(cls, config: TrainConfig) -> Places:
        if jax.device_count() == 1:
            return cls(Layout(), Layout())
        mesh = make_mesh(config.mesh)
        return cls(Layout(mesh, config.student.rules), Layout(mesh, config.teacher.rules))


@dataclasses.dataclass(frozen=True)
class Student:
    """What learns: its shape, the leaves that are trained (adapters among them), those that are not, and the tokenizer.

    Frozen leaves may be the teacher's own arrays.
    """

    config: ModelConfig
    trainable: Params
    frozen: Params
    tokenizer: Tokenizer
    plan: PrunePlan | None
    """What was kept of the model it was made from; None when it is whole or fresh."""
    lora: Lora | None
    moved: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Where the rows of its embedding come from, and how many, where it was moved to another tokenizer."""


def enable_compilation_cache(choice: str | None) -> None:
    """Keeps compiled programs on disk, so that a second run of the same shapes starts at once."""
    if choice == "none":
        return
    directory = Path(choice) if choice else cache_directory() / "xla"
    directory.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", os.fspath(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def join_processes(config: TrainConfig) -> None:
    """Joins the processes of a pod or cluster, once, where the configuration asks for it."""
    if config.processes == "automatic" and not jax.distributed.is_initialized():
        jax.distributed.initialize()


def open_teacher(config: TrainConfig, places: Places) -> Model | None:
    """The teacher, or None when the run trains on text alone."""
    if config.teacher.path is None:
        return None
    return open_model(config.teacher.path, layout=places.teacher, dtype=jnp.dtype(config.teacher.parameter_dtype))


def make_student(
    config: TrainConfig,
    teacher: Model | None,
    places: Places,
    *,
    plan: PrunePlan | None = None,
    progress: Progress = lambda done, total: None,
) -> Student:
    """The student at step 0: fresh, or (a part of) a model on disk or the teacher.

    plan: what is kept, where that is known from before.
    """
    chosen = config.student
    if chosen.model is not None:
        params = init_params(chosen.model, jax.random.key(config.seed), places.student)
        tokenizer = _fresh_tokenizer(chosen, teacher.tokenizer if teacher else None)
        return _partitioned(config, places.student, chosen.model, params, tokenizer)
    source, layout = teacher, places.teacher
    if chosen.path is not None and not _shares_teacher(chosen, config.teacher.path):
        source, layout = open_model(chosen.path, layout=places.student), places.student
    assert source is not None, "TrainConfig.check requires a model"
    plan = plan or _plan(config, source, layout, progress)
    shape, params, tokenizer, moved = source.config, source.params, source.tokenizer, {}
    if plan is not None:
        shape, params = prune_model(shape, params, plan, layout=places.student, norm_repair=chosen.norm_repair)
    if chosen.moved:
        new = load_tokenizer(str(chosen.tokenizer))
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        shape, params, rows = retokenize_model(
            shape, params, tokenizer, new, key=key, layout=places.student, suffixes=chosen.suffixes
        )
        tokenizer, moved = new, rows.counts
    # Leaves that are in their places already stay where they are.
    params = jax.device_put(params, param_shardings(shape, places.student))
    borrowed = source is teacher and plan is None
    student = _partitioned(config, places.student, shape, params, tokenizer, plan=plan, borrowed=borrowed)
    return dataclasses.replace(student, moved=moved)


def _shares_teacher(chosen: StudentConfig, teacher: str | None) -> bool:
    """Whether the student's path is the teacher's, and adapters need no second copy of what is there."""
    if chosen.lora is None or chosen.path is None or teacher is None:
        return False
    return any_path(chosen.path).resolve() == any_path(teacher).resolve()


def _plan(config: TrainConfig, source: Model, layout: Layout, progress: Progress) -> PrunePlan | None:
    """What the configuration keeps of a model; None when that is all of it."""
    chosen = config.student
    if chosen.plan is not None:
        return PrunePlan.load(chosen.plan)
    if chosen.prune.changes_nothing:
        return None
    if not chosen.prune.needs_scores:
        return choose(source.config, equal_importance(source.config), chosen.prune)
    text = calibration_of(config, source, layout, progress)
    scores, target = with_depth(chosen.depth, chosen.scorer(text), chosen.prune, lambda: text)
    return choose(source.config, scores, target)


def calibration_of(config: TrainConfig, source: Model, layout: Layout, progress: Progress) -> Calibration:
    """A model with the first training batches, on which the student's settings say how its parts are measured."""
    return calibrate(
        source.config,
        source.params,
        source.tokenizer,
        config.data,
        batches=config.student.calibration_batches,
        layout=layout,
        execution=config.student.execution,
        progress=progress,
    )


def _partitioned(
    config: TrainConfig,
    layout: Layout,
    shape: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    *,
    plan: PrunePlan | None = None,
    borrowed: bool = False,
) -> Student:
    """The student of these parameters. borrowed: they are the teacher's. What is trained is donated to the step, so it
    is float32 of its own; what is frozen stays what it is."""
    chosen, lora = config.student, config.student.lora
    is_weight = weights(shape)
    trainable, frozen = partition.split(params, lambda name: chosen.trained(name) and is_weight(name))
    trainable = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=borrowed), trainable)
    if lora is not None:
        adapters = init_adapters(shape, lora, jax.random.key(config.seed), layout)
        trainable = partition.merge(trainable, adapters)
    if not trainable:
        known = ", ".join(list(partition.names(params))[:6])
        raise ValueError(f"no parameter matches student.trainable {chosen.trainable}; names are like {known}.")
    return Student(shape, trainable, frozen, tokenizer, plan, lora)


@dataclasses.dataclass(frozen=True)
class Tokenizers:
    """What the text of a run goes through. rows: for the rows that the student reads. teachers_rows: for those of the
    teacher, None where it reads the student's."""

    rows: Tokenizer
    teachers_rows: Tokenizer | None = None


def tokenizers_of(config: TrainConfig) -> Tokenizers:
    """The tokenizers of a run. Refuses terms that compare ids where student and teacher have different ones, and rows
    longer than the context of a model.

    Reads descriptions and tokenizers, no arrays.
    """
    teacher = student = None
    if config.teacher.path is not None:
        teacher = open_config(config.teacher.path), load_tokenizer(config.teacher.path)
    if config.student.path is not None:
        student = open_config(config.student.path), load_tokenizer(config.student.path)
    elif config.student.model is not None:
        student = config.student.model, _fresh_tokenizer(config.student, teacher[1] if teacher else None)
    if config.student.moved:
        source, new = student or teacher, load_tokenizer(str(config.student.tokenizer))
        assert source is not None, "TrainConfig.check requires a model"
        check_suffixes(source[0], new, suffixes=config.student.suffixes)
        student = dataclasses.replace(source[0], vocab=new.vocab_size), new
    _check_length("student", student, config.data.length, "length")
    teachers_own = config.aligned and config.data.teacher_length is not None
    rows = ("teacher_length", config.data.teacher_length) if teachers_own else ("length", config.data.length)
    _check_length("teacher", teacher, rows[1] or 0, rows[0])
    chosen = student or teacher
    assert chosen is not None, "TrainConfig.check requires a model"
    if config.aligned:
        assert teacher is not None, "TrainConfig.check requires a teacher for terms that compare with one"
        check_terms_on_pairs(config.losses, vocab=chosen[0].vocab)
        return Tokenizers(chosen[1], teacher[1])
    if teacher and student:
        _check_same_tokens(teacher, student)
    return Tokenizers((teacher or chosen)[1])


def _check_length(name: str, model: tuple[ModelConfig, Tokenizer] | None, length: int, field: str) -> None:
    if model is not None and length > model[0].max_length:
        raise ValueError(
            f"data.{field} is {length} and the {name}'s context {model[0].max_length} tokens; use rows of at most "
            f"{model[0].max_length}."
        )


def _fresh_tokenizer(chosen: StudentConfig, teachers: Tokenizer | None) -> Tokenizer:
    tokenizer = load_tokenizer(chosen.tokenizer) if chosen.tokenizer else teachers
    assert tokenizer is not None, "TrainConfig.check requires a tokenizer"
    assert chosen.model is not None
    if chosen.model.vocab < tokenizer.vocab_size:
        raise ValueError(
            f"student.model.vocab is {chosen.model.vocab} and the tokenizer has {tokenizer.vocab_size} tokens; "
            f"give the model a vocabulary of at least {tokenizer.vocab_size}."
        )
    return tokenizer


def _check_same_tokens(teacher: tuple[ModelConfig, Tokenizer], student: tuple[ModelConfig, Tokenizer]) -> None:
    if teacher[0].vocab != student[0].vocab:
        raise ValueError(
            f"the teacher's vocabulary has {teacher[0].vocab} ids and the student's {student[0].vocab}; losses on "
            "scores need the same ids. Start the student from the teacher or a model of its family, or compare texts "
            "instead of ids, with an ALM term (configs/across_tokenizers.py)."
        )
    if teacher[1].fingerprint == student[1].fingerprint:
        return
    theirs, mine = teacher[1].token_bytes(), student[1].token_bytes()
    differing = [i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b]
    if differing or len(mine) != len(theirs):
        example = f"; id {differing[0]} is {mine[differing[0]]!r} / {theirs[differing[0]]!r}" if differing else ""
        raise ValueError(
            f"student and teacher have vocabularies of {len(mine)} and {len(theirs)} tokens that differ in "
            f"{len(differing)} ids{example}. Losses on scores need the same tokens; an ALM term compares texts instead "
            "(configs/across_tokenizers.py)."
        )


def check_shapes(config: TrainConfig, plan: PrunePlan | None = None, *, layout: Layout = Layout()) -> None:
    """Refuses sizes of the student, and pairs of layers to match, that the models do not have; sizes that the student's
    layout does not divide, norms that cannot be repaired, and a student that cannot be written as it should be.

    Reads descriptions, no arrays. plan: what is kept, where that is known from before.
    """
    chosen, teacher = config.student, None if config.teacher.path is None else open_config(config.teacher.path)
    shape, known = chosen.model, True
    if shape is None:
        source = teacher if chosen.path is None else open_config(chosen.path)
        assert source is not None, "TrainConfig.check requires a model"
        if plan is None and chosen.plan is not None:
            plan = PrunePlan.load(chosen.plan)
        known = plan is not None or chosen.prune.certain(source)
        # Which parts are kept may not be known before they are measured, but how many are.
        plan = plan or choose(source, equal_importance(source), chosen.prune)
        shape, _ = plan_cut(source, plan, layout=layout, norm_repair=chosen.norm_repair)
    if chosen.moved:
        shape = dataclasses.replace(shape, vocab=load_tokenizer(str(chosen.tokenizer)).vocab_size)
    if config.export == "huggingface" and known and shape.homogeneous:
        check_exportable(shape)
    _check_adapters(chosen, shape)
    if config.teacher.correction is not None and teacher is not None and teacher.suffixes is not None:
        raise ValueError(
            "teacher.correction is set, and the teacher is a model of bytes that reads suffixes: their table is no "
            "weight. Leave the correction out, or correct such a model as a student first."
        )
    _resolved_terms(config, shape, teacher, plan)


def _check_adapters(chosen: StudentConfig, shape: ModelConfig) -> None:
    if chosen.lora is None:
        return
    names = map(".".join, adapted_kernels(shape, chosen.lora))
    both = list(filter(chosen.trained, names))
    if both:
        raise ValueError(
            f"student.trainable {chosen.trainable} and student.lora.targets {chosen.lora.targets} both name {both[0]} "
            f"({len(both)} kernels in all); a kernel is trained in full or has adapters. Name it in one of them."
        )


def _resolved_terms(
    config: TrainConfig, student: ModelConfig, teacher: ModelConfig | None, plan: PrunePlan | None
) -> dict[str, AnyTerm]:
    """The objective's terms, those on layers with the layers that they read."""
    kept = None if plan is None or config.student.path is not None else plan.layers
    terms: dict[str, AnyTerm] = dict(config.losses)
    for name, term in config.losses.items():
        if isinstance(term, HiddenMatch):
            assert teacher is not None, "TrainConfig.check requires a teacher"
            terms[name] = term.resolved(student_depth=len(student.layers), teacher_depth=len(teacher.layers), kept=kept)
        if isinstance(term, RouterBalance | RouterZ):
            terms[name] = term.resolved(
                [layer for layer, spec in enumerate(student.layers) if isinstance(spec.ffn, MixtureOfExperts)]
            )
    return terms


def _apply_student(
    config: ModelConfig,
    lora: Lora | None,
    params: Params,
    batch: Batch,
    *,
    layout: Layout,
    execution: Execution,
    taps: Mapping[str, Tap] | None = None,
) -> Outputs:
    """The model, with its adapters if it has any."""
    params = params if lora is None else adapted(params, lora)
    return apply(config, params, batch, layout=layout, execution=execution, taps=taps)


def _mapped_terms(
    terms: Mapping[str, AnyTerm], student: Tokenizer, teacher: Tokenizer, progress: Progress
) -> dict[str, AnyTerm]:
    """Terms that carry one vocabulary over to the other, with their map."""
    if not any(isinstance(term, MinED) for term in terms.values()):
        return dict(terms)
    ids = carried_ids(student, teacher, progress=progress)
    return {name: term.resolved(ids) if isinstance(term, MinED) else term for name, term in terms.items()}


class Programs:
    """The pure steps of a run, jitted for its places."""

    def __init__(
        self,
        config: TrainConfig,
        student: Student,
        teacher: Model | None,
        places: Places,
        *,
        progress: Progress = lambda done, total: None,
    ):
        correction = None if teacher is None else config.teacher.correction
        self.optimizer = config.optimizer.build(config.steps)
        if correction is not None:
            self.optimizer = side_by_side(self.optimizer, correction.optimizer.build(config.steps))
        self.terms = _resolved_terms(config, student.config, teacher.config if teacher else None, student.plan)
        if teacher is not None:
            self.terms = _mapped_terms(self.terms, student.tokenizer, teacher.tokenizer, progress)
        self.held_out_terms = held_out_terms(config, with_teacher=teacher is not None)
        self._teacher_vocab = None if teacher is None else teacher.config.vocab
        ends = {} if teacher is None else ends_of_chunks(self.terms, student.tokenizer, teacher.tokenizer)
        heads = [(student.config, places.student)] + ([(teacher.config, places.teacher)] if teacher else [])
        self.chunk = config.chunk or default_chunk(max(shape.vocab // at.split("vocab") for shape, at in heads))
        self._places, self._vocab = places, student.config.vocab
        forward = functools.partial(
            _apply_student, student.config, student.lora, layout=places.student, execution=config.student.execution
        )
        teach = None
        if teacher is not None:
            teach = functools.partial(apply, teacher.config, layout=places.teacher, execution=config.teacher.execution)
        start = functools.partial(
            init_state,
            terms=self.terms,
            optimizer=self.optimizer,
            key=jax.random.key(config.seed),
            student_embed=student.config.embed,
            teacher_embed=teacher.config.embed if teacher else student.config.embed,
        )
        everywhere = param_shardings(student.config, places.student)
        if student.lora is not None:
            adapters = adapter_shardings(student.config, student.lora, places.student)
            everywhere = partition.merge(everywhere, adapters)
        trainable, _ = partition.split(everywhere, partition.names(student.trainable).__contains__)
        learner = None if correction is None or teacher is None else teacher.params
        self._abstract = jax.eval_shape(start, student.trainable, teacher=learner)
        self.shardings = state_shardings(
            self._abstract,
            trainable,
            places.student,
            self.optimizer,
            teacher=None if learner is None or teacher is None else param_shardings(teacher.config, places.teacher),
        )
        self._start = jax.jit(start, out_shardings=self.shardings, donate_argnums=0)
        step = make_train_step(
            functools.partial(forward, taps=hidden_taps(self.terms, "student")),
            teach and functools.partial(teach, taps=hidden_taps(self.terms, "teacher")),
            self.terms,
            self.optimizer,
            chunk=self.chunk,
            accumulate=config.accumulate,
            layout=places.student,
            teacher_layout=places.teacher,
            gradient_shardings=self.shardings.params if places.student.mesh is not None else None,
            correction=None if correction is None else correction.losses,
            ends=ends,
            weighting=config.weighting,
        )
        self.train_step = jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, None))
        self.eval_step = jax.jit(
            make_eval_step(
                forward,
                teach,
                self.held_out_terms,
                chunk=self.chunk,
                layout=places.student,
                teacher_layout=places.teacher,
                ends=ends,
            )
        )
        length = config.data.length
        teachers = (config.data.teacher_length or length) if config.aligned else length
        flops = training_flops(student.config, length, frozen=partition.names(student.frozen))
        if student.lora is not None:
            tokens = config.data.batch_size * length // config.accumulate
            flops += adapter_flops(student.config, student.lora, tokens=tokens)
        if teacher is not None:
            flops += (training_flops if correction else forward_flops)(teacher.config, teachers) * teachers / length
        self.flops_per_step = config.data.batch_size * length * flops

    def start(self, trainable: Params, teacher: Params | None) -> TrainState:
        """The state before the first step. teacher: one that learns, else None. The student's leaves are donated."""
        return self._start(trainable, teacher=teacher)

    def expected_state(self) -> TrainState:
        """The state as shapes and shardings: what a checkpoint is restored into."""
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), self._abstract, self.shardings
        )

    def put(self, rows: Mapping[str, Any]) -> Batch:
        """This process's rows of a batch, on the devices."""
        return put_batch(self._places.student, self._batch(rows))

    def put_global(self, rows: Mapping[str, Any]) -> Batch:
        """Rows that every process holds, on the devices."""
        return put_global_batch(self._places.student, self._batch(rows))

    def _batch(self, rows: Mapping[str, Any]) -> Batch:
        return as_batch(rows, vocab=self._vocab, teacher_vocab=self._teacher_vocab)


def held_out_terms(config: TrainConfig, *, with_teacher: bool) -> dict[str, Term | ALM]:
    """What is measured on held-out text; across tokenizers, besides the student itself, the terms that match texts."""
    terms: dict[str, Term | ALM] = {"cross_entropy": CrossEntropy()}
    if config.aligned:
        return terms | {name: term for name, term in config.losses.items() if isinstance(term, ALM)}
    return terms | {"kl": ForwardKL(), "agreement": TopOneAgreement()} if with_teacher else terms


def ends_of_chunks(terms: Mapping[str, AnyTerm], student: Tokenizer, teacher: Tokenizer) -> dict[str, Ends]:
    """Of each `ALM` term the ids of both tokenizers that can follow the end of a chunk."""
    return {
        name: Ends(*(following_ids(tokenizer, term.white_space) for tokenizer in (student, teacher)))
        for name, term in terms.items()
        if isinstance(term, ALM)
    }
