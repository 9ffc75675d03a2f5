"""The evaluation that the command line asks for: models and texts from files, one table, one JSON file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from jaxdistill.assets import asset
from jaxdistill.checkpoint.open import Model, open_model
from jaxdistill.choices import check_choices
from jaxdistill.data.paths import source_at
from jaxdistill.data.sources import Source
from jaxdistill.evaluate import (
    Averaged,
    ChoiceItem,
    Evaluation,
    Scoring,
    ensemble,
    evaluate_text,
    excerpts,
    multiple_choice,
    read_items,
)
from jaxdistill.formats.paths import any_path, write_text
from jaxdistill.jobs.stage import counted, stage, whole_machine
from jaxdistill.models.decoder import Execution

HELDOUT_DOMAIN_FIELD = "type"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured, as in `jaxdistill evaluate --help`."""

    models: tuple[str, ...]
    teacher: str | None
    ensemble: Averaged | None
    text: tuple[str, ...]
    heldout: bool
    field: str
    domain_field: str | None
    bytes_per_domain: int | None
    bytes_per_document: int | None
    piqa: int | None
    choices: str | None
    prompt: str
    length: int
    batch_size: int
    prepend_bos: bool
    activations: Literal["float32", "bfloat16"]
    out: str | None

    def __post_init__(self):
        check_choices(self)
        if not (self.models or self.teacher):
            raise ValueError("no model; give at least one path.")
        if self.ensemble is not None and len(self.models) < 2:
            raise ValueError(f"--ensemble averages at least two models; given: {list(self.models)}.")
        if not (self.text or self.heldout or self.piqa or self.choices):
            raise ValueError("nothing to evaluate on; give --text FILE, --heldout, --piqa ITEMS or --choices FILE.")


def evaluate_models(config: EvaluateConfig) -> Evaluation:
    """Prints the table, and writes the numbers where they are asked for."""
    domains, sets = read_domains(config), _choice_sets(config)
    scoring = Scoring(
        length=config.length,
        batch_size=config.batch_size,
        layout=whole_machine(),
        execution=Execution(activation_dtype=config.activations),
    )
    paths = ([config.teacher] if config.teacher else []) + list(config.models)
    names = _names(paths)
    models: dict[str, Model] = {}
    for name, path in zip(names, paths, strict=True):
        with stage(f"opening {path}"):
            models[name] = open_model(path, layout=scoring.layout)
    teacher = names[0] if config.teacher else None
    if config.ensemble is not None:
        several = {name: model for name, model in models.items() if name != teacher}
        models[f"mean of {config.ensemble}"] = ensemble(several, config.ensemble)
    text = {}
    if domains:
        with counted("text") as progress:
            text = evaluate_text(
                models, domains, teacher=teacher, prepend_bos=config.prepend_bos, scoring=scoring, progress=progress
            )
    choices: dict[str, dict] = {name: {} for name in models} if sets else {}
    for title, items in sets.items():
        for name, model in models.items():
            with counted(f"{title}: {name}") as progress:
                choices[name][title] = multiple_choice(
                    model, items, prepend_bos=config.prepend_bos, scoring=scoring, progress=progress
                )
    evaluation = Evaluation(text=text, choices=choices, teacher=teacher)
    print(evaluation.table())
    if config.out is not None:
        write_text(config.out, json.dumps(evaluation.to_dict(), indent=1) + "\n")
    return evaluation


def read_domains(config: EvaluateConfig) -> dict[str, list[str]]:
    """Texts by domain, no more of them than asked for."""
    found: dict[str, list[str]] = {}
    for path in config.text:
        grouped = _grouped(source_at(path, field=config.field), config.domain_field, Path(path).stem)
        if twice := sorted(found.keys() & grouped.keys()):
            raise ValueError(f"the domains {twice} occur in more than one file; rename a file or a domain.")
        found |= grouped
    if config.heldout:
        found |= _grouped(source_at(asset("heldout")), HELDOUT_DOMAIN_FIELD, "heldout")
    unlimited = 1 << 62
    return {
        domain: excerpts(
            texts,
            total_bytes=config.bytes_per_domain or unlimited,
            document_bytes=config.bytes_per_document or unlimited,
        )
        for domain, texts in found.items()
    }


def _grouped(source: Source, domain_field: str | None, name: str) -> dict[str, list[str]]:
    records, grouped = source.open(), {}
    for index in range(len(records)):
        record = records[index]
        if source.field not in record:
            raise ValueError(
                f"record {index} of {name} is a conversation or a pair and has no {source.field!r}; held-out text is "
                "plain. Give --field NAME."
            )
        if domain_field is not None and domain_field not in record:
            raise ValueError(f"record {index} of {name} has no field {domain_field!r}; it has {sorted(record)}.")
        domain = name if domain_field is None else str(record[domain_field])
        grouped.setdefault(domain, []).append(record[source.field])
    return grouped


def _choice_sets(config: EvaluateConfig) -> Mapping[str, list[ChoiceItem]]:
    sets = {}
    if config.piqa is not None:
        sets["PIQA"] = read_items(asset("piqa"), prompt=config.prompt, limit=config.piqa)
    if config.choices is not None:
        sets[Path(config.choices).stem] = read_items(config.choices, prompt=config.prompt)
    return sets


def _names(paths: list[str]) -> list[str]:
    """The last part of each path, and as many before it as tell them apart."""
    if len(set(paths)) != len(paths):
        raise ValueError(f"a model is given twice: {paths}.")
    parts = [any_path(path).absolute().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"two of the models are the same: {paths}.")
