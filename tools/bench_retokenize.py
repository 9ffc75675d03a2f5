"""What moving SmolLM2 to another tokenizer costs, and how fast the longest tokens of a text are found.

python tools/bench_retokenize.py
"""

from __future__ import annotations

import json
import time

import jax
import numpy as np

from jaxdistill.align.suffix import SuffixLookup
from jaxdistill.assets import asset
from jaxdistill.checkpoint.open import open_model
from jaxdistill.retokenize import map_vocabulary, retokenize_model
from jaxdistill.tokenizers import load_tokenizer
from jaxdistill.tokenizers.vocabulary import ordinary_ids

LENGTH, ROWS = 512, 64
TARGETS = ("bytes", "tokenizer.llama2", "qwen3-tokenizer")


def main() -> None:
    model = open_model(asset("smollm2"))
    for name in TARGETS:
        new = load_tokenizer(name if name == "bytes" else asset("tokenizers") / name)
        began = time.perf_counter()
        rows = map_vocabulary(model.tokenizer, new)
        mapped = time.perf_counter()
        made = retokenize_model(model.config, model.params, model.tokenizer, new, key=jax.random.key(0))
        jax.block_until_ready(made[1]["embedding"])
        done = time.perf_counter()
        print(
            f"{name}: {rows.counts}, mapped in {mapped - began:.1f} s, tables in {done - 2 * mapped + began:.1f} s more"
        )
    began = time.process_time()
    lookup = SuffixLookup(ordinary_ids(model.tokenizer), {})
    print(f"suffix look-up of {model.tokenizer.vocab_size:,} tokens built in {time.process_time() - began:.2f} s")
    texts = [json.loads(line)["text"].encode() for line in asset("heldout").read_text(encoding="utf-8").splitlines()]
    data = np.frombuffer(b"".join(texts), np.uint8).astype(np.int32)
    batches = data[: len(data) // (ROWS * LENGTH) * ROWS * LENGTH].reshape(-1, ROWS, LENGTH)
    began = time.process_time()
    for batch in batches:
        lookup(batch, np.ones_like(batch))
    rate = batches.size / (time.process_time() - began)
    print(f"longest tokens in rows of {LENGTH} bytes: {rate / 1e6:.1f} M bytes/s on one core")


if __name__ == "__main__":
    main()
