"""Splitting a tree by name and joining it again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdistill import partition

TREE = {"embedding": {"kernel": 1}, "segments": {"0": {"norm": {"scale": 2}, "up": {"kernel": 3}}}}

KEYS = st.sampled_from(["a", "b", "norm", "0", "scale"])
TREES = st.recursive(
    st.dictionaries(KEYS, st.integers(), min_size=1),
    lambda children: st.dictionaries(KEYS, children | st.integers(), min_size=1),
    max_leaves=12,
)


def test_names_are_dotted_paths():
    assert partition.names(TREE) == {
        "embedding.kernel": 1,
        "segments.0.norm.scale": 2,
        "segments.0.up.kernel": 3,
    }


def test_split_gives_both_parts_without_empty_branches():
    chosen, rest = partition.split(TREE, partition.matches(("*.norm.scale", "nothing")))
    assert chosen == {"segments": {"0": {"norm": {"scale": 2}}}}
    assert rest == {"embedding": {"kernel": 1}, "segments": {"0": {"up": {"kernel": 3}}}}
    assert partition.split(TREE, partition.matches(("*",))) == (TREE, {})
    assert partition.split(TREE, partition.matches(())) == ({}, TREE)


def test_patterns_respect_case_and_match_whole_names():
    is_scale = partition.matches(("*.scale",))
    assert is_scale("norm.scale")
    assert not is_scale("norm.Scale")
    assert not is_scale("norm.scale.x")
    assert not is_scale("scale")


def test_map_names_sees_every_leaf_with_its_name():
    assert partition.map_names(lambda name, leaf: f"{name}={leaf}", TREE) == {
        "embedding": {"kernel": "embedding.kernel=1"},
        "segments": {"0": {"norm": {"scale": "segments.0.norm.scale=2"}, "up": {"kernel": "segments.0.up.kernel=3"}}},
    }


@given(TREES, st.sets(KEYS))
def test_splitting_and_merging_are_inverse(tree, words):
    def chosen(name):
        return any(word in name.split(".") for word in words)

    one, other = partition.split(tree, chosen)
    assert all(chosen(name) for name in partition.names(one))
    assert not any(chosen(name) for name in partition.names(other))
    assert partition.merge(one, other) == tree == partition.nest(partition.names(tree))


def test_a_leaf_in_both_trees_is_refused():
    with pytest.raises(ValueError, match="'kernel'"):
        partition.merge(TREE, {"embedding": {"kernel": 9}})
    with pytest.raises(ValueError, match="'embedding'"):
        partition.merge(TREE, {"embedding": 9})


def test_merging_changes_neither_tree():
    one, other = {"a": {"x": 1}}, {"a": {"y": 2}}
    assert partition.merge(one, other) == {"a": {"x": 1, "y": 2}}
    assert (one, other) == ({"a": {"x": 1}}, {"a": {"y": 2}})
