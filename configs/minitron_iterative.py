"""Minitron in two rounds, to half of the parameters: prune 30 %, distil, prune the result by 30 %, distil again.

    jaxdistill train configs/minitron_iterative.py --teacher.path DIR --data.path FILE

Typed once it is the first round, typed again the second, whose student begins as a part of the first one's; the teacher
is the original in both. An interrupted round goes on. The rounds are in runs/minitron_iterative/1 and 2
(write another PLACE below rather than `--out`, where the next round would not find them); the last one's `student` is
the result. The sizes are for SmolLM2-135M (30 layers, 1,536 neurons: 134.5M, 94.7M and 66.2M parameters); for another
model write others into ROUNDS, or more of them.

Paper: Compact Language Models via Pruning and Knowledge Distillation (2407.14679), which goes from 15B to 4B by way of
8B. Whether two rounds are better than one cut was not measured here.
"""

from pathlib import Path

from jaxdistill.data.pipeline import DataConfig
from jaxdistill.losses.terms import ForwardKL
from jaxdistill.optimizer import AdamW, WarmupCosine
from jaxdistill.prune.choose import Target
from jaxdistill.train.config import StudentConfig, TrainConfig

PLACE = Path("runs/minitron_iterative")
ROUNDS = (Target(layers=24, mlp=1088), Target(layers=18, mlp=704))


def get_config(number: int | None = None) -> TrainConfig:
    """A round, counted from 1; None is the first whose student is not there yet, or the last."""
    number = number or next((n for n in range(1, len(ROUNDS)) if not student_of(n).exists()), len(ROUNDS))
    return TrainConfig(
        out=str(PLACE / str(number)),
        student=StudentConfig(
            path=None if number == 1 else str(student_of(number - 1)),
            prune=ROUNDS[number - 1],
            calibration_batches=64,
        ),
        data=DataConfig(length=512, batch_size=16),
        losses={"kl": ForwardKL()},
        optimizer=AdamW(learning_rate=WarmupCosine(peak=3e-4)),
        steps=1000,
    )


def student_of(number: int) -> Path:
    return PLACE / str(number) / "student"
