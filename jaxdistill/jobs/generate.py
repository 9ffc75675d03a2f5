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
    layout = whole_machine()
    with stage(f"opening {path}"):
        model = open_model(path, layout=layout)
    if chat:
        turn = [{"role": "user", "content": prompt}]
        ids = ChatFormat(model.tokenizer).encode(turn, add_generation_prompt=True).ids.tolist()
    else:
        ids = _plain(model.tokenizer, prompt, prepend_bos=prepend_bos)
    with stage("generating"):
        [made] = generate(
            model.config,
            model.params,
            [ids],
            max_new_tokens=max_new_tokens,
            stop=model.tokenizer.special.stop,
            key=jax.random.key(seed),
            layout=layout,
            execution=Execution(activation_dtype=activations),
            **dataclasses.asdict(sampling),
        )
    if chat:
        return model.tokenizer.decode(made)
    return model.tokenizer.decode(ids[ids[0] == model.tokenizer.special.bos :] + made)


def _plain(tokenizer: Tokenizer, prompt: str, *, prepend_bos: bool) -> list[int]:
    ids, bos = tokenizer.encode(prompt).ids.tolist(), tokenizer.special.bos
    if prepend_bos and bos is None:
        raise ValueError("prepend_bos is set and the tokenizer has no beginning-of-sequence token; leave it out.")
    return [bos, *ids] if bos is not None and (prepend_bos or not ids) else ids
