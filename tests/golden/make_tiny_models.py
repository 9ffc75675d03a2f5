"""Makes the tiny random models in `tiny_models/` and their scores in `tiny_models.npz`, with transformers.

    python tests/golden/make_tiny_models.py NAME ...    # those that are named; without a name all

Made with transformers 5.23.0 (all but the first three: 5.24.0) and torch 2.13.0 on a CPU. Each model exercises other
parts of its family: see `MODELS`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

HERE = Path(__file__).resolve().parent
VOCAB, LENGTHS = 48, (24, 17)


@dataclasses.dataclass(frozen=True)
class Model:
    config: dict[str, Any]
    family: str = "llama"
    dtype: torch.dtype = torch.float32
    shard: str = "1GB"
    old_layout: bool = False
    """config.json as transformers 4 wrote it."""


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
ROPE = {"rope_type": "default", "rope_theta": 500.0}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
}
SHAPE = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
MODELS = {
    # Heads wider than hidden_size / heads, two queries per key, head tied to the embedding.
    "tied_wide_heads": Model(
        {
            **SHAPE,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        }
    ),
    # As many keys as queries, biases everywhere, a gelu, linear interpolation, bfloat16 in several files.
    "biases_linear": Model(
        {
            **SHAPE,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "attention_bias": True,
            "mlp_bias": True,
            "hidden_act": "gelu_pytorch_tanh",
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        },
        dtype=torch.bfloat16,
        shard="6KB",
        old_layout=True,
    ),
    # One key for four queries; rows three times as long as the original context of the interpolation.
    "llama3_rope": Model(
        {
            **SHAPE,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8,
            },
        }
    ),
    # Five experts, three for each token, in several files.
    "mixture": Model(
        {
            **SHAPE,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
        family="mixtral",
        shard="20KB",
    ),
    # A window of 7 in rows of 24; more dimensions in heads than hidden_size.
    "mistral_window": Model(
        {**SHAPE, **HEADS, "head_dim": 8, "sliding_window": 7, "rope_parameters": ROPE}, family="mistral"
    ),
    # Biases on query, key and value; two layers without a window and one with; YaRN.
    "qwen2_yarn": Model(
        {
            **SHAPE,
            **HEADS,
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 2,
            "max_position_embeddings": 64,
            "rope_parameters": {**YARN, "rope_theta": 500.0},
        },
        family="qwen2",
    ),
    "qwen3": Model(
        {**SHAPE, **HEADS, "head_dim": 8, "rope_parameters": ROPE, "tie_word_embeddings": True}, family="qwen3"
    ),
    "gemma": Model({**SHAPE, **HEADS, "head_dim": 8, "rope_parameters": ROPE}, family="gemma"),
    # Caps that matter, and a scale that is not head_dim's.
    "gemma2": Model(
        {
            **SHAPE,
            **HEADS,
            "num_hidden_layers": 4,
            "head_dim": 8,
            "sliding_window": 6,
            "query_pre_attn_scalar": 3,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "rope_parameters": ROPE,
        },
        family="gemma2",
    ),
    # Two turns of two layers with a window and one without, and one layer more.
    "gemma3": Model(
        {
            **SHAPE,
            **HEADS,
            "num_hidden_layers": 7,
            "head_dim": 8,
            "sliding_window": 6,
            "layer_types": [*["sliding_attention", "sliding_attention", "full_attention"] * 2, "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        family="gemma3_text",
    ),
    # Rows of 24 are longer than the original context; half of each head is rotated.
    "phi3_long": Model(
        {
            **SHAPE,
            **HEADS,
            "hidden_size": 32,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 16,
            "pad_token_id": 0,
            "sliding_window": 9,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.1],
                "long_factor": [2.0, 5.0],
            },
        },
        family="phi3",
    ),
    "phi3_short": Model(
        {
            **SHAPE,
            **HEADS,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 32,
            "pad_token_id": 0,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "short_factor": [1.0, 1.5],
                "long_factor": [2.0, 5.0],
            },
        },
        family="phi3",
    ),
    "olmo2": Model({**SHAPE, **HEADS, "rope_parameters": ROPE}, family="olmo2"),
    "nemotron": Model({**SHAPE, **HEADS, "head_dim": 8, "mlp_bias": True, "rope_parameters": ROPE}, family="nemotron"),
    # Of three layers the second does not rotate, and has a window.
    "smollm3": Model(
        {
            **SHAPE,
            **HEADS,
            "num_hidden_layers": 3,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 6,
            "pad_token_id": 0,
            "rope_parameters": ROPE,
        },
        family="smollm3",
    ),
    # A layer without a mixture; shares that are not renormalised.
    "qwen3_moe": Model(
        {
            **SHAPE,
            **HEADS,
            "num_hidden_layers": 3,
            "head_dim": 8,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 12,
            "mlp_only_layers": [1],
            "rope_parameters": ROPE,
        },
        family="qwen3_moe",
    ),
}


def randomise(model: PreTrainedModel) -> None:
    """Weights large enough that attention is not uniform and scores differ by several nats."""
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if "norm" in name and name.endswith("weight"):
            parameter.data = float(parameter.data.flatten()[0]) + 0.2 * noise  # around what it starts as
        elif name.endswith("bias"):
            parameter.data = 0.3 * noise
        elif "embed_tokens" in name or "lm_head" in name:
            parameter.data = 0.5 * noise
        else:
            parameter.data = noise * parameter.shape[-1] ** -0.5
    model.tie_weights()


def use_old_layout(file: Path) -> None:
    fields = json.loads(file.read_text())
    del fields["head_dim"]  # then always hidden_size / heads
    rope = fields.pop("rope_parameters")
    fields["rope_theta"] = rope.pop("rope_theta")
    fields["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    fields["torch_dtype"] = fields.pop("dtype")
    fields["transformers_version"] = "4.38.0"
    file.write_text(json.dumps(fields, indent=2) + "\n")


def main(chosen: list[str]) -> None:
    file = HERE / "tiny_models.npz"
    arrays: dict[str, np.ndarray] = dict(np.load(file)) if chosen else {}
    for seed, (name, spec) in enumerate(MODELS.items()):
        if chosen and name not in chosen:
            continue
        torch.manual_seed(seed)
        # A copy: transformers writes into what it is given.
        config = AutoConfig.for_model(spec.family, **copy.deepcopy(spec.config), attn_implementation="eager")
        model = AutoModelForCausalLM.from_config(config).eval()
        randomise(model)
        model = model.to(spec.dtype)
        folder = HERE / "tiny_models" / name
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder, max_shard_size=spec.shard)
        (folder / "generation_config.json").unlink(missing_ok=True)
        if spec.old_layout:
            use_old_layout(folder / "config.json")
        tokens = torch.randint(VOCAB, (len(LENGTHS), max(LENGTHS)))
        mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
        # Read anew: casting the model to bfloat16 has also rounded its rotary frequencies.
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            scores = model(tokens, attention_mask=mask.long()).logits
        arrays[f"{name}.tokens"] = tokens.numpy().astype(np.int32)
        arrays[f"{name}.mask"] = mask.numpy().astype(np.int32)
        arrays[f"{name}.scores"] = scores.numpy()
        print(name, "largest score", scores.abs().max().item())
    np.savez_compressed(file, **arrays)


if __name__ == "__main__":
    main(sys.argv[1:])
