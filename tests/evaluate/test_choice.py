"""Multiple choice: accuracy by its definition, the boundary of context and option, and the files that hold items."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from evaluate_cases import byte_model, log_probs, placed
from tiny import LAYOUTS

from jaxdistill.evaluate import ChoiceItem, Scoring, multiple_choice, read_items
from jaxdistill.evaluate.choice import continuation_pieces
from jaxdistill.tokenizers import ByteTokenizer, Encoding

SMALL = Scoring(length=32, batch_size=2)


def items(count: int = 12) -> list[ChoiceItem]:
    """Questions of random letters; options of different lengths, so that the two measures differ."""
    rng = np.random.default_rng(0)

    def word(low, high):
        return "".join(rng.choice(list("abcdefg "), rng.integers(low, high))).strip() or "é"

    return [
        ChoiceItem(context=word(3, 20), options=tuple(word(1, 40) for _ in range(2 + n % 3)), answer=n % 2)
        for n in range(count)
    ]


def by_definition(model, given):
    summed = per_byte = 0
    for item in given:
        totals = []
        for option in item.options:
            context, continuation = list(item.context.encode()), list(f" {option}".encode())
            said = log_probs(model, (context + continuation)[:-1])
            totals.append(sum(said[len(context) - 1 + i, token] for i, token in enumerate(continuation)))
        summed += int(np.argmax(totals)) == item.answer
        per_byte += (
            int(np.argmax([t / len(o.encode()) for t, o in zip(totals, item.options, strict=True)])) == item.answer
        )
    return summed / len(given), per_byte / len(given)


def test_both_accuracies_are_those_of_the_definition():
    model, given = byte_model(0), items()
    found = multiple_choice(model, given, scoring=SMALL)
    assert (found.items, found.summed, found.per_byte) == (12, *by_definition(model, given))
    # Otherwise the test could not tell one measure from the other, nor from chance.
    assert found.summed != found.per_byte


@pytest.mark.parametrize("layout", ["fsdp 8", "sequence 2 x fsdp 4"])
def test_a_mesh_gives_the_same_answers(layout):
    model, layout = byte_model(0), LAYOUTS[layout]()
    on_mesh = dataclasses.replace(SMALL, layout=layout)
    assert multiple_choice(placed(model, layout), items(), scoring=on_mesh) == multiple_choice(
        model, items(), scoring=SMALL
    )


class Pairs(ByteTokenizer):
    """Two bytes to a token (the first one's id), so that boundaries are straddled."""

    def encode(self, text, *, parse_special=False):
        data = text.encode()
        ends = np.minimum(np.arange(2, len(data) + 2, 2), len(data))
        ids = np.frombuffer(data, np.uint8)[::2].astype(np.int32)
        return Encoding(ids, np.stack([np.append(0, ends)[:-1], ends], axis=1).astype(np.int64))


def supervised(tokenizer, context, continuation, max_length=100):
    [piece] = continuation_pieces(tokenizer, [(context, continuation)], max_length=max_length)
    return piece.document.ids.tolist(), piece.document.supervised.tolist()


def test_the_continuations_tokens_are_those_that_reach_beyond_the_context():
    assert supervised(ByteTokenizer(), "ab", " c") == (list(b"ab c"), [False, False, True, True])
    assert supervised(Pairs(), "abcd", "ef") == (list(b"ace"), [False, False, True])


def test_a_token_that_straddles_the_boundary_counts_whole():
    assert supervised(Pairs(), "abc", "def") == (list(b"ace"), [False, True, True])


def test_an_empty_context_is_the_begin_token():
    assert supervised(ByteTokenizer(), "", "ab") == ([256, *b"ab"], [False, True, True])
    assert supervised(ByteTokenizer(("<eos>",)), "", "ab") == ([256, *b"ab"], [False, True, True])
    with pytest.raises(ValueError, match="no token that something precedes"):
        continuation_pieces(ByteTokenizer(("<x>",)), [("", "ab")], max_length=10)


def test_texts_begin_with_the_begin_token_if_asked():
    [piece] = continuation_pieces(ByteTokenizer(), [("a", "b")], max_length=100, prepend_bos=True)
    assert (piece.document.ids.tolist(), piece.document.supervised.tolist()) == ([256, *b"ab"], [False, False, True])
    with pytest.raises(ValueError, match="no beginning-of-sequence token"):
        continuation_pieces(ByteTokenizer(("<eos>",)), [("a", "b")], max_length=10, prepend_bos=True)


def test_long_contexts_lose_their_beginning():
    assert supervised(ByteTokenizer(), "abcdef", "g", max_length=3) == (list(b"defg"), [False, False, False, True])
    with pytest.raises(ValueError, match="a continuation has 4 tokens and the model takes 3"):
        continuation_pieces(ByteTokenizer(), [("a", "bcde")], max_length=3)


def test_a_text_longer_than_the_rows_is_scored_whole():
    model = byte_model(0)
    given = [ChoiceItem(context="a" * 50, options=("b" * 30, "c"), answer=0)]
    found = multiple_choice(model, given, scoring=SMALL)
    assert (found.summed, found.per_byte) == by_definition(model, given)


def test_files_of_items_are_read(tmp_path):
    rows = [
        {"question": "Why?", "options": "A. one \nB. two, B. three", "answer": "A. one "},
        {"question": "Who?", "options": "\nA. bank\nB. library\nC. mall", "answer": "C. mall"},
        {"question": "not read"},
    ]
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_items(path, prompt="Question: {question}", limit=2) == [
        ChoiceItem(context="Question: Why?", options=("one", "two, B. three"), answer=0),
        ChoiceItem(context="Question: Who?", options=("bank", "library", "mall"), answer=2),
    ]
    with pytest.raises(ValueError, match=r"line 3: not a multiple-choice item"):
        read_items(path)
    with pytest.raises(ValueError, match="line 1: not a multiple-choice item"):
        read_items(path, prompt="{passage}")


@pytest.mark.parametrize(
    ("options", "answer"), [(("a",), 0), (("a", ""), 0), (("a", "b"), 2)], ids=["one", "empty", "index"]
)
def test_an_item_without_a_choice_is_refused(options, answer):
    with pytest.raises(ValueError, match="at least two options"):
        ChoiceItem(context="c", options=options, answer=answer)


def test_no_items_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no items"):
        multiple_choice(byte_model(0), [])
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no items"):
        read_items(tmp_path / "empty.jsonl")
