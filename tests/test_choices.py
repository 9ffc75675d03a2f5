"""A field of a configuration that holds one of a few values refuses others, and says which there are."""

import dataclasses
from typing import Literal

import pytest

from jaxdistill.choices import check_choices
from jaxdistill.data.pipeline import DataConfig
from jaxdistill.losses.alm import ALM
from jaxdistill.losses.hidden import HiddenMatch
from jaxdistill.losses.pairs import ULD
from jaxdistill.optimizer import AdamW, WarmupCosine
from jaxdistill.prune.measure import Activations
from jaxdistill.search import Budget
from jaxdistill.train.config import StudentConfig, TeacherConfig, TrainConfig


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda **wrong: TrainConfig(out="run", **wrong), ("export", "export_dtype", "processes", "weighting")),
        (StudentConfig, ("norm_repair",)),
        (TeacherConfig, ("parameter_dtype",)),
        (DataConfig, ("long_documents", "chunks")),
        (ALM, ("divergence", "denominator")),
        (HiddenMatch, ("point", "distance")),
        (ULD, ("pairing",)),
        (lambda **wrong: AdamW(learning_rate=WarmupCosine(peak=1e-4), **wrong), ("state_dtype",)),
        (Activations, ("sequence", "batch")),
        (lambda **wrong: Budget(parameters=0.5, **wrong), ("hardware",)),
    ],
)
def test_what_is_no_choice_is_refused(make, field):
    for name in field:
        with pytest.raises(ValueError, match=rf"\.{name} is 'hf'; allowed are \w"):
            make(**{name: "hf"})


def test_only_fields_that_are_choices_are_looked_at():
    @dataclasses.dataclass
    class Given:
        one: Literal["a", "b"] = "a"
        perhaps: Literal["c"] | None = None
        free: str = "anything"
        either: Literal["d"] | int = 7

    check_choices(Given())
    check_choices(Given(one="b", perhaps="c"))
    with pytest.raises(ValueError, match=r"Given\.perhaps is 'd'; allowed are c, None"):
        check_choices(Given(perhaps="d"))  # pyright: ignore[reportArgumentType]
