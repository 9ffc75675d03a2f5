"""Multiple choice: the option that a model finds most probable, in all and for each of its bytes."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence

import numpy as np

from jaxdistill.checkpoint.open import Model
from jaxdistill.data.packing import Piece
from jaxdistill.evaluate.results import ChoiceScore
from jaxdistill.evaluate.scoring import Progress, Scoring, score, silent, whole_piece
from jaxdistill.formats.paths import AnyPath, any_path
from jaxdistill.tokenizers.base import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoiceItem:
    """A question: `context`, what may follow it, and which of these is right (its index)."""

    context: str
    options: tuple[str, ...]
    answer: int

    def __post_init__(self):
        if len(self.options) < 2 or not all(self.options) or not 0 <= self.answer < len(self.options):
            raise ValueError(
                f"an item has the options {self.options} and the answer {self.answer}; it needs at least two options, "
                "none empty, and the index of the right one."
            )


def multiple_choice(
    model: Model,
    items: Sequence[ChoiceItem],
    *,
    separator: str = " ",
    prepend_bos: bool = False,
    scoring: Scoring = Scoring(),
    progress: Progress = silent,
) -> ChoiceScore:
    """How often the right option has the largest log-probability: summed, and divided by the option's UTF-8 bytes.

    Context, separator and option are encoded as one text, as a model would meet them. The option's tokens are those
    that reach beyond the context; one that straddles the boundary counts whole, so that every byte of the option is
    scored. prepend_bos: begin each text with the beginning-of-sequence token. Of a text longer than the model's context
    its end is scored. Raises ValueError when there are no items, or nothing precedes an option.
    """
    if not items:
        raise ValueError("there are no items to score; give at least one.")
    pairs = [(item.context, separator + option) for item in items for option in item.options]
    pieces = continuation_pieces(model.tokenizer, pairs, max_length=model.config.max_length, prepend_bos=prepend_bos)
    sums = score({"model": model}, pieces, groups=len(pieces), scoring=scoring, progress=progress)["model"]
    right_summed = right_per_byte = at = 0
    for item in items:
        log_probs = -sums["nats"][at : at + len(item.options)]
        sizes = np.array([len(option.encode()) for option in item.options])
        right_summed += int(log_probs.argmax() == item.answer)
        right_per_byte += int((log_probs / sizes).argmax() == item.answer)
        at += len(item.options)
    return ChoiceScore(items=len(items), summed=right_summed / len(items), per_byte=right_per_byte / len(items))


def continuation_pieces(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], *, max_length: int, prepend_bos: bool = False
) -> list[Piece]:
    """Each (context, continuation) as one piece of a group of its own, supervised on the continuation's tokens.

    An empty context is replaced by the begin- (or end-) of-text token. Texts are cut on the left to `max_length`
    inputs; a continuation that is longer than this is refused. prepend_bos: begin each text with the
    beginning-of-sequence token, which the tokenizer must have.
    """
    if prepend_bos and tokenizer.special.bos is None:
        raise ValueError("prepend_bos is set and the tokenizer has no beginning-of-sequence token; unset it.")
    start = tokenizer.special.bos if tokenizer.special.bos is not None else tokenizer.special.eos
    pieces = []
    encodings = tokenizer.encode_batch([context + continuation for context, continuation in pairs])
    for group, ((context, continuation), encoding) in enumerate(zip(pairs, encodings, strict=True)):
        ids, supervised = encoding.ids, encoding.offsets[:, 1] > len(context.encode())
        if len(ids) and (prepend_bos or supervised[0]) and start is not None:
            ids, supervised = np.insert(ids, 0, start), np.insert(supervised, 0, False)
        if not supervised.any() or supervised[0]:
            raise ValueError(
                f"the continuation {continuation[:60]!r} has no token that something precedes (its context is "
                f"{context[-60:]!r}, and the tokenizer has no begin-of-text token). Give a context and a continuation."
            )
        if np.count_nonzero(supervised) > max_length:
            raise ValueError(
                f"a continuation has {np.count_nonzero(supervised)} tokens and the model takes {max_length}; "
                f"shorten it. It begins {continuation[:60]!r}."
            )
        pieces.append(whole_piece(ids[-max_length - 1 :], supervised[-max_length - 1 :], group=group))
    return pieces


def read_items(
    path: AnyPath, *, prompt: str = "Question: {question}\nAnswer:", limit: int | None = None
) -> list[ChoiceItem]:
    """Items of a JSON Lines file with the fields question, options ("A. …\\nB. …") and answer (one whole option).

    prompt: the context, with fields of the row in braces. limit: the first so many rows; None takes all. Raises
    ValueError with the line of a row that is not such an item.
    """
    items = []
    with any_path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and len(items) == limit:
                break
            if line.strip():
                items.append(_item(line, prompt, f"{path}, line {number}"))
    if not items:
        raise ValueError(f"{path} has no items; give a file with one JSON object per line.")
    return items


def _item(line: str, prompt: str, where: str) -> ChoiceItem:
    try:
        row = json.loads(line)
        labelled = re.split(r"(?m)^(?=[A-Z]\. )", row["options"])
        options = [option.strip() for option in labelled if option.strip()]
        answer = options.index(row["answer"].strip())
        context = prompt.format_map(row)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where}: not a multiple-choice item ({type(error).__name__}: {error}). Needed are an object with "
            'question, options like "A. …\\nB. …", and answer, which repeats one of the options; prompt may name '
            "fields of the row."
        ) from None
    return ChoiceItem(context=context, options=tuple(option[3:].strip() for option in options), answer=answer)
