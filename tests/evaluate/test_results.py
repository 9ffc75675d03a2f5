"""The table and the JSON of an evaluation, against hand values."""

from __future__ import annotations

import json
import math

from jaxdistill.evaluate import ChoiceScore, Evaluation, TextScore


def example() -> Evaluation:
    two_bits = 2 * math.log(2)
    teacher = {
        "books": TextScore(nats=100 * two_bits, tokens=50, bytes=100),
        "code": TextScore(nats=300 * math.log(2), tokens=100, bytes=300),
    }
    student = {
        "books": TextScore(nats=200 * two_bits, tokens=50, bytes=100, kl_nats=25.0, agreements=10.0),
        "code": TextScore(nats=600 * math.log(2), tokens=100, bytes=300, kl_nats=20.0, agreements=80.0),
    }
    return Evaluation(
        text={"teacher": teacher, "student": student},
        choices={"teacher": {"piqa": ChoiceScore(items=100, summed=0.62, per_byte=0.64)}},
        teacher="teacher",
    )


def test_one_aligned_table():
    assert example().table().splitlines() == [
        "         bits per byte        beside the teacher     piqa, 100 items",
        "model    books   code    all  KL, nats  top-1 equal  summed  per byte",
        "teacher  2.000  1.000  1.250         –            –    0.62      0.64",
        "student  4.000  2.000  2.500     0.300        60.0%       –         –",
    ]


def test_json_holds_every_number():
    document = json.loads(json.dumps(example().to_dict(), allow_nan=False))
    student = document["models"]["student"]
    assert document["teacher"] == "teacher"
    assert student["text"]["books"] == {
        "bits_per_byte": 4.0,
        "kl_nats": 0.5,
        "top_one_agreement": 0.2,
        "tokens": 50,
        "bytes": 100,
    }
    assert student["all_text"]["kl_nats"] == 0.3
    assert document["models"]["teacher"]["choices"]["piqa"] == {
        "items": 100,
        "accuracy_summed": 0.62,
        "accuracy_per_byte": 0.64,
    }
