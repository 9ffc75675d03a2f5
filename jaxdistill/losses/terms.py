"""Terms of an objective: each compares a student's scores with something, position by position.

A term is a frozen dataclass of hyper-parameters with a `__call__` that returns one value per position. Write your own
in any file: the chunked head (`losses.chunked`) gives it a few positions at a time, masks, sums and divides.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class ReverseKL(Term):
        def __call__(self, student, teacher, at, parameters):
            return student.expect(student.log_probs() - teacher.log_probs())
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.losses.scores import Scores
from jaxdistill.types import Scalar, at_step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Positions:
    """What a term may know of the positions it is given, besides scores; each [position]."""

    targets: Int[Array, "position"]
    step: Int[Array, ""]
    """The train step, for hyper-parameters that are schedules (`types.at_step`)."""
    one_to_one: Bool[Array, "position"] | None = None
    """Where the teacher has another tokenizer: whether both sides' targets spell the same bytes (`losses.pairs`)."""
    known: Float[Array, "position"] | None = None
    """What the term itself returned here, where an earlier walk has asked it and this one is for the gradient. A term
    that changes what another one returns hands on None."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term(abc.ABC):
    """A named part of the objective. weight: its factor in the loss, a number or a schedule of the step.

    A mean over supervised positions is weighted, so weights need no change with batch size, length or accumulation.
    A term of weight 0 is reported and costs no gradient.
    """

    weight: Scalar = 1.0

    @abc.abstractmethod
    def __call__(
        self, student: Scores, teacher: Scores, at: Positions, parameters: Mapping[str, Any]
    ) -> Float[Array, "position"]:
        """The term's value at each position, in nats unless it says otherwise.

        Positions that are not supervised have scores of 0 here and are dropped by the caller. The teacher is never
        differentiated. `parameters` are this term's own (see `Parameterized`), {} for most.
        """


@runtime_checkable
class Parameterized(Protocol):
    """A term with parameters of its own (a projector, a learned temperature). They are trained and checkpointed with
    the student and never exported."""

    def parameters(self, key: Any, *, student_embed: int, teacher_embed: int) -> dict[str, Array]:
        """Initial values, float32. They are small: every device holds them whole."""
        ...


def forward_kl(teacher: Scores, student: Scores) -> Float[Array, "position"]:
    """KL(teacher ‖ student) in nats: Σ p_T (log p_T - log p_S).

    The normalizers stand outside the sum, so its gradient needs no second pass over the vocabulary. By how much all
    scores of one lie above the other's means nothing, and is taken off inside the sum, which would only round it.
    """
    offset = teacher.log_normalizer() - student.log_normalizer()
    shift = teacher.max() - student.max()
    gap = teacher.expect(teacher.local - student.local - shift[:, None])
    return gap + (shift - offset)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardKL(Term):
    """KL(teacher ‖ student) of the next-token distributions, the usual logit distillation (Hinton et al. 2015).

    temperature: both score sets are divided by it. The value is multiplied by temperature², which keeps the size of
    the gradient comparable between temperatures (Hinton et al., section 2); set `scale_by_square=False` for
    implementations that leave it out.
    """

    temperature: Scalar = 1.0
    scale_by_square: bool = True

    def __post_init__(self):
        if not callable(self.temperature) and not self.temperature > 0:
            raise ValueError(f"ForwardKL.temperature is {self.temperature}; it must be positive.")

    def __call__(self, student, teacher, at, parameters):
        temperature = at_step(self.temperature, at.step)
        value = forward_kl(teacher.at_temperature(temperature), student.at_temperature(temperature))
        return value * temperature**2 if self.scale_by_square else value


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossEntropy(Term):
    """-log p_S(target): next-token training on the text itself (hard labels)."""

    def __call__(self, student, teacher, at, parameters):
        return student.log_normalizer() - student.take(at.targets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherCrossEntropy(Term):
    """-log p_T(target): how well the teacher itself predicts the text. Reported, never trained."""

    weight: Scalar = 0.0

    def __call__(self, student, teacher, at, parameters):
        return teacher.log_normalizer() - teacher.take(at.targets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopOneAgreement(Term):
    """1 where student and teacher rank the same id first. Reported, never trained."""

    weight: Scalar = 0.0

    def __call__(self, student, teacher, at, parameters):
        return (student.argmax() == teacher.argmax()).astype(jnp.float32)
