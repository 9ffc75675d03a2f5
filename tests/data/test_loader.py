"""Process counts, resumes, mixtures and refusals of the loader, on small files and bytes as tokens."""

import collections
import dataclasses
import itertools
import json
import shutil
import threading

import numpy as np
import pytest

from jaxdistill.data.permutation import permuted
from jaxdistill.data.pipeline import DataConfig, Weighted, make_loader, merge_states
from jaxdistill.data.sources import JsonLines
from jaxdistill.tokenizers.byte_level import ByteTokenizer


def write_texts(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """60 texts of 0 to 90 bytes: some empty, many longer than the rows of 32."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdé "), size=rng.integers(0, 80))) for _ in range(60)]
    return write_texts(tmp_path_factory.mktemp("corpus") / "texts.jsonl", texts)


def config_for(path, **changes):
    return DataConfig(**({"path": path, "length": 32, "batch_size": 8, "seed": 3} | changes))


def loaders(config, count):
    return [make_loader(config, ByteTokenizer(), process_index=i, process_count=count) for i in range(count)]


def global_batches(parts, steps):
    found = []
    for _ in range(steps):
        local = [next(part) for part in parts]
        found.append({name: np.concatenate([batch[name] for batch in local]) for name in local[0]})
    return found


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def uninterrupted(corpus):
    """Twelve batches of one process: several epochs."""
    return global_batches(loaders(config_for(corpus), 1), 12)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_any_number_of_processes_gives_the_same_global_batches(corpus, uninterrupted, count):
    assert_equal(global_batches(loaders(config_for(corpus), count), 12), uninterrupted)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 4), (4, 2), (2, 1)])
@pytest.mark.parametrize("step", [0, 1, 7])
def test_a_resume_on_any_number_of_processes_continues_exactly(corpus, uninterrupted, before, after, step):
    first = loaders(config_for(corpus), before)
    assert_equal(global_batches(first, step), uninterrupted[:step])
    saved = json.loads(json.dumps(merge_states([part.state() for part in first])))
    assert saved["batches"] == step
    second = loaders(config_for(corpus), after)
    for part in second:
        part.restore(saved)
    assert [part.state()["shards"] for part in second] == [
        {name: saved["shards"][name] for name in part.state()["shards"]} for part in second
    ]
    assert_equal(global_batches(second, 12 - step), uninterrupted[step:])
    assert {part.state()["batches"] for part in second} == {12}
    statistics = [part.statistics for part in second]
    assert sum(each.rows for each in statistics) == 12 * 8


@pytest.mark.parametrize("seed", range(4))
def test_resuming_again_and_again_at_random_steps(corpus, uninterrupted, seed):
    rng, batches, saved = np.random.default_rng(seed), [], None
    while len(batches) < 12:
        parts = loaders(config_for(corpus), int(rng.choice([1, 2, 4])))
        for part in parts:
            if saved is not None:
                part.restore(saved)
        batches += global_batches(parts, min(int(rng.integers(1, 5)), 12 - len(batches)))
        saved = merge_states([part.state() for part in parts])
    assert_equal(batches, uninterrupted)


def test_a_running_loader_can_go_back(corpus, uninterrupted):
    (loader,) = loaders(config_for(corpus), 1)
    global_batches([loader], 2)
    saved = loader.state()
    global_batches([loader], 5)
    loader.restore(saved)
    assert_equal(global_batches([loader], 10), uninterrupted[2:])


def test_the_state_is_that_of_the_batches_given_out_not_of_those_made_ahead(corpus):
    (ahead,) = loaders(config_for(corpus, prefetch_batches=6), 1)
    (behind,) = loaders(config_for(corpus, prefetch_batches=1), 1)
    global_batches([ahead], 2)
    global_batches([behind], 2)
    assert ahead.state() == behind.state()


def test_each_epoch_holds_every_document_once_in_another_order(tmp_path):
    texts = [chr(97 + i) * 5 for i in range(12)]
    path = write_texts(tmp_path / "a.jsonl", texts)
    (loader,) = loaders(config_for(path, length=5, batch_size=4, pack=False), 1)
    epochs = [
        [bytes(row).decode() for batch in global_batches([loader], 3) for row in batch["tokens"].tolist()]
        for _ in range(3)
    ]
    assert all(sorted(epoch) == texts for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_another_seed_gives_another_order(corpus, uninterrupted):
    (other,) = global_batches(loaders(config_for(corpus, seed=4), 1), 1)
    assert (other["tokens"] != uninterrupted[0]["tokens"]).any()


def test_fewer_documents_than_shards(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", ["abc", "defg"])
    config = config_for(path, length=4, batch_size=8, pack=False)
    batches = global_batches(loaders(config, 1), 3)
    assert_equal(global_batches(loaders(config, 4), 3), batches)
    seen = collections.Counter(row[0] for batch in batches for row in batch["tokens"].tolist())
    assert seen == {ord("a"): 12, ord("d"): 12}


def test_a_mixture_keeps_its_shares_from_the_first_documents_on(tmp_path):
    sources = tuple(
        Weighted(JsonLines(write_texts(tmp_path / f"{letter}.jsonl", [letter * 3] * count)), weight)
        for letter, count, weight in (("a", 5, 5.0), ("b", 50, 3.0), ("c", 7, 2.0))
    )
    config = DataConfig(sources=sources, length=3, batch_size=8, pack=False)
    counts = collections.Counter()
    (loader,) = loaders(config, 1)
    for step, batch in enumerate(global_batches([loader], 250), start=1):
        counts.update(batch["tokens"][:, 0].tolist())
        if step >= 10:
            # Each of the 8 shards is within a few documents of its share at any time.
            for letter, share in zip(b"abc", (0.5, 0.3, 0.2), strict=True):
                assert abs(counts[letter] - share * step * 8) <= 8 * 3
    assert_equal(global_batches(loaders(config, 2), 3), global_batches(loaders(config, 1), 3))


def test_a_source_of_a_mixture_is_reshuffled_every_epoch(tmp_path):
    letters = "abcdefgh"
    path = write_texts(tmp_path / "a.jsonl", [letter * 2 for letter in letters])
    other = write_texts(tmp_path / "b.jsonl", ["zz"])
    config = DataConfig(
        sources=(Weighted(JsonLines(path)), Weighted(JsonLines(other))), length=2, batch_size=1, pack=False
    )
    (loader,) = loaders(config, 1)
    drawn = [chr(batch["tokens"][0, 0]) for batch in global_batches([loader], 64)]
    mine = [letter for letter in drawn if letter != "z"][:24]
    epochs = [mine[:8], mine[8:16], mine[16:24]]
    assert [sorted(epoch) for epoch in epochs] == [list(letters)] * 3
    assert epochs[0] != epochs[1] != epochs[2]


def test_statistics_count_what_was_given_out(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", ["abcdefghij"])  # 10 predictions with the end token
    (loader,) = loaders(config_for(path, length=4, batch_size=1, pack=False, prefetch_batches=1), 1)
    assert loader.statistics.rows == 0
    global_batches([loader], 3)
    statistics = loader.statistics
    assert (statistics.documents, statistics.split, statistics.rows) == (1, 1, 3)
    assert (statistics.tokens, statistics.supervised, statistics.positions) == (10, 10, 12)
    assert statistics.padding_fraction == pytest.approx(2 / 12)


def test_a_resume_refuses_other_settings_and_lists_them(corpus, tmp_path):
    (loader,) = loaders(config_for(corpus), 1)
    saved = loader.state()
    (other,) = loaders(config_for(corpus, length=16, seed=9), 1)
    with pytest.raises(ValueError, match=r"length: saved 32, now 16\n  seed: saved 3, now 9"):
        other.restore(saved)
    (other,) = loaders(config_for(write_texts(tmp_path / "b.jsonl", ["other"])), 1)
    with pytest.raises(ValueError, match="data: saved"):
        other.restore(saved)
    other = make_loader(config_for(corpus), ByteTokenizer(chat_template="{{ messages }}"))
    with pytest.raises(ValueError, match="chat_template: saved"):
        other.restore(saved)
    other = make_loader(config_for(corpus), ByteTokenizer(special_strings=("<eos>",)))
    with pytest.raises(ValueError, match="tokenizer: saved"):
        other.restore(saved)


def test_a_resume_refuses_a_state_without_its_shards(corpus):
    left, _ = loaders(config_for(corpus), 2)
    (whole,) = loaders(config_for(corpus), 1)
    expected = next(loaders(config_for(corpus), 1)[0])
    with pytest.raises(ValueError, match=r"lacks virtual shards 4, 5, 6, 7 of this process; it has 0, 1, 2, 3"):
        whole.restore(left.state())
    np.testing.assert_array_equal(next(whole)["tokens"], expected["tokens"])


def test_states_of_different_batches_do_not_join(corpus):
    left, right = loaders(config_for(corpus), 2)
    next(left)
    with pytest.raises(ValueError, match="differ in batches: 1 and 0"):
        merge_states([left.state(), right.state()])


def test_the_same_data_elsewhere_has_the_same_fingerprint(corpus, tmp_path):
    copy = tmp_path / "moved.jsonl"
    shutil.copy(corpus, copy)
    (loader,) = loaders(config_for(corpus), 1)
    (moved,) = loaders(config_for(str(copy)), 1)
    moved.restore(loader.state())


def test_a_template_that_writes_the_date_makes_the_same_data_on_any_day(tmp_path):
    path = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    dated = ByteTokenizer(
        chat_template="{% for m in messages %}{% if m.role == 'user' %}{{ strftime_now('%d %b %Y') }}{{ m.content }}"
        "{% else %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
    )

    def text(config):
        return bytes(t for t in next(make_loader(config, dated))["tokens"].reshape(-1) if 0 < t < 256).decode()

    given = config_for(str(path), length=32, batch_size=1, template_date="2025-03-09")
    assert text(given).startswith("09 Mar 2025HiYe")
    standard = dataclasses.replace(given, template_date=DataConfig.template_date)
    assert text(standard).startswith("26 Jul 2024HiYe")
    with pytest.raises(ValueError, match="template_date"):
        make_loader(given, dated).restore(make_loader(standard, dated).state())
    with pytest.raises(ValueError, match="'9 March'; give a day as YYYY-MM-DD"):
        dataclasses.replace(given, template_date="9 March")


def test_a_fault_in_the_data_reaches_the_consumer_each_time(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": \n')
    (loader,) = loaders(config_for(str(path)), 1)
    for _ in range(2):
        with pytest.raises(ValueError, match="line 2: not valid JSON"):
            next(loader)


def test_data_without_anything_to_learn_is_refused_and_not_searched_for_ever(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", ["", ""])
    (loader,) = loaders(config_for(path, batch_size=1), 1)
    with pytest.raises(ValueError, match="gave nothing to learn from"):
        next(loader)


def test_closing_stops_the_thread(corpus):
    (loader,) = loaders(config_for(corpus), 1)
    next(loader)
    before = sum("prefetch" in thread.name for thread in threading.enumerate())
    loader.close()
    assert sum("prefetch" in thread.name for thread in threading.enumerate()) == before - 1
    with pytest.raises(ValueError, match="closed iterator"):
        next(loader)


def test_a_dropped_loader_stops_its_thread(corpus):
    before = sum("prefetch" in thread.name for thread in threading.enumerate())
    (loader,) = loaders(config_for(corpus), 1)
    next(loader)
    del loader
    assert sum("prefetch" in thread.name for thread in threading.enumerate()) == before


@pytest.mark.parametrize(("batch_size", "shards"), [(1, 1), (8, 8), (64, 64), (96, 48), (128, 64), (67, 1), (100, 50)])
def test_the_default_number_of_virtual_shards(batch_size, shards):
    assert DataConfig(batch_size=batch_size).shards == shards


def test_process_counts_that_do_not_divide_are_refused(corpus):
    with pytest.raises(ValueError, match=r"3 processes do not divide 8 virtual shards .* are \[1, 2, 4, 8\]"):
        make_loader(config_for(corpus), ByteTokenizer(), process_count=3)
    with pytest.raises(ValueError, match="process_index is 2 of 2"):
        make_loader(config_for(corpus), ByteTokenizer(), process_index=2, process_count=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "length is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"open_rows": 0}, "open_rows is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"long_documents": "cut"}, "long_documents is 'cut'; allowed are split, truncate, drop"),
        ({"virtual_shards": 3}, r"does not divide batch_size 8. Allowed are \[1, 2, 4, 8\]"),
        ({"path": "a.txt", "sources": (Weighted(JsonLines("b.jsonl")),)}, "both given"),
    ],
)
def test_illegal_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


def test_no_data_and_illegal_weights_are_refused():
    with pytest.raises(ValueError, match="no data"):
        make_loader(DataConfig(), ByteTokenizer())
    with pytest.raises(ValueError, match=r"weight is 0\.0"):
        Weighted(JsonLines("a.jsonl"), 0.0)


def test_the_command_line_reads_a_config():
    import tyro

    config = tyro.cli(DataConfig, args=["--path", "a.jsonl", "--long-documents", "drop", "--append-eos", "False"])
    assert config == DataConfig(path="a.jsonl", long_documents="drop", append_eos=False)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000])
def test_the_shuffle_is_a_permutation(size):
    for epoch in range(3):
        assert sorted(permuted(index, size, (5, 0, epoch)) for index in range(size)) == list(range(size))


def test_the_shuffle_reaches_every_order_equally_often():
    counts = collections.Counter(
        tuple(permuted(index, 4, (5, 0, epoch)) for index in range(4)) for epoch in range(4800)
    )
    assert set(counts) == set(itertools.permutations(range(4)))
    # 200 expected of each; five standard deviations of a binomial are 69.
    assert max(abs(count - 200) for count in counts.values()) < 69


def test_the_shuffle_does_not_change_between_versions():
    # Written down when it was made: another order would break the resume of existing runs.
    assert [permuted(index, 10, (1, 2, 3)) for index in range(10)] == [9, 2, 3, 5, 6, 4, 0, 1, 7, 8]
