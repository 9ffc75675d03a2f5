"""The search: which shapes are tried, what a budget means, ranks and fronts, and going on after an interruption."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from tiny import LAYOUTS, llama, params
from train.train_cases import TEACHER, Files, poisoned
from train.train_cases import run as on_one_device

from jaxdistill import search as search_module
from jaxdistill.checkpoint.model import save_model
from jaxdistill.losses.alm import ALM
from jaxdistill.losses.hidden import HiddenMatch
from jaxdistill.models.cost import Workload
from jaxdistill.models.schema import count_parameters
from jaxdistill.prune import depth as depth_module
from jaxdistill.prune.baselines import random_importance
from jaxdistill.prune.choose import Target, equal_importance
from jaxdistill.prune.measure import RandomScores
from jaxdistill.prune.plan import PrunePlan
from jaxdistill.report.charts import front_chart
from jaxdistill.report.search import Candidate, pareto_front, search_table
from jaxdistill.search import Budget, Grid, SearchConfig, feasible, search, unit
from jaxdistill.tokenizers import load_tokenizer
from jaxdistill.train.config import StudentConfig, TeacherConfig

SMOLLM2 = llama(vocab=49152, embed=576, layers=30, heads=9, kv_heads=3, mlp=1536)
LLAMA8B = llama(vocab=128256, embed=4096, layers=32, heads=32, kv_heads=8, mlp=14336)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("search")).write()


def searched(config: SearchConfig) -> list[Candidate]:
    return on_one_device(config, job=search)


def test_default_sizes_are_those_that_can_be_written():
    """Multiples of the heads (transformers asks for them), down to the shares that may be cut."""
    sizes = {axis: {getattr(t, axis) for t in Grid().targets(SMOLLM2)} for axis in ("layers", "embed", "mlp")}
    assert sizes["layers"] == {24, 26, 28, 30}
    assert sizes["embed"] == {360, 396, 432, 468, 504, 540, 576}
    assert sizes["mlp"] == {*range(960, 1537, 64)}
    assert all(size % 9 == 0 for size in sizes["embed"])
    large = {axis: {getattr(t, axis) for t in Grid().targets(LLAMA8B)} for axis in ("embed", "mlp")}
    assert large["embed"] == {*range(2560, 4097, 256)}  # ModelOpt's divisors
    assert large["mlp"] == {*range(8704, 14337, 512)}


def test_default_sizes_are_those_that_devices_divide():
    eight = LAYOUTS["fsdp 8"]()
    assert {t.embed for t in Grid().targets(SMOLLM2, eight)} == {360, 432, 504, 576}
    shape = llama(vocab=64, embed=576, layers=2, heads=9, kv_heads=3, mlp=96)
    assert {t.mlp for t in Grid().targets(shape, LAYOUTS["embed over tensor"]())} == {
        60,
        64,
        68,
        72,
        76,
        80,
        84,
        88,
        92,
        96,
    }
    odd = dataclasses.replace(SMOLLM2, embed=577)
    assert {*Grid().targets(odd, eight)} == {*Grid().targets(odd)}, "what is not divided anyway stays so"


def test_a_search_leaves_out_what_its_mesh_does_not_divide(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search_module, "_distilled", lambda config, directory, plan: (2.0, 1.0))
    grid = Grid(layers=(3,), embed=(12, 16), mlp=(8, 16))
    ranked = on_one_device(drawn(files.searching(tmp_path, grid=grid)), job=search, devices=8)
    assert {row.name for row in ranked} == {"layers3-embed16-mlp16", "layers3-embed16-mlp8"}
    printed = capsys.readouterr().err
    assert "2 of the grid's shapes are left out, such as layers3-embed12-mlp8: embed would be 12" in printed
    none = dataclasses.replace(files.searching(tmp_path / "none"), grid=Grid(layers=(3,), embed=(12,)))
    with pytest.raises(ValueError, match=r"no shape of the grid can be made; give other sizes .* another train\.mesh"):
        on_one_device(none, job=search, devices=8)


def drawn(config: SearchConfig, **chosen) -> SearchConfig:
    """The search with random scores."""
    student = dataclasses.replace(config.train.student, scorer=RandomScores(), calibration_batches=1, **chosen)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, student=student))


def test_one_size_for_all_is_no_default_where_layers_differ():
    layer = SMOLLM2.layers[0]
    thin = dataclasses.replace(layer, ffn=dataclasses.replace(layer.ffn, mlp=64))
    mixed = dataclasses.replace(SMOLLM2, layers=(thin, *SMOLLM2.layers[1:]))
    targets = list(Grid(embed=(576,)).targets(mixed))
    assert {t.mlp for t in targets} == {None}
    assert mixed in [t.resize(mixed) for t in targets]
    assert {t.mlp for t in Grid(embed=(576,), mlp=(32,)).targets(mixed)} == {32}


UNEQUAL = tuple(
    dataclasses.replace(llama().layers[0], ffn=dataclasses.replace(llama().layers[0].ffn, mlp=mlp))
    for mlp in (8, 8, 32, 32)
)


@pytest.mark.parametrize("depth", ["scorer", "kl", "block-by-loss"])
def test_costs_are_those_of_the_layers_that_stay(files, tmp_path, monkeypatch, depth):
    """The layers that are worth most, in every way to choose them, are the widest: the first ones would fit."""
    original = llama(vocab=264, layers=4)
    original = dataclasses.replace(original, layers=UNEQUAL)
    save_model(tmp_path / "teacher", original, params(original), write_tokenizer=load_tokenizer("bytes").save)
    monkeypatch.setattr(search_module, "_distilled", lambda config, directory, plan: (2.0, 1.0))
    monkeypatch.setattr(
        RandomScores,
        "__call__",
        lambda self, text: dataclasses.replace(equal_importance(text.config), layers=np.arange(4.0)),
    )
    monkeypatch.setattr(depth_module, "layers_when_dropped", lambda text, *, by: np.arange(4.0))
    monkeypatch.setattr(depth_module, "best_window", lambda text, keep, *, by: tuple(range(4 - keep, 4)))
    given = drawn(files.searching(tmp_path / "out", grid=Grid(layers=(2, 3, 4), embed=(8, 16))), depth=depth)
    given = dataclasses.replace(
        given, train=dataclasses.replace(given.train, teacher=TeacherConfig(path=str(tmp_path / "teacher")))
    )
    given = dataclasses.replace(
        given, budget=Budget(parameters=count_parameters(Target(layers=3).resize(original)) + 1)
    )
    ranked = searched(given)
    limit = given.budget.absolute(original)["parameters"]
    assert {row.name for row in ranked} == {"layers2-embed16", "layers4-embed8", "layers3-embed8"}
    for row in ranked:
        plan = PrunePlan.load(row.plan)
        assert plan.layers == tuple(range(4 - len(plan.layers), 4))
        assert row.costs["parameters"] == count_parameters(plan.resize(original)) <= limit


def test_scores_of_others_are_measured_again(files, tmp_path, monkeypatch):
    """Those that `jaxdistill prune` left there, and those of another scorer; the same ones are used again."""
    monkeypatch.setattr(search_module, "_distilled", lambda config, directory, plan: (2.0, 1.0))
    monkeypatch.setattr(search_module, "write_text", stopped)
    given, seen = drawn(files.searching(tmp_path)), []
    plain = RandomScores.__call__
    monkeypatch.setattr(RandomScores, "__call__", lambda self, text: seen.append(self.seed) or plain(self, text))
    random_importance(TEACHER, 7).save(tmp_path / "importance.npz")
    other = dataclasses.replace(given.train.student, scorer=RandomScores(seed=5))
    other = dataclasses.replace(given, train=dataclasses.replace(given.train, student=other))
    for config in (given, given, other, given):
        with pytest.raises(KeyboardInterrupt):
            searched(config)
    assert seen == [0, 5, 0]
    assert not (tmp_path / "config.json").exists()


def stopped(*given, **named):
    raise KeyboardInterrupt


def test_the_page_says_bits_where_tokenizers_differ(files, tmp_path):
    given = files.searching(tmp_path)
    assert unit(given) == "KL to the teacher, nats per token"
    across = dataclasses.replace(given.train, losses={"alm": ALM()})
    assert unit(dataclasses.replace(given, train=across)) == "bits per byte"
    alone = dataclasses.replace(given.train, teacher=TeacherConfig())
    assert unit(dataclasses.replace(given, train=alone)) == "bits per byte"


def test_shapes_that_no_format_holds_are_left_out(files, tmp_path):
    given = files.searching(tmp_path, grid=Grid(embed=(360, 400), heads=(9,)), budget=Budget(parameters=1.0))
    exported = dataclasses.replace(given, train=dataclasses.replace(given.train, export="huggingface"), candidates=99)
    assert {t.embed for t in feasible(exported, SMOLLM2)} == {360}
    assert {t.embed for t in feasible(dataclasses.replace(given, candidates=999), SMOLLM2)} == {360, 400}


def test_candidates_are_within_every_limit_and_the_largest_come_first(files, tmp_path):
    workload = Workload(batch_size=8, prompt=1024, answer=64)
    budget = Budget(parameters=0.75, memory_mb=0.8, latency_ms=0.8, workload=workload, hardware="tpu-v5e")
    found = feasible(files.searching(tmp_path, budget=budget, grid=Grid(), candidates=7), SMOLLM2)
    whole = budget.costs(SMOLLM2)
    costs = [budget.costs(target.resize(SMOLLM2)) for target in found]
    assert len(found) == 7
    assert [c["parameters"] for c in costs] == sorted((c["parameters"] for c in costs), reverse=True)
    for cost in costs:
        assert cost["parameters"] <= 0.75 * whole["parameters"]
        assert cost["memory_mb"] <= 0.8 * whole["memory_mb"]
        assert cost["latency_ms"] <= 0.8 * whole["latency_ms"]
    absolute = Budget(parameters=0.75 * whole["parameters"])
    assert absolute.absolute(SMOLLM2) == Budget(parameters=0.75).absolute(SMOLLM2)


def test_a_budget_that_nothing_fits_says_what_the_smallest_is(files, tmp_path):
    with pytest.raises(
        ValueError, match=r"no shape of the grid fits parameters 1,125; the smallest has parameters 7140"
    ):
        feasible(files.searching(tmp_path, budget=Budget(parameters=0.1), grid=Grid()), llama(vocab=264, layers=3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Budget(), "limits nothing"),
        (lambda: Budget(parameters=-1.0), "limits are positive"),
        (lambda: Grid(max_width_pruning=1.0), "a share from 0 to below 1"),
        (lambda: Grid(mlp_divisor=0), "mlp_divisor is 0"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sizes_and_held_out_text_are_the_searchs_business(files, tmp_path):
    given = files.searching(tmp_path)
    sized = dataclasses.replace(given.train, student=StudentConfig(prune=Target(mlp=8)))
    with pytest.raises(ValueError, match="a search chooses the sizes itself"):
        dataclasses.replace(given, train=sized)
    blind = dataclasses.replace(given.train, held_out=dataclasses.replace(given.train.held_out, path=None))
    with pytest.raises(ValueError, match=r"give --train\.held-out\.path FILE"):
        search(dataclasses.replace(given, train=blind))


def test_pairs_of_layers_that_a_candidate_lacks_are_refused_before_anything_is_measured(files, tmp_path, monkeypatch):
    monkeypatch.setattr(search_module, "open_model", None)
    given = files.searching(tmp_path)
    run = dataclasses.replace(given.train, losses={"states": HiddenMatch(layers=((2, 2),))})
    with pytest.raises(ValueError, match=r"\[\(2, 2\)\]; the student has 2 layers"):
        search(dataclasses.replace(given, train=run))


def test_a_search_ranks_draws_and_goes_on_after_a_signal(files, tmp_path, monkeypatch, capsys):
    given, runs = files.searching(tmp_path), []
    plain = search_module.train

    def stopped_in_the_second(run):
        runs.append(Path(run.out).name)
        return on_one_device(run, stop_after=1) if len(runs) == 2 else plain(run)

    monkeypatch.setattr(search_module, "train", stopped_in_the_second)
    assert len(searched(given)) == 1
    assert "2 still to be tried" in (tmp_path / "search.html").read_text()
    assert "the same command goes on" in capsys.readouterr().err
    ranked = searched(dataclasses.replace(given, train=dataclasses.replace(given.train, export_dtype="bfloat16")))
    assert runs.count(runs[0]) == 1, "the first candidate was not trained again"
    assert runs.count(runs[1]) == 2
    assert [row.after for row in ranked] == sorted(row.after for row in ranked)
    assert {row["name"] for row in json.loads((tmp_path / "search.json").read_text())} == {r.name for r in ranked}
    for row in ranked:
        plan = PrunePlan.load(row.plan)
        shape = plan.resize(llama(layers=3, vocab=264))
        assert row.costs["parameters"] == count_parameters(shape)
        assert not (tmp_path / "candidates" / row.name / "checkpoints").exists()
    printed = capsys.readouterr().err
    assert "rank before" in printed
    assert str(tmp_path / "search.html") in printed
    with pytest.raises(ValueError, match="1 fields differ"):
        searched(dataclasses.replace(given, budget=Budget(parameters=0.8)))


def test_a_candidate_that_diverges_is_ranked_last_and_not_tried_again(files, tmp_path, monkeypatch):
    given = files.searching(tmp_path, candidates=2)
    run = dataclasses.replace(given.train, losses=poisoned(1, 2), stop_after_skipped=1)
    given = dataclasses.replace(given, train=run)
    first = searched(given)
    assert [row.after for row in first] == [math.inf, math.inf]
    monkeypatch.setattr(search_module, "train", None)
    assert searched(given) == first
    assert "diverged" in (tmp_path / "search.html").read_text()


def test_a_first_attempt_that_measured_nothing_locks_nothing(files, tmp_path):
    given = files.searching(tmp_path, candidates=1)
    wrong = dataclasses.replace(given.train, data=dataclasses.replace(given.train.data, path="nowhere.jsonl"))
    with pytest.raises(Exception, match="nowhere"):
        searched(dataclasses.replace(given, train=wrong))
    assert len(searched(given)) == 1


def test_heads_that_no_group_divides_are_left_out():
    targets = list(Grid(heads=(9, 6), kv_heads=(3, 2)).targets(SMOLLM2))
    assert {(t.heads, t.kv_heads) for t in targets} == {(9, 3), (6, 3), (6, 2)}


def test_the_front_is_what_nothing_beats():
    assert pareto_front([(3, 1.0), (1, 3.0), (2, 3.5), (2, 2.0), (4, 1.0)]) == [1, 3, 0]
    rows = [Candidate(name="a", plan="p", costs={"parameters": 10.0}, before=2.0, after=1.0)]
    line = search_table(rows, limited=("parameters",)).splitlines()[1]
    assert line.split() == ["1", "a", "10", "2.0000", "1", "1.0000"]
    assert front_chart("t", "u", [], front=[], x_title="x") == ""
    assert "<polyline" in front_chart("t", "u", [("a", 10.0, 2.0, 1.0)], front=[0], x_title="x")
