"""Move a model to another tokenizer: it is its own teacher, through approximate likelihood matching (ALM).

    jaxdistill train configs/retokenize.py \
        --teacher.path DIR --student.tokenizer PATH --data.path FILE --out RUN

The student starts as the teacher with a new embedding: rows of special tokens by role, of known tokens as they are, of
others as the mean of the tokens that spell them (fast vocabulary transfer). The layers learn through adapters beside
the teacher's own arrays, so there is no second copy of them; the embedding is trained whole. The student that is
written has the adapters merged and the new tokenizer with it. Method: 2503.20083, on tokenizer transfer.

To train everything: `--student.lora None --student.trainable '*'`. For bytes see configs/retokenize_bytes.py.
"""

from jaxdistill.data.pipeline import DataConfig
from jaxdistill.losses.alm import ALM
from jaxdistill.losses.terms import CrossEntropy
from jaxdistill.models.lora import Lora
from jaxdistill.optimizer import AdamW, WarmupCosine
from jaxdistill.train.config import StudentConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        out="",
        student=StudentConfig(lora=Lora(), trainable=("embedding.*", "head.*")),
        data=DataConfig(length=512, batch_size=16),
        losses={"alm": ALM(), "cross_entropy": CrossEntropy()},
        weighting="gradient_magnitude",
        optimizer=AdamW(learning_rate=WarmupCosine(peak=2e-4)),
        steps=1000,
    )
