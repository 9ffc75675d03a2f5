"""Llama-3.1-8B into a 16-layer student of 4.5B parameters on a TPU pod slice, by depth pruning and forward KL.

    jaxdistill train configs/llama31_8b_to_4b.py \
        --teacher.path Llama-3.1-8B --data.path CORPUS --held-out.path HELD_OUT.jsonl --out RUN

Start the command on every host; the processes find each other. After LLM Pruning and Distillation in Practice
(2408.11796): layers 16 to 31 of 32 go as one contiguous block and the last layer stays, and the student is retrained
by forward KL on the logits alone. Rates follow its published recipe as we read it (docs/papers.md): peak 1e-4 falling
to 1e-5, 40 steps of warm-up, contexts of 8192. Batch and steps are ours: the paper takes 1,152 rows a step for 94B
tokens; here 128 rows for 1,200 steps make 1.26B, a start.

Nothing here was trained by us at this size: on this recipe the tests load it, shrink it and train two steps.
"""

from jaxdistill.checkpoint.retention import Retention
from jaxdistill.data.pipeline import DataConfig
from jaxdistill.losses.terms import CrossEntropy, ForwardKL
from jaxdistill.models.decoder import Execution
from jaxdistill.optimizer import AdamW, WarmupCosine
from jaxdistill.prune.choose import Target
from jaxdistill.sharding import MeshConfig
from jaxdistill.train.config import CheckpointConfig, HeldOutConfig, StudentConfig, TeacherConfig, TrainConfig


def get_config() -> TrainConfig:
    steps = 1200
    return TrainConfig(
        out="",
        processes="automatic",
        # All chips split parameters and rows. Add tensor=4 when fewer rows than chips are wanted.
        mesh=MeshConfig(fsdp=-1),
        teacher=TeacherConfig(
            # The teacher is never updated: half the memory costs it nothing but rounding.
            parameter_dtype="bfloat16",
            execution=Execution(activation_dtype="bfloat16"),
        ),
        student=StudentConfig(
            prune=Target(layers=(*range(15), 31)),
            # Blocks are recomputed backwards: at 8192 tokens their activations would not fit beside the optimizer.
            execution=Execution(activation_dtype="bfloat16", remat="block"),
        ),
        # 128 rows of 8192 tokens: 1M tokens a step; a multiple of the chips that split rows. Llama 3 was trained
        # with a beginning-of-text token before every document.
        data=DataConfig(length=8192, batch_size=128, virtual_shards=64, prepend_bos=True),
        losses={
            "kl": ForwardKL(),
            # Reported beside the KL, not trained: the paper found that it does not help.
            "cross_entropy": CrossEntropy(weight=0.0),
        },
        optimizer=AdamW(learning_rate=WarmupCosine(peak=1e-4, warmup=40 / steps, final=0.1), weight_decay=0.1),
        steps=steps,
        chunk=512,
        held_out=HeldOutConfig(every=100, windows=128),
        checkpoints=CheckpointConfig(every=200, retention=Retention(last=2, every=1000, best=1)),
    )
