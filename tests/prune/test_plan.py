"""Plans: what scores choose, how a plan is written and read, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from tiny import lacking, llama
from tiny import params as tiny_params

from jaxdistill.prune.baselines import even_importance, random_importance, worst_first
from jaxdistill.prune.choose import Target, choose
from jaxdistill.prune.importance import Importance
from jaxdistill.prune.plan import PrunePlan, depth_plan, whole_plan
from jaxdistill.prune.slice import prune_model

CONFIG = llama(layers=3, embed=8, heads=4, kv_heads=2, mlp=6)


def scores() -> Importance:
    """By hand: in every layer the neurons 5, 0, 3 lead; key-value head 1; query heads 1 and 2."""
    mlp = np.array([0.8, 0.1, 0.2, 0.7, 0.3, 0.9])
    return Importance(
        embed=np.arange(8.0),
        layers=np.array([0.5, 0.1, 0.3]),
        widths={
            "mlp": (mlp, mlp, mlp[::-1]),
            "heads": (np.array([1.0, 2.0, 4.0, 3.0]),) * 3,
            "kv_heads": (np.array([2.2, 5.0]),) * 3,
        },
    )


def test_the_highest_scores_stay_in_the_models_order():
    plan = choose(CONFIG, scores(), Target(layers=2, embed=3, mlp=2, heads=2))
    assert plan.layers == (0, 2)
    assert plan.embed == (5, 6, 7)
    assert plan.widths["mlp"] == ((0, 5), (0, 5))  # layer 2's scores are reversed
    assert plan.widths["heads"] == ((1, 2), (1, 2))  # the best of each group
    assert plan.widths["kv_heads"] == ((0, 1), (0, 1))
    smaller = plan.resize(CONFIG)
    assert (smaller.embed, len(smaller.layers), smaller.layers[0].widths) == (
        3,
        2,
        {"heads": 2, "kv_heads": 2, "mlp": 2},
    )


def test_query_heads_leave_with_their_key_value_head():
    plan = choose(CONFIG, scores(), Target(kv_heads=1))
    assert plan.widths["kv_heads"] == ((1,),) * 3
    assert plan.widths["heads"] == ((2, 3),) * 3


def test_sorted_plans_are_nested():
    """Every prefix of a sorted axis is what a smaller target keeps."""
    whole = choose(CONFIG, scores(), Target(), sort=True)
    assert whole.widths["mlp"][0] == (5, 0, 3, 4, 2, 1)
    assert whole.embed == tuple(range(7, -1, -1))
    assert whole.widths["heads"][0] == (2, 3, 1, 0)
    assert whole.widths["kv_heads"][0] == (1, 0)
    assert whole.layers == (0, 1, 2)
    for size in range(1, 9):
        assert choose(CONFIG, scores(), Target(embed=size), sort=True).embed == whole.embed[:size]
    for size in range(1, 7):
        small = choose(CONFIG, scores(), Target(mlp=size), sort=True)
        assert small.widths["mlp"][0] == whole.widths["mlp"][0][:size]


def test_layers_may_have_widths_of_their_own():
    plan = choose(CONFIG, scores(), Target(layers=2, mlp=(1, 4)))
    assert plan.widths["mlp"] == ((5,), (0, 1, 2, 5))
    assert [layer.ffn.mlp for layer in plan.resize(CONFIG).layers] == [1, 4]


def test_layers_without_attention_have_no_heads_to_merge():
    config = lacking()
    plan = choose(config, random_importance(config, 0), Target(layers=(0, 1, 3)), merge_heads=True)
    assert plan.head_partners == ((), (0, 1, 2, 3), ())
    two = tuple(dataclasses.replace(layer, ffn=None) if layer.mixer else layer for layer in config.layers[:2])
    config = dataclasses.replace(config, layers=two)
    plan = choose(config, random_importance(config, 0), Target(heads=2), merge_heads=True)
    (kept, partners) = plan.widths["heads"][1], plan.head_partners[1]
    assert [head // 2 for head in kept] == [head // 2 for head in partners] == [0, 1]
    assert not {*kept} & {*partners}
    smaller, cut = prune_model(config, tiny_params(config), plan)
    assert smaller.layers[1].mixer.heads == cut["segments"]["1"]["mixer"]["query"]["kernel"].shape[2] == 2


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target(layers=4), "layers: 4 of 3 are to be kept; choose from 1 to 3"),
        (Target(embed=0), "embed: 0 of 8 are to be kept"),
        (Target(mlp=7), "mlp of layer 0: 7 of 6 are to be kept"),
        (Target(heads=3), "3 query heads are to be kept with 2 key-value heads; .* a multiple of 2, up to 4"),
        (Target(kv_heads=3), "kv_heads: 3 of 2 are to be kept"),
        (Target(layers=2, mlp=(1, 2, 3)), "mlp gives 3 sizes for 2 kept layers"),
    ],
)
def test_sizes_that_the_model_does_not_have_are_refused(target, message):
    with pytest.raises(ValueError, match=message):
        choose(CONFIG, scores(), target)


def test_a_plan_is_a_readable_file(tmp_path):
    plan = choose(CONFIG, scores(), Target(layers=2, embed=5, mlp=3, heads=2))
    plan.save(tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["layers"] == "0 2"
    assert document["embed"] == "3-7"
    assert document["widths"]["mlp"] == ["0 3 5", "0 2 5"]
    assert PrunePlan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": "2 0"}, "in increasing order"),
        ({"layers": "0 3"}, "allowed are one or more different indices from 0 to 2"),
        ({"layers": "0 0"}, "different indices"),
        ({"embed": "0-8"}, "embed: 0-8 is to be kept; allowed are .* 0 to 7"),
        ({"embed": "a"}, "'a' is not an index"),
        ({"embed": 3}, "this is not a prune plan"),
        ({"widths": {"mlp": ["0"]}}, "mlp has 1 choices for 3 kept layers"),
        ({"widths": {"depth": ["0", "0", "0"]}}, "layer 0 has no axis 'depth'"),
        ({"widths": {}, "head_partners": ["0-3"] * 3}, "head_partners and not which query heads .* kv_heads too, or"),
        ({"head_partners": ["0-3"] * 2}, "one head for each kept query head"),
        ({"source": {"embed": 8}}, "this is not a prune plan"),
    ],
)
def test_files_that_are_no_plans_are_refused(tmp_path, change, message):
    document = whole_plan(CONFIG).to_dict() | change
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message) as caught:
        PrunePlan.load(tmp_path / "plan.json")
    assert "plan.json" in str(caught.value)


def test_query_heads_of_another_group_are_refused():
    plan = whole_plan(CONFIG)
    with pytest.raises(ValueError, match=r"number i of the heads belongs to number i // 2 of the kv_heads"):
        dataclasses.replace(plan, widths={**plan.widths, "heads": ((0, 2, 1, 3),) * 3})


def test_a_plan_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"made for a model of 3 layers, embed 8, .*mlp 6; this one has 2 layers"):
        whole_plan(CONFIG).resize(llama(layers=2, embed=8, mlp=6))


WIDE_HEADS = tuple(
    dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, head_dim=8)) for layer in CONFIG.layers
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "mistral"}, "family llama, vocab 64, .*; this one has .* family mistral, vocab 64"),
        ({"vocab": 65}, "vocab 64, .*; this one has .* vocab 65"),
        ({"layers": WIDE_HEADS}, "head_dim 4; .*; this one has .* head_dim 8"),
    ],
)
def test_a_plan_of_another_model_of_the_same_widths_is_refused(change, message):
    """Unless it was saved before plans said of which model they are."""
    other, document = dataclasses.replace(CONFIG, **change), whole_plan(CONFIG).to_dict()
    with pytest.raises(ValueError, match=message):
        PrunePlan.from_dict(document).resize(other)
    document["source"] = {name: document["source"][name] for name in ("embed", "layers")}
    old = PrunePlan.from_dict(document)
    assert old.to_dict() == document
    assert old.resize(other) == other
    with pytest.raises(ValueError, match=r"embed 8; .* this one has 3 layers, embed 16, family llama"):
        old.check(llama(layers=3))


def test_depth_plans_keep_layers_whole():
    plan = depth_plan(CONFIG, (0, 2))
    assert plan.resize(CONFIG) == dataclasses.replace(CONFIG, layers=CONFIG.layers[:2])
    with pytest.raises(ValueError, match="layers"):
        depth_plan(CONFIG, (0, 5))


def test_baselines():
    target = Target(layers=2, mlp=3)
    even = choose(CONFIG, even_importance(CONFIG, target), target)
    assert even.layers == (0, 2)
    assert even.widths["mlp"][0] == (0, 2, 5)
    worst = choose(CONFIG, worst_first(scores()), Target(mlp=2))
    assert worst.widths["mlp"][0] == (1, 2)
    one, same, other = (choose(CONFIG, random_importance(CONFIG, seed), Target(mlp=3)) for seed in (0, 0, 1))
    assert one == same != other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed": np.zeros(7)}, r"the scores of embed are for sizes \[7\] and the model has \[8\]"),
        ({"layers": np.zeros(2)}, r"the scores of layers are for sizes \[2\]"),
        ({"embed": np.full(8, np.nan)}, "the scores of embed are not finite"),
    ],
)
def test_scores_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        choose(CONFIG, dataclasses.replace(scores(), **change), Target(mlp=3))
