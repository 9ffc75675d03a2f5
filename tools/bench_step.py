"""Time and memory of one distillation step: our chunked head against full logits, and against the matmul floor; of
approximate likelihood matching (ALM) against forward KL, both with the chunked head; and of two terms that are weighed
by their gradients against the same with fixed weights.

    python tools/bench_step.py                     # both vocabularies, huge pages on and off, about 11 minutes
    python tools/bench_step.py --vocabularies 131072 --repeats 7

All variants run in one process, interleaved, and the median of each is compared; quote ratios, not seconds. Without
huge pages page faults dominate at large vocabularies, so the tool starts itself once with
GLIBC_TUNABLES=glibc.malloc.hugetlb=1 and once without, and reports both.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import tyro

HUGE_PAGES = "glibc.malloc.hugetlb=1"
INNER = "JAXDISTILL_BENCH_INNER"
"""Set for the copies of this process that measure."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What to measure."""

    vocabularies: tuple[int, ...] = (32768, 131072)
    chunk: int | None = None
    """Positions per chunk; None takes the recommended one for the vocabulary."""
    repeats: int = 5
    batch: int = 4
    length: int = 256


def main(bench: Bench) -> None:
    if INNER in os.environ:
        print(json.dumps([measure(bench, vocab) for vocab in bench.vocabularies]))
        return
    for pages in ("huge", "default"):
        environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | {INNER: "1"}
        if pages == "huge":
            environment["GLIBC_TUNABLES"] = HUGE_PAGES
        command = [sys.executable, __file__, *sys.argv[1:]]
        out = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        for result in json.loads(out.strip().splitlines()[-1]):
            report(pages, result)


def report(pages: str, result: dict[str, Any]) -> None:
    seconds, temporary = result["seconds"], result["temporary_mb"]
    print(
        f"\nvocabulary {result['vocab']}, {pages} pages, chunk {result['chunk']}, {result['tokens']} tokens a step, "
        f"{result['gflop']:.0f} GFLOP, matmul {result['gflops']:.0f} GFLOP/s, floor {result['floor']:.3f} s"
    )
    print(f"{'variant':<14}{'seconds':>9}{'/ plain':>9}{'/ floor':>9}{'temp MB':>10}{'/ plain':>9}{'loss MB':>9}")
    for name in seconds:
        print(
            f"{name:<14}{seconds[name]:>9.3f}{seconds[name] / seconds['plain']:>9.2f}"
            f"{seconds[name] / result['floor']:>9.2f}{temporary[name]:>10.0f}"
            f"{temporary[name] / temporary['plain']:>9.3f}{temporary[name] - temporary['without loss']:>9.0f}"
        )
    for one, other in (("alm", "chunked"), ("magnitudes", "two terms")):
        print(f"{one} / {other}: {seconds[one] / seconds[other]:.3f}")
    print(f"first losses: {result['losses']}")


def measure(bench: Bench, vocab: int) -> dict[str, Any]:
    import jax

    from jaxdistill.losses.chunked import default_chunk
    from jaxdistill.train.progress import matmul_rate

    chunk = bench.chunk or default_chunk(vocab)
    work = _Work(vocab, bench.batch, bench.length)
    compiled, losses, temporary = {}, {}, {}
    for name, step in work.variants(chunk).items():
        compiled[name] = jax.jit(step, donate_argnums=0).lower(*work.arguments()).compile()
        temporary[name] = compiled[name].memory_analysis().temp_size_in_bytes / 1e6
        print(f"compiled {name} at {vocab}", file=sys.stderr)
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    rates = []
    for repeat in range(bench.repeats + 1):
        rates.append(matmul_rate())
        for name, step in compiled.items():
            state, teacher, batch = work.arguments()
            start = time.perf_counter()
            _, loss = jax.block_until_ready(step(state, teacher, batch))
            if repeat:
                seconds[name].append(time.perf_counter() - start)
            losses[name] = float(loss)
    rate, flop = statistics.median(rates), work.flop()
    return {
        "vocab": vocab,
        "chunk": chunk,
        "tokens": bench.batch * bench.length,
        "gflop": flop / 1e9,
        "gflops": rate / 1e9,
        "floor": flop / rate,
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "temporary_mb": temporary,
        "losses": losses,
    }


class _Work:
    """The models, the batch and the steps that are compared: untied Llama shapes, float32, AdamW."""

    def __init__(self, vocab: int, batch: int, length: int):
        import jax
        import jax.numpy as jnp

        from jaxdistill.losses.terms import ForwardKL
        from jaxdistill.models.decoder import apply
        from jaxdistill.models.schema import init_params
        from jaxdistill.optimizer import AdamW
        from jaxdistill.types import Batch

        self.batch, self.length = batch, length
        self.teacher = _llama(vocab, embed=512, layers=8, heads=8, kv_heads=4, mlp=1536)
        self.student = _llama(vocab, embed=256, layers=4, heads=4, kv_heads=2, mlp=768)
        self.terms = {"kl": ForwardKL()}
        self.optimizer = AdamW(learning_rate=1e-3).build(10)
        self.student_apply = lambda params, rows: apply(self.student, params, rows)
        self.teacher_apply = lambda params, rows: apply(self.teacher, params, rows)
        key = jax.random.key(0)
        self.teacher_params = init_params(self.teacher, key)
        self.student_params = init_params(self.student, jax.random.fold_in(key, 1))
        tokens = jax.random.randint(key, (batch, length + 1), 0, vocab)
        ones = jnp.ones((batch, length), jnp.int32)
        self.rows = Batch(
            tokens=tokens[:, :-1],
            targets=tokens[:, 1:],
            loss_mask=ones.astype(jnp.float32),
            positions=jnp.broadcast_to(jnp.arange(length), (batch, length)),
            segment_ids=ones,
            target_bytes=ones,
        )

    def arguments(self):
        """A fresh state (it is donated), the teacher and the batch."""
        import jax
        import jax.numpy as jnp

        from jaxdistill.step import init_state

        state = init_state(
            jax.tree.map(jnp.copy, self.student_params),
            self.terms,
            self.optimizer,
            key=jax.random.key(2),
            student_embed=self.student.embed,
            teacher_embed=self.teacher.embed,
        )
        return jax.block_until_ready((state, self.teacher_params, self.rows))

    def variants(self, chunk: int):
        import jax
        import jax.numpy as jnp
        import numpy as np
        import optax

        from jaxdistill.losses.aligned import Ends
        from jaxdistill.losses.alm import ALM
        from jaxdistill.losses.terms import CrossEntropy
        from jaxdistill.objective import Weighting
        from jaxdistill.step import make_train_step
        from jaxdistill.types import PairedBatch

        ours = make_train_step(self.student_apply, self.teacher_apply, self.terms, self.optimizer, chunk=chunk)

        def chunked(state, teacher, rows):
            state, metrics = ours(state, {}, teacher, rows)
            return state, metrics["loss"]

        ids = np.arange(self.student.vocab) % 3 == 0

        def across(terms, weighting: Weighting = "fixed"):
            matching = make_train_step(
                self.student_apply,
                self.teacher_apply,
                terms,
                self.optimizer,
                chunk=chunk,
                ends={"alm": Ends(ids, ids)},
                weighting=weighting,
            )

            def step(state, teacher, rows):
                # The same rows for both models, each token a chunk of its own: what is compared is what a step costs.
                chunks = 1 + rows.positions
                pairs = PairedBatch(**vars(rows), chunks=chunks, teacher=rows, teacher_chunks=chunks)
                state, metrics = matching(state, {}, teacher, pairs)
                return state, metrics["loss"]

            return step

        two = {"alm": ALM(), "cross_entropy": CrossEntropy()}

        def with_loss(loss_of):
            def step(state, teacher, rows):
                signal = self.teacher_apply(teacher, rows)
                loss, grads = jax.value_and_grad(
                    lambda params: loss_of(self.student_apply(params["student"], rows), signal)
                )(state.params)
                updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params, step=state.step)
                params = optax.apply_updates(state.params, updates)
                return dataclasses.replace(state, params=params, opt_state=opt_state, step=state.step + 1), loss

            return step

        def plain(student, teacher):
            log_q = jax.nn.log_softmax(student.hidden @ student.head.kernel.T)
            log_p = jax.nn.log_softmax(teacher.hidden @ teacher.head.kernel.T)
            return (jnp.exp(log_p) * (log_p - log_q)).sum(-1).mean()

        return {
            "plain": with_loss(plain),
            "chunked": chunked,
            "alm": across({"alm": ALM()}),
            "two terms": across(two),
            "magnitudes": across(two, "gradient_magnitude"),
            "without loss": with_loss(lambda student, teacher: jnp.square(student.hidden).mean()),
        }

    def flop(self) -> float:
        """FLOPs of a step that no program can avoid: products alone, the embedding look-up not counted."""
        from jaxdistill.models.flops import forward_flops

        tokens = self.batch * self.length
        return tokens * (forward_flops(self.teacher, self.length) + 3 * forward_flops(self.student, self.length))


def _llama(vocab: int, *, embed: int, layers: int, heads: int, kv_heads: int, mlp: int):
    from jaxdistill.specs import Attention, GatedMLP, LayerSpec, ModelConfig

    layer = LayerSpec(mixer=Attention(heads=heads, kv_heads=kv_heads, head_dim=64), ffn=GatedMLP(mlp=mlp))
    return ModelConfig(family="llama", vocab=vocab, embed=embed, layers=(layer,) * layers, tied=False)


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
