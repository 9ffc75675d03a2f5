"""Frozen dataclasses to JSON and back: exact, and refusing by name whatever it does not know."""

import dataclasses
import json
from typing import Literal

import pytest

from jaxdistill.checkpoint.documents import from_dict, to_dict
from jaxdistill.specs import Attention, GatedMLP, LayerSpec, LinearScaling, Llama3Scaling, ModelConfig, Rope


@dataclasses.dataclass(frozen=True)
class Leaf:
    name: str = "n"
    sizes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Other:
    ratio: float


@dataclasses.dataclass(frozen=True)
class Root:
    child: Leaf | Other | None
    kind: Literal["a", "b"]
    table: dict[str, Leaf]
    pair: tuple[int, float] = (1, 2.0)
    number: int | None = None


ROOTS = [
    Root(child=None, kind="a", table={}),
    Root(child=Leaf("x", (1, 2)), kind="b", table={"k": Leaf()}, pair=(3, 4.5), number=7),
    Root(child=Other(0.1), kind="b", table={}),
]


@pytest.mark.parametrize("value", ROOTS)
def test_what_was_written_is_read_back(value):
    assert from_dict(Root, json.loads(json.dumps(to_dict(value)))) == value


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        LinearScaling(factor=2.0),
        Llama3Scaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=8192),
    ],
)
def test_a_model_configuration_is_read_back(scaling):
    layer = LayerSpec(
        mixer=Attention(heads=4, kv_heads=2, head_dim=8, rope=Rope(theta=5e5, scaling=scaling)), ffn=GatedMLP(mlp=16)
    )
    config = ModelConfig(family="llama", vocab=32, embed=16, layers=(layer,) * 2, tied=True, norm_epsilon=1e-6)
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_the_written_form_is_tagged():
    assert to_dict(Other(0.5)) == {"type": "Other", "ratio": 0.5}


def test_absent_fields_take_their_defaults_and_untagged_objects_are_read():
    assert from_dict(Leaf, {"sizes": [3]}) == Leaf("n", (3,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, r"Root has the unknown fields \['colour'\]; allowed are \['child', 'kind'"),
        ({"child": {"type": "Leaf", "size": 1}}, r"Root\.child has the unknown fields \['size'\]"),
        ({"child": {"type": "Tree"}}, r"Root\.child\.type is 'Tree'; allowed are Leaf, Other"),
        ({"child": {"type": "Other"}}, r"Root\.child lacks the fields \['ratio'\]"),
        (
            {"child": {"type": "Leaf", "sizes": [1, "2"]}},
            r"Root\.child\.sizes\.1 is '2'; allowed is .* int",
        ),
        ({"kind": "c"}, r"Root\.kind is 'c'; allowed are 'a', 'b'"),
        ({"pair": [1]}, r"Root\.pair is \[1\]; allowed is a list of 2"),
        ({"number": True}, r"Root\.number is True; allowed is a value of type int"),
        ({"number": 1.0}, r"Root\.number is 1\.0"),
        ({"table": {"k": {"type": "Other", "ratio": 1.0}}}, r"Root\.table\.k\.type is 'Other'; allowed is Leaf"),
        ({"child": 3}, r"Root\.child is 3; allowed is Leaf \| Other \| NoneType"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        from_dict(Root, to_dict(ROOTS[0]) | change)


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match=r"Root lacks the fields \['child', 'kind', 'table'\]"):
        from_dict(Root, {})


def test_what_is_no_document_is_refused():
    with pytest.raises(TypeError, match="a set cannot be written as JSON"):
        to_dict({"a": {1}})
