"""What moving SmolLM2 to another tokenizer costs, and how fast the longest tokens of a text are found.

python tools/bench_retokenize.py
"""

from __future__ import annotations

import functools
import json
import time

import jax
import numpy as np

from jaxdistill.assets import asset
from jaxdistill.checkpoint.open import open_model
from jaxdistill.models.suffixes import build_trie, longest_suffixes
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
    trie = build_trie(ordinary_ids(model.tokenizer), {}, vocab=256)
    seconds = time.process_time() - began
    print(f"trie of {model.tokenizer.vocab_size:,} tokens: {trie.nbytes / 1e6:.1f} MB, built in {seconds:.2f} s")
    find, trie = jax.jit(functools.partial(longest_suffixes, vocab=256)), jax.device_put(trie)
    texts = [json.loads(line)["text"].encode() for line in asset("heldout").read_text(encoding="utf-8").splitlines()]
    data = np.frombuffer(b"".join(texts), np.uint8).astype(np.int32)
    batches = data[: len(data) // (ROWS * LENGTH) * ROWS * LENGTH].reshape(-1, ROWS, LENGTH)
    jax.block_until_ready(find(trie, batches[0], np.ones_like(batches[0])))
    began = time.perf_counter()
    for batch in batches:
        jax.block_until_ready(find(trie, batch, np.ones_like(batch)))
    rate = batches.size / (time.perf_counter() - began)
    print(f"longest tokens in rows of {LENGTH} bytes: {rate / 1e6:.1f} M bytes/s")


if __name__ == "__main__":
    main()
