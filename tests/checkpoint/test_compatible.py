import json
from pathlib import Path

import pytest

from jaxdistill.checkpoint.compatible import check_compatible
from jaxdistill.train.config import ADDED, MAY_CHANGE, TrainConfig, as_document

SAVED = {
    "train": {"steps": 100, "learning_rate": 0.1, "tags": ["a", "b"]},
    "model": {"layers": [{"mlp": 4}, {"mlp": 8}], "tied": True},
    "losses": {"kl": {"weight": 1.0}},
}


def changed(**train):
    return SAVED | {"train": SAVED["train"] | train}


def test_the_same_configuration_is_compatible_with_its_own_json():
    check_compatible(SAVED, SAVED | {"train": SAVED["train"] | {"tags": ("a", "b")}})


def test_fields_that_may_change_may_and_their_namesakes_may_not():
    check_compatible(SAVED, changed(steps=200), may_change={"train.steps"})
    check_compatible(SAVED, changed(steps=200, learning_rate=3.0), may_change={"train"})
    with pytest.raises(ValueError, match=r"train\.steps: 100 / 200"):
        check_compatible(SAVED, changed(steps=200), may_change={"train.step", "steps"})


def test_a_field_that_is_newer_than_the_run_may_say_nothing():
    check_compatible(SAVED, changed(heads=None, sizes=()))
    with pytest.raises(ValueError, match=r"train\.heads: absent / 4"):
        check_compatible(SAVED, changed(heads=4))
    with pytest.raises(ValueError, match=r"train\.steps: 100 / None"):
        check_compatible(SAVED, changed(steps=None))


def test_a_newer_field_may_be_at_the_value_that_changes_nothing():
    check_compatible(SAVED, changed(unit="words"), added={"train.unit": "words"})
    with pytest.raises(ValueError, match=r"train\.unit: absent / 'lines'"):
        check_compatible(SAVED, changed(unit="lines"), added={"train.unit": "words"})
    with pytest.raises(ValueError, match=r"train\.steps: 100 / 200"):
        check_compatible(SAVED, changed(steps=200), added={"train.steps": 200})


def test_every_differing_field_is_listed_with_both_values():
    current = {
        "train": {"steps": 200, "learning_rate": 0.2, "tags": ["a"]},
        "model": {"layers": [{"mlp": 4}, {"mlp": 9}], "tied": True},
        "losses": {"kl": {"weight": 1.0}, "ce": {}},
    }
    with pytest.raises(ValueError, match="4 fields differ") as error:
        check_compatible(SAVED, current, may_change={"train.steps"})
    assert str(error.value).splitlines()[1:-1] == [
        "  train.learning_rate: 0.1 / 0.2",
        "  train.tags.1: 'b' / absent",
        "  model.layers.1.mlp: 8 / 9",
        "  losses.ce: absent / {}",
    ]


def test_a_run_that_was_begun_before_some_fields_existed_goes_on():
    """tests/golden/train_config.json is an older version's record of the default configuration."""
    older = json.loads((Path(__file__).parent.parent / "golden" / "train_config.json").read_text())
    now = as_document(TrainConfig(out="RUN"))
    assert older.keys() < now.keys(), "there are fields that it lacks"
    check_compatible(older, now, may_change=MAY_CHANGE, added=ADDED)
    with pytest.raises(ValueError, match="weighting: absent / 'gradient_magnitude'"):
        check_compatible(older, now | {"weighting": "gradient_magnitude"}, may_change=MAY_CHANGE, added=ADDED)
