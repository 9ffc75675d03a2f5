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


def generate_text(
    path: str,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    chat: bool,
    activations: Literal["float32", "bfloat16"] = "float32",
) -> str:
    """The prompt and what the model adds to it; with `chat`, the model's answer alone.

    An empty prompt is the begin-of-text token, where the tokenizer has one.
    """
    layout = whole_machine()
    with stage(f"opening {path}"):
        model = open_model(path, layout=layout)
    if chat:
        turn = [{"role": "user", "content": prompt}]
        ids = ChatFormat(model.tokenizer).encode(turn, add_generation_prompt=True).ids.tolist()
    else:
        ids = model.tokenizer.encode(prompt).ids.tolist()
    if not ids and model.tokenizer.special.bos is not None:
        ids = [model.tokenizer.special.bos]
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
    return model.tokenizer.decode(made) if chat else model.tokenizer.decode(ids + made)
