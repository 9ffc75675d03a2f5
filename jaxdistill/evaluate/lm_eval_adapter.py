"""EleutherAI's lm-eval over a model of ours (extra `[eval]`): its tasks, our batches, on any mesh.

    from lm_eval import simple_evaluate
    from jaxdistill.evaluate.lm_eval_adapter import LmEvalModel
    simple_evaluate(LmEvalModel(open_model(PATH)), tasks=["piqa"])

This module alone imports lm-eval.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from jaxdistill.checkpoint.open import Model
from jaxdistill.data.packing import Piece
from jaxdistill.evaluate.choice import continuation_pieces
from jaxdistill.evaluate.scoring import NATS, Scoring, score, whole_piece
from jaxdistill.generate import Sampling, generate
from jaxdistill.losses.terms import Term

try:
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError("the lm-eval adapter needs lm-eval; install it with: pip install 'jaxdistill[eval]'") from error

PROMPTS_AT_ONCE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopOneAccuracy(Term):
    """1 where the model ranks the target first."""

    weight: float = 0.0

    def __call__(self, student, teacher, at, parameters):
        return (student.argmax() == at.targets).astype("float32")


SAID = {**NATS, "first": TopOneAccuracy()}


class LmEvalModel(LM):
    """A model as lm-eval sees it. scoring: the shape of batches, the mesh and the precision."""

    def __init__(self, model: Model, *, scoring: Scoring = Scoring()):
        super().__init__()
        self.model, self.scoring = model, scoring

    @property
    def tokenizer_name(self) -> str:
        return self.model.tokenizer.fingerprint

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): log p(continuation | context), and whether greedy decoding gives it."""
        pairs = [request.args for request in requests]
        return self._said(
            continuation_pieces(self.model.tokenizer, pairs, max_length=self.model.config.max_length), len(pairs)
        )

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts from the begin-of-text token on, in windows as long as the model's context."""
        pieces = [piece for group, request in enumerate(requests) for piece in self._windows(request.args[0], group)]
        return [total for total, _ in self._said(pieces, len(requests))]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues each context until one of its stop strings, a stop token, or `max_gen_toks`."""
        made: list[str | None] = [None] * len(requests)
        for settings, members in _by_settings(requests).items():
            for start in range(0, len(members), PROMPTS_AT_ONCE):
                chosen = members[start : start + PROMPTS_AT_ONCE]
                texts = self._generate([requests[i].args[0] for i in chosen], settings)
                for index, text in zip(chosen, texts, strict=True):
                    made[index] = text
        return [text for text in made if text is not None]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        from jaxdistill.data.chat import ChatFormat

        return ChatFormat(self.model.tokenizer).render(chat_history, add_generation_prompt=add_generation_prompt)

    def _said(self, pieces: list[Piece], groups: int) -> list[tuple[float, bool]]:
        sums = score({"": self.model}, pieces, groups=groups, terms=SAID, scoring=self.scoring)[""]
        targets = [0] * groups
        for piece in pieces:
            targets[piece.origin[0]] += piece.supervised
        return [
            (-float(nats), bool(round(first) == count))
            for nats, first, count in zip(sums["nats"], sums["first"], targets, strict=True)
        ]

    def _windows(self, text: str, group: int) -> list[Piece]:
        """Every token of a text is a target once. A window begins with the token before its first target."""
        tokenizer, length = self.model.tokenizer, self.model.config.max_length
        [whole] = continuation_pieces(tokenizer, [("", text)], max_length=len(text.encode()) + 2)
        ids, supervised = whole.document.ids, whole.document.supervised
        return [
            whole_piece(ids[start : start + length + 1], supervised[start : start + length + 1], group=group)
            for start in range(0, len(ids) - 1, length)
        ]

    def _generate(self, prompts: list[str], settings: _Settings) -> list[str]:
        model = self.model
        start = model.tokenizer.special.bos if model.tokenizer.special.bos is not None else model.tokenizer.special.eos
        room = model.config.max_length - settings.max_new_tokens
        if room < 1:
            raise ValueError(
                f"max_gen_toks is {settings.max_new_tokens} and the model's context {model.config.max_length}; "
                "leave room for the prompt."
            )
        ids = [encoding.ids.tolist()[-room:] for encoding in model.tokenizer.encode_batch(prompts)]
        if start is not None:
            ids = [each or [start] for each in ids]
        made = generate(
            model.config,
            model.params,
            ids,
            max_new_tokens=settings.max_new_tokens,
            stop=model.tokenizer.special.stop,
            key=jax.random.key(0),
            layout=self.scoring.layout,
            execution=self.scoring.execution,
            **dataclasses.asdict(settings.sampling),
        )
        return [_until(model.tokenizer.decode(each), settings.until) for each in made]


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What lm-eval's generation arguments mean here."""

    until: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling


def _by_settings(requests: Sequence[Any]) -> dict[_Settings, list[int]]:
    grouped: dict[_Settings, list[int]] = {}
    for index, request in enumerate(requests):
        grouped.setdefault(_settings(dict(request.args[1])), []).append(index)
    return grouped


def _settings(given: dict[str, Any]) -> _Settings:
    until = given.pop("until", ())
    most = int(given.pop("max_gen_toks", 256))
    sampled = given.pop("do_sample", True)
    temperature = float(given.pop("temperature", 0.0)) if sampled else 0.0
    sampling = Sampling(temperature=temperature, top_k=given.pop("top_k", None), top_p=given.pop("top_p", None))
    if given:
        raise ValueError(
            f"the generation arguments {sorted(given)} are not supported; allowed are until, max_gen_toks, do_sample, "
            "temperature, top_k and top_p."
        )
    return _Settings((until,) if isinstance(until, str) else tuple(until or ()), most, sampling)


def _until(text: str, stops: tuple[str, ...]) -> str:
    """The text before the first of the stop strings."""
    ends = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]
