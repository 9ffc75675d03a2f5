"""Held-out batches: complete, exact in bytes, few shapes."""

import numpy as np
import pytest

from jaxdistill.data.evaluation import eval_batches
from jaxdistill.tokenizers.byte_level import ByteTokenizer

TEXTS = ["abcdefg", "hi", "x", "café au lait", ""]


def rows_of(batches, field):
    return [row.tolist() for batch in batches for row in batch[field]]


def test_one_window_per_row_by_hand():
    batches = eval_batches(["abcdefg", "hi"], ByteTokenizer(), length=4, batch_size=2, pack=False)
    # Windows abcd|efg and h; rows of 1, 2 and 4 positions, shortest first, the last batch of a shape filled up.
    assert [batch["tokens"].shape for batch in batches] == [(2, 1), (2, 2), (2, 4)]
    assert rows_of(batches, "tokens") == [[104], [0], [101, 102], [0, 0], [97, 98, 99, 100], [0, 0, 0, 0]]
    assert rows_of(batches, "targets") == [[105], [0], [102, 103], [0, 0], [98, 99, 100, 101], [0, 0, 0, 0]]
    assert rows_of(batches, "loss_mask") == [[1], [0], [1, 1], [0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]


def test_packed_batches_have_one_shape():
    batches = eval_batches(TEXTS, ByteTokenizer(), length=8, batch_size=2)
    assert {batch["tokens"].shape for batch in batches} == {(2, 8)}


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("length", [3, 8, 64])
def test_bytes_are_those_of_the_documents_less_their_first_tokens(pack, length):
    batches = eval_batches(TEXTS, ByteTokenizer(), length=length, batch_size=3, pack=pack)
    supervised = sum(int((batch["target_bytes"] * batch["loss_mask"]).sum()) for batch in batches)
    assert supervised == sum(max(0, len(text.encode()) - 1) for text in TEXTS)
    # With a first token to predict from, all bytes count.
    batches = eval_batches(TEXTS, ByteTokenizer(), length=length, batch_size=3, pack=pack, prepend_bos=True)
    supervised = sum(int((batch["target_bytes"] * batch["loss_mask"]).sum()) for batch in batches)
    assert supervised == sum(len(text.encode()) for text in TEXTS)


def test_packing_keeps_every_window():
    def windows(pack):
        batches = eval_batches(TEXTS * 3, ByteTokenizer(), length=5, batch_size=2, pack=pack)
        found = []
        for batch in batches:
            for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
                found += [tuple(tokens[segments == segment]) for segment in range(1, segments.max() + 1)]
        return sorted(found)

    assert windows(True) == windows(False)


def test_the_first_windows_of_each_document():
    batches = eval_batches(["abcdefghijkl", "hi"], ByteTokenizer(), length=4, batch_size=8, windows_per_document=2)
    targets = np.concatenate([batch["targets"][batch["loss_mask"] > 0] for batch in batches])
    assert bytes(sorted(targets.tolist())) == b"bcdefghi" + b"i"


def test_the_end_token_is_left_out_unless_asked_for():
    eos = ByteTokenizer().special.eos
    assert not any(
        (batch["targets"] == eos).any() for batch in eval_batches(TEXTS, ByteTokenizer(), length=8, batch_size=1)
    )
    batches = eval_batches(["ab"], ByteTokenizer(), length=8, batch_size=1, append_eos=True)
    assert rows_of(batches, "targets") == [[98, eos, 0, 0, 0, 0, 0, 0]]


def test_nothing_to_predict_is_refused():
    with pytest.raises(ValueError, match="no document has anything to predict"):
        eval_batches(["", "x"], ByteTokenizer(), length=8, batch_size=1)
    with pytest.raises(ValueError, match="windows_per_document is 0"):
        eval_batches(["abc"], ByteTokenizer(), length=8, batch_size=1, windows_per_document=0)
