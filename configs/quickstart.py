"""The first five minutes: SmolLM2-135M-Instruct into two thirds of its parameters on two CPU cores.

    make quickstart

fetches the teacher and the text, converts the teacher, and runs this recipe between two evaluations
(tools/quickstart.py). 18 of 30 layers and 1,408 of 1,536 neurons in each of them stay, those of highest importance. The
sweeps that chose sizes, tokens and learning rate are in docs/log.md.
"""

from jaxdistill.data.pipeline import DataConfig
from jaxdistill.losses.terms import ForwardKL
from jaxdistill.optimizer import AdamW, WarmupCosine
from jaxdistill.prune.choose import Target
from jaxdistill.train.config import CheckpointConfig, HeldOutConfig, LogConfig, StudentConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        out="runs/quickstart/train",
        # The embedding table stays as it is: rows of rare tokens would drift under Adam, and its gradient costs a
        # tenth of a step.
        student=StudentConfig(
            prune=Target(layers=18, mlp=1408), calibration_batches=2, trainable=("segments.*", "final_norm.*")
        ),
        data=DataConfig(length=256, batch_size=4),
        losses={"kl": ForwardKL()},
        optimizer=AdamW(learning_rate=WarmupCosine(peak=8e-4, warmup=0.1), weight_decay=0.0),
        steps=60,
        held_out=HeldOutConfig(every=12, windows=4),
        checkpoints=CheckpointConfig(every=1000),
        log=LogConfig(every=2),
    )
