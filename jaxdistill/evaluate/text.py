"""Held-out text: bits per byte of any model, and how close students are to their teacher, by domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jaxdistill.checkpoint.open import Model
from jaxdistill.data.packing import Piece, cut
from jaxdistill.data.tokenize import DocumentTokenizer
from jaxdistill.evaluate.results import TextScore
from jaxdistill.evaluate.scoring import NATS, Progress, Scoring, score, silent
from jaxdistill.losses.terms import ForwardKL, TopOneAgreement
from jaxdistill.tokenizers.base import Tokenizer

COMPARED = {"kl_nats": ForwardKL(), "agreements": TopOneAgreement()}


def evaluate_text(
    models: Mapping[str, Model],
    domains: Mapping[str, Sequence[str]],
    *,
    teacher: str | None = None,
    compare: Sequence[str] | None = None,
    prepend_bos: bool = False,
    scoring: Scoring = Scoring(),
    progress: Progress = silent,
) -> dict[str, dict[str, TextScore]]:
    """For each model and domain: bits per byte, KL(teacher ‖ model) in nats and top-1 agreement with the teacher.

    domains: texts by name; all of them are evaluated, each cut into windows of `scoring.length` targets that do not
    see each other (see `excerpts` to choose less). The first token of a text is predicted by nothing and is left out,
    unless `prepend_bos`.
    teacher: the name of one of the models. compare: which ones to compare with it; None is all that share its
    vocabulary, others then have bits per byte alone, which are comparable across tokenizers. Raises ValueError for a
    model in `compare` whose vocabulary differs.
    """
    if teacher is not None and teacher not in models:
        raise ValueError(f"the teacher is {teacher!r}, which is not among the models {list(models)}.")
    if compare and teacher is None:
        raise ValueError(f"{list(compare)} are to be compared and no teacher is named; give teacher=NAME.")
    if not domains or not models:
        raise ValueError(f"{len(models)} models and {len(domains)} domains are given; at least one of each is needed.")
    compared = _compared(models, teacher, compare)
    results: dict[str, dict[str, TextScore]] = {}
    groups = _groups(models, compared)
    batches_of = _Stages(progress, len(groups))
    for names, lead in groups:
        members = {name: models[name] for name in names}
        pieces = _pieces(models[lead].tokenizer, domains, length=scoring.length, prepend_bos=prepend_bos)
        sums = score(
            members,
            pieces,
            groups=len(domains),
            terms=NATS,
            teacher=models[teacher] if teacher in names else None,
            compared=COMPARED,
            scoring=scoring,
            progress=batches_of.next_stage(),
        )
        counts = _counts(pieces, len(domains))
        for name in names:
            results[name] = {
                domain: TextScore(**{term: float(total[index]) for term, total in sums[name].items()}, **counts[index])
                for index, domain in enumerate(domains)
            }
    return {name: results[name] for name in models}


def excerpts(texts: Sequence[str], *, total_bytes: int, document_bytes: int) -> list[str]:
    """The beginnings of the first texts, at most `document_bytes` of each and `total_bytes` in all (UTF-8).

    A fixed amount of text costs about the same whatever the tokenizer, and is the same text for all of them.
    """
    chosen, room = [], total_bytes
    for text in texts:
        if room <= 0:
            break
        data = text.encode()[: min(document_bytes, room)]
        chosen.append(data.decode(errors="ignore"))  # less the character that was cut in two
        room -= len(data)
    return [text for text in chosen if text]


def same_vocabulary(one: Model, other: Model) -> bool:
    """Whether ids mean the same in both models, so that distributions over them can be compared."""
    a, b = one.tokenizer, other.tokenizer
    if one.config.vocab != other.config.vocab:
        return False
    return a is b or a.fingerprint == b.fingerprint or a.token_bytes() == b.token_bytes()


def _compared(models: Mapping[str, Model], teacher: str | None, compare: Sequence[str] | None) -> list[str]:
    """The teacher and the models that are compared with it."""
    if teacher is None:
        return []
    same = [name for name in models if name == teacher or same_vocabulary(models[name], models[teacher])]
    for name in compare or ():
        if name not in models:
            raise ValueError(f"{name!r} is to be compared and is not among the models {list(models)}.")
        if name not in same:
            raise ValueError(
                f"{name!r} cannot be compared with {teacher!r} token by token: their vocabularies differ "
                f"({models[name].config.vocab} and {models[teacher].config.vocab} ids, tokenizers "
                f"{models[name].tokenizer.fingerprint[:12]} and {models[teacher].tokenizer.fingerprint[:12]}), so KL "
                "and agreement mean nothing. Leave it out of `compare`: bits per byte are comparable."
            )
    return same if compare is None else [name for name in same if name == teacher or name in compare]


def _groups(models: Mapping[str, Model], compared: Sequence[str]) -> list[tuple[list[str], str]]:
    """Models that run on the same tokens, each group with the model whose tokenizer makes them."""
    groups: list[tuple[list[str], str]] = [(list(compared), compared[0])] if compared else []
    for name in models:
        if name in compared:
            continue
        # Not with the compared ones: there every model is set beside the teacher.
        alone = groups[1:] if compared else groups
        home = next((names for names, lead in alone if same_vocabulary(models[name], models[lead])), None)
        if home is None:
            groups.append(([name], name))
        else:
            home.append(name)
    return groups


def _pieces(
    tokenizer: Tokenizer, domains: Mapping[str, Sequence[str]], *, length: int, prepend_bos: bool
) -> list[Piece]:
    tokenize = DocumentTokenizer(tokenizer, prepend_bos=prepend_bos, append_eos=False)
    pieces: list[Piece] = []
    for index, (domain, texts) in enumerate(domains.items()):
        records = [{"text": text} for text in texts]
        found = [
            piece
            for document in tokenize(records, ["text"] * len(records))
            for piece in cut(document, length=length, long_documents="split", origin=(index,))[0]
        ]
        if not found:
            raise ValueError(
                f"the domain {domain!r} has {len(texts)} texts and nothing to predict: each is empty or one token. "
                "Give longer texts, or leave the domain out."
            )
        pieces += found
    return pieces


def _counts(pieces: Sequence[Piece], groups: int) -> list[dict[str, int]]:
    """Supervised targets of each group, and the bytes that they stand for."""
    counts = [{"tokens": 0, "bytes": 0} for _ in range(groups)]
    for piece in pieces:
        targets = slice(piece.start + 1, piece.stop + 1)
        supervised = piece.document.supervised[targets]
        group = counts[piece.origin[0]]
        group["tokens"] += int(supervised.sum())
        group["bytes"] += int(piece.document.text_bytes[targets][supervised].sum(dtype=np.int64))
    return counts


class _Stages:
    """Progress over several calls of `score`, as one."""

    def __init__(self, progress: Progress, stages: int):
        self._progress, self._stages, self._stage = progress, stages, -1

    def next_stage(self) -> Progress:
        self._stage += 1
        before = self._stage

        def report(done: int, total: int) -> None:
            self._progress(before * total + done, self._stages * total)

        return report
