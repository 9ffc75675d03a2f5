"""A byte-level model of 0.2M parameters trained on text alone, in seconds: the teacher of configs/toy.py.

    jaxdistill train configs/toy_teacher.py --data.path FILE --out runs/toy_teacher

Any text will do; the README of this repository is enough to see the loss fall. The student of a run without a
teacher is trained by cross-entropy on the text itself.
"""

from jaxdistill.data.pipeline import DataConfig
from jaxdistill.losses.terms import CrossEntropy
from jaxdistill.optimizer import AdamW, WarmupCosine
from jaxdistill.specs import Attention, GatedMLP, LayerSpec, ModelConfig
from jaxdistill.tokenizers import ByteTokenizer
from jaxdistill.train.config import LogConfig, StudentConfig, TrainConfig


def get_config() -> TrainConfig:
    layer = LayerSpec(mixer=Attention(heads=4, kv_heads=2, head_dim=16), ffn=GatedMLP(mlp=192))
    model = ModelConfig(family="llama", vocab=ByteTokenizer().vocab_size, embed=64, layers=(layer,) * 4, tied=True)
    return TrainConfig(
        out="runs/toy_teacher",
        student=StudentConfig(model=model, tokenizer="bytes"),
        data=DataConfig(length=128, batch_size=16),
        losses={"cross_entropy": CrossEntropy()},
        optimizer=AdamW(learning_rate=WarmupCosine(peak=3e-3)),
        steps=200,
        log=LogConfig(every=20, tensorboard=False),
    )
