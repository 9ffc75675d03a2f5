"""Distil the byte-level toy teacher into half of its layers, in seconds: every part of a real run, made small.

    jaxdistill train configs/toy_teacher.py --data.path FILE
    jaxdistill train configs/toy.py --data.path FILE

The second command reads the first one's model from runs/toy_teacher/student and writes runs/toy/student.
"""

from jaxdistill.data.pipeline import DataConfig
from jaxdistill.losses.terms import ForwardKL
from jaxdistill.optimizer import AdamW, WarmupCosine
from jaxdistill.prune.choose import Target
from jaxdistill.train.config import LogConfig, StudentConfig, TeacherConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        out="runs/toy",
        teacher=TeacherConfig(path="runs/toy_teacher/student"),
        student=StudentConfig(prune=Target(layers=2)),
        data=DataConfig(length=128, batch_size=16),
        losses={"kl": ForwardKL()},
        optimizer=AdamW(learning_rate=WarmupCosine(peak=3e-3)),
        steps=100,
        log=LogConfig(every=20, tensorboard=False),
    )
