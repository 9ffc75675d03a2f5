"""Distil across tokenizers through a map between vocabularies, made by minimum edit distance.

    jaxdistill train configs/mined.py \
        --teacher.path DIR --student.path DIR --data.path FILE --out RUN

Each of the student's tokens takes the probability of the teacher's token that is spelled most like it; where one token
of either side spells the same text the student learns that distribution by forward KL, elsewhere the text itself. The
map is from Knowledge Fusion of Large Language Models (2401.10491), its use as a baseline from Approximate Likelihood
Matching (2503.20083). Making it takes seconds for vocabularies of 32,000, minutes for very large ones. To compare with
configs/across_tokenizers.py.
"""

from jaxdistill.data.pipeline import DataConfig
from jaxdistill.losses.pairs import MinED
from jaxdistill.optimizer import AdamW, WarmupCosine
from jaxdistill.train.config import TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        out="",
        data=DataConfig(length=512, batch_size=16),
        losses={"mined": MinED()},
        optimizer=AdamW(learning_rate=WarmupCosine(peak=5e-5)),
        steps=1000,
    )
