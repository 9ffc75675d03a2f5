"""Distil a chat model on conversations, supervising what the assistant says.

    jaxdistill train configs/conversations.py --teacher.path DIR --data.path CHATS.jsonl --out RUN

A line of CHATS.jsonl is {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]} or
{"prompt": ..., "completion": ...}. Messages go through the teacher's own chat template; only assistant turns and their
end tokens count, from the first token on. Long conversations are truncated rather than split, because the second half
of one would start without its question. A little cross-entropy on the text (Hinton et al. 2015) keeps the student to
the answers that were given where the teacher is unsure.
"""

from jaxdistill.data.pipeline import DataConfig
from jaxdistill.losses.terms import CrossEntropy, ForwardKL
from jaxdistill.optimizer import AdamW, WarmupCosine
from jaxdistill.train.config import TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        out="",
        data=DataConfig(length=2048, batch_size=16, long_documents="truncate"),
        losses={"kl": ForwardKL(), "cross_entropy": CrossEntropy(weight=0.1)},
        optimizer=AdamW(learning_rate=WarmupCosine(peak=5e-5)),
        steps=1000,
    )
