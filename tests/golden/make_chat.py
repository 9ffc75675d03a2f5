"""Writes chat.json: conversations as text, ids and assistant masks by transformers' `apply_chat_template`.

Each case runs on a saved tokenizer (raw bytes, or SmolLM2's with its own template). Run with the extra `[parity]`:
`python tests/golden/make_chat.py`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from jaxdistill.assets import asset
from jaxdistill.tokenizers import load_tokenizer
from jaxdistill.tokenizers.byte_level import ByteTokenizer

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\n"
    "    {{ '<|im_start|>system\nBe kind<|im_end|>\n' }}\n{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMED = (
    "{{ bos_token }}\n{%- for message in messages %}\n    {%- if message.role == 'assistant' %}\n"
    "        {{- '(' + message.content | trim + ')' + eos_token }}\n    {%- else %}\n"
    "        {{- '[' + message | tojson + ']' }}\n    {%- endif %}\n{%- endfor %}\n"
)
MARKED = (
    "{%- for message in messages -%}\n{%- if loop.index0 == 9 %}{% break %}{% endif -%}\n"
    "{{ '<|im_start|>' + message['role'] + '\n' }}{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{ message['content'] + '<|im_end|>' }}{%- endgeneration -%}"
    "{%- else -%}{{ message['content'] + '<|im_end|>' }}{%- endif -%}{{ '\n' }}{%- endfor -%}"
)
TEMPLATES = {"chatml": CHATML, "trimmed": TRIMMED, "marked": MARKED, "smollm2": None}

CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "  Hello é <b>\n"}],
    [
        {"role": "system", "content": "You are 1 helper."},
        {"role": "user", "content": "東京?\n\n  two"},
        {"role": "assistant", "content": "Yes 😀."},
        {"role": "user", "content": 'say "<|im_end|>"'},
        {"role": "assistant", "content": "No"},
    ],
    [{"role": "user", "content": " alone "}],
]


def case(reference: Any, name: str, messages: list[dict], add_generation_prompt: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {"add_generation_prompt": add_generation_prompt}
    wanted = {"return_assistant_tokens_mask": True} if name == "marked" else {}
    found = reference.apply_chat_template(messages, tokenize=True, return_dict=True, **settings, **wanted)
    return {
        "template": name,
        "messages": messages,
        "add_generation_prompt": add_generation_prompt,
        "text": reference.apply_chat_template(messages, tokenize=False, **settings),
        "ids": found["input_ids"],
        "assistant": found["assistant_masks"] if wanted else None,
    }


def golden() -> dict[str, Any]:
    cases = []
    for name, template in TEMPLATES.items():
        tokenizer = load_tokenizer(asset("smollm2")) if template is None else ByteTokenizer(chat_template=template)
        with tempfile.TemporaryDirectory() as directory:
            tokenizer.save(directory)
            (Path(directory) / "config.json").write_text('{"model_type": "llama"}')
            reference = AutoTokenizer.from_pretrained(directory)
        cases += [case(reference, name, messages, prompt) for messages in CONVERSATIONS for prompt in (False, True)]
    return {"templates": TEMPLATES, "cases": cases}


if __name__ == "__main__":
    file = Path(__file__).with_name("chat.json")
    file.write_text(json.dumps(golden(), indent=None, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(f"wrote {file}")
