"""Minitron with many layers gone: forward KL, and hidden states balanced with it.

    jaxdistill train configs/minitron_depth.py \
        --teacher.path DIR --data.path FILE --student.prune.layers 16 --out RUN

The layers of highest Block Influence stay. Besides the scores, the output of the student's last block but one is
matched with the teacher's, as large a term as the KL at every step: after Compact Language Models via Pruning and
Knowledge Distillation (2407.14679), which found that states help where depth is cut hard, and nowhere else.
When channels are cut too, the student's states go through a learned map, and a second term on the embeddings makes
sense: `HiddenMatch(layers=((0, 0),), point="input", balance="kl")`. While the widths are equal the embeddings are too.

Layers can also be chosen by the loss without them (`--student.depth loss`), or as the one contiguous block that is
missed least (`--student.depth block-by-loss`). To look at the plan before training, prune first, and start from it:

    jaxdistill prune DIR --data FILE --layers 16 --depth block-by-loss --out PRUNED
    jaxdistill train configs/minitron_depth.py --teacher.path DIR --data.path FILE \
        --student.plan PRUNED/plan.json --out RUN
"""

from jaxdistill.data.pipeline import DataConfig
from jaxdistill.losses.hidden import HiddenMatch
from jaxdistill.losses.terms import ForwardKL
from jaxdistill.optimizer import AdamW, WarmupCosine
from jaxdistill.train.config import StudentConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        out="",
        student=StudentConfig(calibration_batches=64),
        data=DataConfig(length=512, batch_size=16),
        losses={
            "kl": ForwardKL(),
            "blocks": HiddenMatch(layers=((-2, -2),), balance="kl"),
        },
        optimizer=AdamW(learning_rate=WarmupCosine(peak=3e-4)),
        steps=1000,
    )
