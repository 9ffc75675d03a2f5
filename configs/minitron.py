"""Minitron: prune in width by importance, and distil the teacher back by forward KL alone.

    jaxdistill train configs/minitron.py --teacher.path DIR --data.path FILE --student.prune.mlp 1024 --out RUN

Neurons, channels (`--student.prune.embed`), query heads (`--student.prune.heads`) and layers
(`--student.prune.layers`) with the highest importance stay, as measured on 1,024 rows of the text; any of them
together. RUN/plan.json says which. The same in two commands, with the pruned model to look at in between:

    jaxdistill prune DIR --data FILE --mlp 1024 --out PRUNED
    jaxdistill train configs/minitron.py --teacher.path DIR --data.path FILE --student.path PRUNED/model --out RUN

Teacher correction: when the text is not the teacher's own, the paper's second version first fine-tunes the teacher on
it (configs/correct_teacher.py), at a fifth of its learning rate. Then --teacher.path is that run's student.

For less than half of the parameters prune and distil in rounds: configs/minitron_iterative.py. Layers are chosen by
Block Influence; `--student.depth` has other ways.

Papers: Compact Language Models via Pruning and Knowledge Distillation (2407.14679) for importance and the objective,
LLM Pruning and Distillation in Practice (2408.11796) for teacher correction. Measured: docs/papers.md.
"""

from jaxdistill.data.pipeline import DataConfig
from jaxdistill.losses.terms import ForwardKL
from jaxdistill.optimizer import AdamW, WarmupCosine
from jaxdistill.train.config import StudentConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        out="",
        student=StudentConfig(calibration_batches=64),
        data=DataConfig(length=512, batch_size=16),
        losses={"kl": ForwardKL()},
        optimizer=AdamW(learning_rate=WarmupCosine(peak=3e-4)),
        steps=1000,
    )
