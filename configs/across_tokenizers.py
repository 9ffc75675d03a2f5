"""Distil a teacher into a student that has another tokenizer, by approximate likelihood matching (ALM).

    jaxdistill train configs/across_tokenizers.py \
        --teacher.path DIR --student.path DIR --data.path FILE --out RUN

The text goes through both tokenizers. Where tokens of both end at the same byte a chunk ends, and the student learns to
find every chunk as likely as the teacher does (Cross-Tokenizer Distillation via Approximate Likelihood Matching,
2503.20083), with cross-entropy on the text beside it; both move the student equally. `jaxdistill inspect alignment`
shows the chunks of a text.

Give `--data.teacher-length` if the teacher needs more tokens for a text than the student, or fewer: what does not fit
one of the two rows is cut. For a fresh student, write a `student.model` into a recipe of your own and give
`--student.tokenizer PATH`.
"""

from jaxdistill.data.pipeline import DataConfig
from jaxdistill.losses.alm import ALM
from jaxdistill.losses.terms import CrossEntropy
from jaxdistill.optimizer import AdamW, WarmupCosine
from jaxdistill.train.config import TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        out="",
        data=DataConfig(length=512, batch_size=16),
        losses={"alm": ALM(), "cross_entropy": CrossEntropy()},
        weighting="gradient_magnitude",
        optimizer=AdamW(learning_rate=WarmupCosine(peak=5e-5)),
        steps=1000,
    )
