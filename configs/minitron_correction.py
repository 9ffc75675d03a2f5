"""Minitron with a teacher that is corrected while it teaches: it learns the text beside the student.

    jaxdistill train configs/minitron_correction.py \
        --teacher.path DIR --data.path FILE --student.prune.mlp 1024 --out RUN

As configs/minitron.py, and at every step the teacher takes a small step of its own by cross-entropy on the same batch.
LLM Pruning and Distillation in Practice (2408.11796) found this as good as correcting it first
(configs/correct_teacher.py), which costs a run of its own but leaves a teacher to keep. The teacher's rate should be
about a fifth of the one it was trained with. KL on held-out text is to the teacher as it is at that step.
"""

from jaxdistill.data.pipeline import DataConfig
from jaxdistill.losses.terms import ForwardKL
from jaxdistill.optimizer import AdamW, WarmupCosine
from jaxdistill.train.config import Correction, StudentConfig, TeacherConfig, TrainConfig


def get_config() -> TrainConfig:
    steps = 1000
    return TrainConfig(
        out="",
        teacher=TeacherConfig(
            correction=Correction(
                optimizer=AdamW(learning_rate=WarmupCosine(peak=6e-5, warmup=120 / steps, final=0.1)),
            )
        ),
        student=StudentConfig(calibration_batches=64),
        data=DataConfig(length=512, batch_size=16),
        losses={"kl": ForwardKL()},
        optimizer=AdamW(learning_rate=WarmupCosine(peak=3e-4)),
        steps=steps,
    )
