"""Find the best shape of a student under a budget: candidates are pruned by importance and distilled briefly.

    jaxdistill search configs/search.py --train.teacher.path DIR --train.data.path FILE \
        --train.held-out.path HELD_OUT --budget.parameters 0.75 --out OUT

A limit of at most 1 is a share of the teacher's: parameters, active_parameters, memory_mb (weights and KV cache of
`budget.workload`) and latency_ms (a roofline of `budget.hardware`) can be limited together. The ten shapes of the grid
that use most of the first limit are tried; OUT/search.html shows them with their Pareto front, OUT/plans holds a plan
for each. Train the best one for longer:

    jaxdistill train configs/distill.py --teacher.path DIR --data.path FILE --student.plan OUT/plans/BEST.json --out RUN

Importance is measured once, on the first training batches; `--train.student.depth` says how layers are chosen. Sizes
that the devices (`--train.mesh.fsdp`, `--train.mesh.tensor`) do not divide are left out. Candidates resume where they
were interrupted.

Paper: Compact Language Models via Pruning and Knowledge Distillation (2407.14679): 1.8B tokens for each of
fewer than twenty candidates; the defaults here, 819k tokens, are for a first look.
"""

from jaxdistill.data.pipeline import DataConfig
from jaxdistill.losses.terms import ForwardKL
from jaxdistill.optimizer import AdamW, WarmupCosine
from jaxdistill.search import Budget, SearchConfig
from jaxdistill.train.config import CheckpointConfig, HeldOutConfig, LogConfig, TrainConfig


def get_config() -> SearchConfig:
    return SearchConfig(
        out="",
        train=TrainConfig(
            out="",
            data=DataConfig(length=512, batch_size=16),
            losses={"kl": ForwardKL()},
            optimizer=AdamW(learning_rate=WarmupCosine(peak=3e-4)),
            steps=100,
            held_out=HeldOutConfig(every=100, windows=64),
            checkpoints=CheckpointConfig(every=50),
            log=LogConfig(every=10, tensorboard=False),
        ),
        budget=Budget(parameters=0.75),
    )
