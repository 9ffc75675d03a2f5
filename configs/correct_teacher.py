"""Teacher correction: fine-tune a teacher lightly on the text that it will be distilled on.

    jaxdistill train configs/correct_teacher.py --student.path DIR --data.path FILE --out CORRECTED
    jaxdistill train configs/minitron.py --teacher.path CORRECTED/student --data.path FILE --out RUN

A teacher guides badly on text unlike its own. LLM Pruning and Distillation in Practice (2408.11796)
fine-tunes it on the distillation data before or while it teaches, with the same quality: 120 steps of warm-up, and a
fifth of the learning rate it was trained with; set `--optimizer.learning-rate.peak` to that of your teacher. To correct
it while it teaches, add `teacher.correction` to a recipe of your own (configs/minitron_correction.py).
"""

from jaxdistill.data.pipeline import DataConfig
from jaxdistill.losses.terms import CrossEntropy
from jaxdistill.optimizer import AdamW, WarmupCosine
from jaxdistill.train.config import TrainConfig


def get_config() -> TrainConfig:
    steps = 1000
    return TrainConfig(
        out="",
        data=DataConfig(length=512, batch_size=16),
        losses={"cross_entropy": CrossEntropy()},
        optimizer=AdamW(learning_rate=WarmupCosine(peak=6e-5, warmup=120 / steps, final=0.1)),
        steps=steps,
    )
