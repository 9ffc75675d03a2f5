"""One prompt, one continuation."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax

from jaxdistill.checkpoint.open import open_model
from jaxdistill.data.chat import ChatFormat
from jaxdistill.generate import Sampling, generate
from jaxdistill.jobs.stage import stage, whole_machine
from jaxdistill.models.decoder import Execution
from jaxdistill.tokenizers.base import Tokenizer


def generate_text(
    path: str,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    chat: bool,
    prepend_bos: bool = False,
    activations: Literal["float32", "bfloat16"] = "float32",
) -> str:
    """The prompt and what the model adds to it; with `chat`, the model's answer alone.

    prepend_bos: begin the prompt with the beginning-of-sequence token, as the model's training text began (a chat
    template writes its own). An empty prompt is that token alone, where the tokenizer has one.
    """
    if chat and prepend_bos:
        raise ValueError(
            "chat and prepend_bos are both set; a chat template writes its own beginning: give one of them."
        )
    layout = whole_machine()
    with stage(f"opening {path}"):
        model = open_model(path, layout=layout)
    if chat:
        turn = [{"role": "user", "content": prompt}]
        start, ids = [], ChatFormat(model.tokenizer).encode(turn, add_generation_prompt=True).ids.tolist()
    else:
        ids = model.tokenizer.encode(prompt).ids.tolist()
        start = _start(model.tokenizer, wanted=prepend_bos, needed=not ids)
    with stage("generating"):
        [made] = generate(
            model.config,
            model.params,
            [start + ids],
            max_new_tokens=max_new_tokens,
            stop=model.tokenizer.special.stop,
            key=jax.random.key(seed),
            layout=layout,
            execution=Execution(activation_dtype=activations),
            **dataclasses.asdict(sampling),
        )
    return model.tokenizer.decode(made if chat else ids + made)


def _start(tokenizer: Tokenizer, *, wanted: bool, needed: bool) -> list[int]:
    """The token that a prompt begins with, if it is wanted, or needed and there is one."""
    bos = tokenizer.special.bos
    if wanted and bos is None:
        raise ValueError("prepend_bos is set and the tokenizer has no beginning-of-sequence token; leave it out.")
    return [bos] if bos is not None and (wanted or needed) else []
