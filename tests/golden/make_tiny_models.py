"""Makes the tiny random models in `tiny_models/` and their scores in `tiny_models.npz`, with transformers.

    python tests/golden/make_tiny_models.py

Made with transformers 5.23.0 (the mixture: 5.24.0) and torch 2.13.0 on a CPU. Each model exercises other parts of its
family: see `MODELS`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

HERE = Path(__file__).resolve().parent
VOCAB, LENGTHS = 48, (24, 17)


@dataclasses.dataclass(frozen=True)
class Model:
    config: dict[str, Any]
    dtype: torch.dtype = torch.float32
    shard: str = "1GB"
    mixture: bool = False
    """Of the family mixtral, not llama."""
    old_layout: bool = False
    """config.json as transformers 4 wrote it."""


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
        shard="20KB",
        mixture=True,
    ),
}


def randomise(model: PreTrainedModel) -> None:
    """Weights large enough that attention is not uniform and scores differ by several nats."""
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if "norm" in name:
            parameter.data = 1 + 0.2 * noise
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


def main() -> None:
    arrays: dict[str, np.ndarray] = {}
    shutil.rmtree(HERE / "tiny_models", ignore_errors=True)
    for seed, (name, spec) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        of_config, of_model = (MixtralConfig, MixtralForCausalLM) if spec.mixture else (LlamaConfig, LlamaForCausalLM)
        model = of_model(of_config(**spec.config, attn_implementation="eager")).eval()
        randomise(model)
        model = model.to(spec.dtype)
        folder = HERE / "tiny_models" / name
        model.save_pretrained(folder, max_shard_size=spec.shard)
        (folder / "generation_config.json").unlink(missing_ok=True)
        if spec.old_layout:
            use_old_layout(folder / "config.json")
        tokens = torch.randint(VOCAB, (len(LENGTHS), max(LENGTHS)))
        mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
        # Read anew: casting the model to bfloat16 has also rounded its rotary frequencies.
        model = of_model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            scores = model(tokens, attention_mask=mask.long()).logits
        arrays[f"{name}.tokens"] = tokens.numpy().astype(np.int32)
        arrays[f"{name}.mask"] = mask.numpy().astype(np.int32)
        arrays[f"{name}.scores"] = scores.numpy()
        print(name, "largest score", scores.abs().max().item())
    np.savez_compressed(HERE / "tiny_models.npz", **arrays)


if __name__ == "__main__":
    main()
