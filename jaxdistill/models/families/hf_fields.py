"""Reading a config.json: every field is asked for, known to change nothing, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxdistill.models.families.family import ConfigError, check_fields, depth_of, positive, required_field
from jaxdistill.models.families.hf_rope import WHAT, rope_from_hf
from jaxdistill.specs import Activation, Rope

_ORIGIN = """
    _name_or_path name_or_path architectures transformers_version dtype torch_dtype _commit_hash is_llama_config
    unsloth_version unsloth_fixed transformers.js_config initializer_range use_cache return_dict torchscript
    _attn_implementation attn_implementation _attn_implementation_autoset _flash_attn_2_enabled output_attentions
    output_hidden_states use_bfloat16 tf_legacy_loss gradient_checkpointing model_type cache_implementation auto_map
"""
_GENERATION = """
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id tokenizer_class prefix
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
"""
_OTHER_TASKS = "id2label label2id num_labels problem_type finetuning_task task_specific_params"

HARMLESS = frozenset(" ".join((_ORIGIN, _GENERATION, _OTHER_TASKS)).split())
"""Fields that change nothing about the scores of a decoder: who wrote the file and how it is held in memory; ids and
settings for generation, which belong to the tokenizer and to whoever generates; heads for other tasks."""

REQUIRED: Mapping[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "pretraining_tp": 1,
    "rope_interleaved": False,
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "use_bidirectional_attention": False,
}
"""Fields that are read only at this value, which is their default."""

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
HF_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2"}

FULL, SLIDING = "full_attention", "sliding_attention"
"""Names of kinds of layers in `layer_types`."""

_ABSENT: Any = object()


class Fields:
    """A config.json that is being read. `finish` refuses what nobody asked for."""

    def __init__(self, fields: Mapping[str, Any]):
        self._fields, self._asked = dict(fields), set()

    def get(self, name: str, default: Any = None) -> Any:
        """The field as it is; the default if it is absent, None if it is null."""
        self._asked.add(name)
        return self._fields.get(name, default)

    def _given(self, name: str, default: Any) -> dict[str, Any]:
        """The field and its name; the default if it is absent or null."""
        found = self.get(name)
        return {name: default if found is None else found}

    def size(self, name: str, default: int | None = None) -> int:
        """A positive number; the default if it is absent or null."""
        return required_field(WHAT, self._given(name, default), name, int)

    def count(self, name: str, default: int) -> int:
        """A number that may be 0; the default if it is absent or null."""
        return 0 if self.get(name) == 0 else self.size(name, default)

    def depth(self, default: int | None = None) -> int:
        """The number of layers."""
        name = "num_hidden_layers"
        return depth_of(WHAT, self._given(name, default), name)

    def items(self, name: str, kind: type, default: Sequence[Any] = ()) -> list[Any]:
        """A list of values of one type; the default if it is absent, null or empty."""
        found = self.get(name) or list(default)
        if not isinstance(found, list) or not all(type(entry) is kind for entry in found):
            raise ConfigError(f"{WHAT} has {name} = {found!r:.80}; a list of {kind.__name__} is needed. Correct it.")
        return found

    def number(self, name: str, default: float | None = None) -> float:
        """A number above 0; the default if it is absent or null."""
        return positive(WHAT, self._given(name, default), name)

    def flag(self, name: str, default: bool | None = None) -> bool:
        return required_field(WHAT, self._given(name, default), name, bool)

    def size_or_none(self, name: str, default: int | None = None) -> int | None:
        """A positive number, or None where the field is null, which is not the same as absent here."""
        found = self.get(name, default)
        return None if found is None else required_field(WHAT, {name: found}, name, int)

    def number_or_none(self, name: str, default: float | None = None) -> float | None:
        """A number above 0, or None where the field is null."""
        found = self.get(name, default)
        return None if found is None else positive(WHAT, {name: found}, name)

    def activation(self, name: str = "hidden_act", default: str = "silu") -> Activation:
        found = self.get(name) or default
        if not isinstance(found, str) or found not in ACTIVATIONS:
            raise ConfigError(f"{WHAT} has {name} = {found!r}; allowed are {', '.join(ACTIVATIONS)}.")
        return ACTIVATIONS[found]

    def rope(self, *, theta: float = 10_000.0, fraction: float | None = None, **options: Any) -> Rope:
        """The rotary embedding; see `rope_from_hf`."""
        names = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "max_position_embeddings")
        given = {name: self.get(name) for name in (*names, "original_max_position_embeddings")}
        return rope_from_hf(given, theta=theta, fraction=fraction, **options)

    def repeated(self, name: str, value: float | None, *others: str) -> None:
        """Other names that published files have for a field that is read: they must say the same as it."""
        for other in others:
            if (found := self.get(other)) is not None and (isinstance(found, bool) or found != value):
                raise ConfigError(
                    f"{WHAT} has {other} = {found!r:.80}, and {name} is {value}: this family reads the latter. "
                    f"Correct one of them, or remove {other}."
                )

    def layer_types(self, depth: int, window: int | None, default: Callable[[int], str]) -> list[str]:
        """The kind of every layer. window: of those that have one."""
        found = self.items("layer_types", str, [default(layer) for layer in range(depth)])
        if len(found) != depth or not {*found} <= {FULL, SLIDING}:
            raise ConfigError(
                f"{WHAT} has layer_types {found}; allowed are {FULL} and {SLIDING}, one for each of {depth} layers."
            )
        if SLIDING in found and window is None:
            raise ConfigError(
                f"{WHAT} has layers of the kind {SLIDING}, but no window: sliding_window is "
                f"{self.get('sliding_window')!r:.80} and use_sliding_window is {self.get('use_sliding_window')!r:.80}. "
                "Say the window, or make all layers full_attention."
            )
        return found

    def finish(self, *, required: Mapping[str, Any] | None = None, ignored: Sequence[str] = ()) -> None:
        """Refuses, by name, every field that was not asked for and is not known to change nothing. required: fields
        that are read only at one value."""
        # What is handled or ignored here is so whatever other families require of it.
        known = {*self._asked, *ignored}
        needed = {name: value for name, value in REQUIRED.items() if name not in known} | dict(required or {})
        check_fields(WHAT, self._fields, handled=HARMLESS | known, required=needed)
