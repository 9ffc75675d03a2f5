"""Meshes and placements: which part of an array each device holds."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny import LAYOUTS

from jaxdistill.sharding import (
    DEFAULT_RULES,
    MESH_AXES,
    Layout,
    MeshConfig,
    Rules,
    is_axes,
    make_mesh,
    put_batch,
    put_global_batch,
)


def layout(rules=DEFAULT_RULES, **sizes):
    return Layout(make_mesh(MeshConfig(**sizes)), rules)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"fsdp": 8}),
        ({"tensor": 2}, {"fsdp": 4, "tensor": 2}),
        ({"data": -1, "fsdp": 2}, {"data": 4, "fsdp": 2}),
        ({"data": 2, "fsdp": 1, "sequence": 2, "tensor": 2}, {"data": 2, "sequence": 2, "tensor": 2}),
    ],
)
def test_the_rest_of_the_devices_goes_to_one_axis(given, expected):
    assert MeshConfig(**given).sizes(8) == dict.fromkeys(MESH_AXES, 1) | expected
    assert dict(make_mesh(MeshConfig(**given)).shape) == dict.fromkeys(MESH_AXES, 1) | expected


@pytest.mark.parametrize("given", [{"data": -1}, {"tensor": 0}, {"fsdp": -2}])
def test_impossible_sizes_are_refused(given):
    with pytest.raises(ValueError, match="at least 1, and at most one may be -1"):
        MeshConfig(**given)


@pytest.mark.parametrize("given", [{"fsdp": 4}, {"tensor": 3}, {"fsdp": 4, "tensor": 4}])
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(given):
    with pytest.raises(ValueError, match="choose sizes whose product is 8"):
        MeshConfig(**given).sizes(8)


def test_a_mesh_of_some_devices():
    mesh = make_mesh(MeshConfig(tensor=2), jax.devices()[4:])
    assert mesh.shape["fsdp"] == mesh.shape["tensor"] == 2
    assert set(mesh.devices.flat) == set(jax.devices()[4:])


@pytest.mark.parametrize(
    ("sizes", "axes", "shape", "expected"),
    [
        ({"fsdp": 4, "tensor": 2}, ("vocab", "embed"), (64, 16), P("tensor", "fsdp")),
        ({"fsdp": 4, "tensor": 2}, ("layers", "embed", "heads", "head_dim"), (3, 16, 4, 4), P(None, "fsdp", "tensor")),
        ({"fsdp": 8}, ("vocab", "embed"), (64, 16), P(None, "fsdp")),
        ({"data": 2, "fsdp": 4}, ("batch", "length"), (16, 32), P(("data", "fsdp"))),
        ({"data": 2, "fsdp": 2, "sequence": 2}, ("batch", "length"), (8, 32), P(("data", "fsdp"), "sequence")),
        # 63 is odd, 6 rows are not 8: these dimensions stay whole, the others are split all the same.
        ({"fsdp": 4, "tensor": 2}, ("vocab", "embed"), (63, 16), P(None, "fsdp")),
        ({"data": 2, "fsdp": 4}, ("batch",), (6,), P()),
        ({"fsdp": 8}, (None, "embed"), (8, 16), P(None, "fsdp")),
    ],
)
def test_specs(sizes, axes, shape, expected):
    spec = layout(**sizes).spec(axes, shape)
    # None at the end of a spec says nothing.
    assert tuple(spec) + (None,) * 4 == tuple(expected) + (None,) * (4 + len(spec) - len(expected))


def test_each_device_holds_its_part_and_no_more():
    where = layout(data=2, fsdp=2, tensor=2)
    table = np.arange(64 * 16, dtype=np.float32).reshape(64, 16)
    placed = jax.device_put(table, where.sharding(("vocab", "embed"), table.shape))
    for index, device in np.ndenumerate(where.mesh.devices):
        _, fsdp, _, tensor, _ = index
        part = next(s.data for s in placed.addressable_shards if s.device == device)
        np.testing.assert_array_equal(part, table[32 * tensor :][:32, 8 * fsdp :][:, :8])


def test_two_dimensions_over_one_mesh_axis_are_refused():
    where = layout(DEFAULT_RULES.replace(vocab="fsdp"), fsdp=8)
    with pytest.raises(ValueError, match=r"both 'vocab' and 'embed' .* over the mesh axis 'fsdp'"):
        where.spec(("vocab", "embed"), (64, 16))
    # Not split in fact: no collision.
    assert where.spec(("vocab", "embed"), (63, 16)) == P(None, "fsdp")


def test_an_axis_name_too_many_is_refused():
    with pytest.raises(ValueError, match="give one each"):
        layout().spec(("vocab", "embed"), (64,))


def test_rules_name_known_mesh_axes_only():
    with pytest.raises(ValueError, match=r"\['tensors'\]"):
        Rules({"vocab": "tensors"})
    with pytest.raises(ValueError, match=r"for the axes \['expert'\]; allowed are .*'experts'"):
        DEFAULT_RULES.replace(expert="expert")
    changed = DEFAULT_RULES.replace(vocab=("fsdp", "tensor"))
    assert DEFAULT_RULES.table["vocab"] == "tensor"
    assert changed.table["vocab"] == ("fsdp", "tensor")
    assert hash(changed) == hash(DEFAULT_RULES.replace(vocab=("fsdp", "tensor")))


def test_how_many_parts():
    where = layout(DEFAULT_RULES.replace(vocab=("fsdp", "tensor")), fsdp=4, tensor=2)
    assert (where.split("vocab"), where.split("embed"), where.split("head_dim")) == (8, 4, 1)
    assert Layout().split("vocab") == 1


def test_trees_of_axes():
    where = layout(fsdp=8)
    axes = {"a": ("embed",), "b": {"c": ("mlp", "embed")}}
    shapes = {"a": np.zeros(16), "b": {"c": np.zeros((4, 16))}}
    places = where.shardings(axes, shapes)
    assert places["a"].spec == P("fsdp")
    assert places["b"]["c"].spec == P(None, "fsdp")
    assert is_axes(("embed", None))
    assert not is_axes((np.zeros(1),))


@pytest.mark.parametrize("put", [put_batch, put_global_batch])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_batch_is_split_by_rows_and_keeps_its_values(name, put):
    where = LAYOUTS[name]()
    rows = {"tokens": np.arange(8 * 32, dtype=np.int32).reshape(8, 32), "weights": np.arange(8.0, dtype=np.float32)}
    placed = put(where, rows)
    for key, expected in rows.items():
        np.testing.assert_array_equal(placed[key], expected)
    parts = where.split("batch"), where.split("length")
    assert placed["tokens"].addressable_shards[0].data.shape == (8 // parts[0], 32 // parts[1])
