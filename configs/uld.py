"""Universal logit distillation: a student with another tokenizer learns how a teacher's probabilities fall off.

    jaxdistill train configs/uld.py \
        --teacher.path DIR --student.path DIR --data.path FILE --out RUN

Both models' next-token probabilities are sorted and compared rank by rank, whatever tokens they belong to (Towards
Cross-Tokenizer Distillation: the Universal Logit Distillation Loss, 2402.12030), with cross-entropy on the text. Here
where both have read the same text; `--losses.uld.pairing index` is the paper's pairing, position by position. Sorting
whole vocabularies is most of a step's time: `--losses.uld.ranks 1024` compares the largest alone. To compare with
configs/across_tokenizers.py.
"""

from jaxdistill.data.pipeline import DataConfig
from jaxdistill.losses.pairs import ULD
from jaxdistill.losses.terms import CrossEntropy
from jaxdistill.optimizer import AdamW, WarmupCosine
from jaxdistill.train.config import TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        out="",
        data=DataConfig(length=512, batch_size=16),
        losses={"uld": ULD(weight=1.5), "cross_entropy": CrossEntropy()},
        optimizer=AdamW(learning_rate=WarmupCosine(peak=5e-5)),
        steps=1000,
    )
