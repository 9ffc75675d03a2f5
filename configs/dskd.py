"""Dual-space distillation: states of teacher and student in each other's space, for any pair of tokenizers.

    jaxdistill train configs/dskd.py \
        --teacher.path DIR --student.path DIR --data.path FILE --out RUN

Learned attention between the two rows and learned maps between the two widths bring each model's hidden states to the
other, whose head scores them there: forward KL in both spaces, with cross-entropy on the text (Dual-Space Knowledge
Distillation, 2406.17328). The maps are trained with the student, saved with the run, and no part of the student that is
written. To compare with configs/across_tokenizers.py.
"""

from jaxdistill.data.pipeline import DataConfig
from jaxdistill.losses.dual_space import DSKD
from jaxdistill.losses.terms import CrossEntropy
from jaxdistill.optimizer import AdamW, WarmupCosine
from jaxdistill.train.config import TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        out="",
        data=DataConfig(length=512, batch_size=16),
        losses={"dskd": DSKD(), "cross_entropy": CrossEntropy()},
        optimizer=AdamW(learning_rate=WarmupCosine(peak=5e-5)),
        steps=1000,
    )
