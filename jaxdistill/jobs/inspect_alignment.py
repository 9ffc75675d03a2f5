"""What likelihood matching compares, on one text that the user gives."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxdistill.align import Chunks
from jaxdistill.checkpoint.open import has_model, open_model
from jaxdistill.choices import check_choices
from jaxdistill.data.aligned import AlignedTokenizer
from jaxdistill.data.paths import source_at
from jaxdistill.data.sources import CONVERSATION, Record
from jaxdistill.data.tokenize import appends_eos, is_pair
from jaxdistill.evaluate import Scoring, excerpts
from jaxdistill.evaluate.alignment import AlignedView, Side, aligned_view
from jaxdistill.jobs.stage import stage, whole_machine
from jaxdistill.losses.alm import ALM
from jaxdistill.models.decoder import Execution
from jaxdistill.tokenizers import load_tokenizer

ROW = 64
"""Positions of the shortest row that is scored; longer texts take powers of two."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """What is looked at, as in `jaxdistill inspect alignment --help`."""

    text: str | None
    teacher: str
    student: str
    file: str | None = None
    record: int = 0
    field: str = "text"
    bytes_per_document: int | None = 1000
    prepend_bos: bool = False
    append_eos: bool | None = None
    chunks: Chunks = "minimal"
    merge_threshold: float | None = 0.1
    temperature: float = 100.0
    white_space: tuple[str, ...] = (" ", "\t", "\n")
    activations: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        check_choices(self)
        if (self.text is None) == (self.file is None):
            given = "neither TEXT nor --file is" if self.text is None else "both TEXT and --file are"
            raise ValueError(f"{given} given; give one of them.")
        if self.text is not None and not self.text:
            raise ValueError("TEXT is empty; give at least one character.")
        if self.record < 0:
            raise ValueError(f"record is {self.record}; records are counted from 0.")
        if self.bytes_per_document is not None and self.bytes_per_document < 1:
            raise ValueError(f"bytes_per_document is {self.bytes_per_document}; give at least 1, or None for all.")


def inspect_alignment(config: AlignmentConfig) -> AlignedView:
    """Aligns the text and, on the sides that are models, scores it. Models are opened when all else is in order."""
    term = ALM(merge_threshold=config.merge_threshold, temperature=config.temperature, white_space=config.white_space)
    paths = (config.student, config.teacher)
    record, field, whole = _record(config)
    tokenizers = [load_tokenizer(path) for path in paths]
    align = AlignedTokenizer(
        *tokenizers,
        prepend_bos=config.prepend_bos,
        append_eos=(whole or bool(config.append_eos)) and appends_eos(config.append_eos, *tokenizers),
        chunks=config.chunks,
    )
    [document] = align([record], [field])
    for path, tokens in zip(paths, (document.student, document.teacher), strict=True):
        if not len(tokens):
            raise ValueError(f"the tokenizer of {path} leaves nothing of the text; give a text with other characters.")
    sides = [Side(tokenizer) for tokenizer in tokenizers]
    scoring = Scoring()
    if any(map(has_model, paths)):
        execution = Execution(activation_dtype=config.activations)
        scoring = Scoring(length=ROW, batch_size=1, layout=whole_machine(), execution=execution)
        for index, path in enumerate(paths):
            if has_model(path):
                with stage(f"opening {path}"):
                    sides[index] = Side(tokenizers[index], open_model(path, layout=scoring.layout))
    return aligned_view(document, *sides, term=term, scoring=scoring)


def _record(config: AlignmentConfig) -> tuple[Record, str, bool]:
    """What is looked at, where it keeps plain text, and whether it is whole."""
    if config.text is not None:
        return {"text": config.text}, "text", True
    assert config.file is not None
    source = source_at(config.file, field=config.field)
    records = source.open()
    if config.record >= len(records):
        raise ValueError(f"record is {config.record} and {config.file} has {len(records)}; they are counted from 0.")
    record = records[config.record]
    if config.bytes_per_document is None or CONVERSATION in record or is_pair(record):
        return record, source.field, True
    size, text = config.bytes_per_document, record[source.field]
    beginning = "".join(excerpts([text], total_bytes=size, document_bytes=size))
    return {source.field: beginning}, source.field, beginning == text
