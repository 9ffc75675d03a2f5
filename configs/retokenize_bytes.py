"""Move a model to bytes: it is its own teacher, through likelihoods of chunks and the states at their ends.

    jaxdistill train configs/retokenize_bytes.py --teacher.path DIR --data.path FILE --out RUN

As configs/retokenize.py, with 256 bytes and a few special tokens instead of a vocabulary. A byte is far from a token,
so the states that the head reads are matched as well at the ends of chunks (channelwise, as the authors of 2503.20083
recommend for bytes), and all of the student is trained. Rows of 2,048 bytes stand beside 576 of the teacher's tokens:
English has about four bytes a token. The student needs about four times the arithmetic for the same text.

The student keeps the teacher's embedding, and adds to each byte's own that of the longest token which ends there:
words it knew are told apart at once. No Hugging Face format holds such a model, so it is written as a checkpoint of
ours; `--student.suffixes False --export huggingface` does without.
"""

from jaxdistill.data.pipeline import DataConfig
from jaxdistill.losses.alm import ALM
from jaxdistill.losses.hidden import HiddenMatch
from jaxdistill.losses.terms import CrossEntropy
from jaxdistill.optimizer import AdamW, WarmupCosine
from jaxdistill.train.config import StudentConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        out="",
        student=StudentConfig(tokenizer="bytes", suffixes=True),
        data=DataConfig(length=2048, teacher_length=576, batch_size=16),
        losses={
            "alm": ALM(),
            "states": HiddenMatch(point="final_normed", distance="channelwise"),
            "cross_entropy": CrossEntropy(),
        },
        weighting="gradient_magnitude",
        optimizer=AdamW(learning_rate=WarmupCosine(peak=1e-4)),
        steps=1000,
        export="jaxdistill",
    )
