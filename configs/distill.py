"""Distil any supported checkpoint into a student made of some of its layers.

    jaxdistill train configs/distill.py --teacher.path DIR --data.path FILE --student.prune.layers 16 --out RUN

DIR is a Hugging Face directory, a .gguf file or a directory written by `jaxdistill convert`; FILE is text, JSON lines,
Parquet or ArrayRecord. The layers with the highest Block Influence are kept, and the student learns the teacher's
next-token distributions by forward KL. RUN/student is a Hugging Face directory. On several devices parameters and
batches are sharded over all of them (`--mesh.fsdp`, `--mesh.tensor`); the batch size must be a multiple of the
devices that split it. To see how the student does on other text while it learns, add `--held-out.path FILE`.

Papers: Hinton et al. 2015 (1503.02531); ShortGPT (2403.03853) for the choice of layers; Minitron (2407.14679) for
forward KL alone as the objective.
"""

from jaxdistill.data.pipeline import DataConfig
from jaxdistill.losses.terms import ForwardKL
from jaxdistill.optimizer import AdamW, WarmupCosine
from jaxdistill.train.config import TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        out="",
        data=DataConfig(length=512, batch_size=16),
        losses={"kl": ForwardKL()},
        optimizer=AdamW(learning_rate=WarmupCosine(peak=3e-4)),
        steps=1000,
    )
