"""config.json files damaged at random: reading them gives a configuration or `ConfigError`, and costs little memory."""

import copy
import json
import random
import traceback
import tracemalloc

import pytest
from tiny import TINY_MODELS

from jaxdistill import specs
from jaxdistill.formats.source import FormatError
from jaxdistill.models.families import FAMILIES
from jaxdistill.models.families.family import ConfigError
from jaxdistill.models.load import model_config

SAMPLES = sorted(folder.name for folder in TINY_MODELS.iterdir())
HOSTILE = (
    *(None, True, False, 0, -1, 1, 2, 7, 64, 10**6, 10**9, 10**30, -(10**30), 0.0, 1.5, -2.0, 1e-300, 1e300),
    *(float("nan"), float("inf"), "", "x", "12", "full_attention", "yarn", "longrope", "default"),
    *([], [1], ["a"], [None], [[]], ["full_attention"], [0.5] * 4, {}, {"a": 1}, {"rope_type": []}, {"factor": 0}),
)


def containers(value) -> list[dict | list]:
    """All objects and arrays in a document that hold something."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = [value] if isinstance(value, dict | list) and value else []
    return own + [found for entry in inside for found in containers(entry)]


def damage(rng: random.Random, fields: dict) -> dict:
    """A few random faults: values of another kind or size, fields that are missing, exchanged or unknown."""
    fields = copy.deepcopy(fields)
    for _ in range(rng.randint(1, 4)):
        place = rng.choice(containers(fields))
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key, other = rng.choice(keys), rng.choice(keys)
        fault = rng.randrange(6)
        if fault < 3:
            place[key] = copy.deepcopy(rng.choice(HOSTILE))
        elif fault == 3:
            place[key], place[other] = place[other], place[key]
        elif fault == 4 and len(place) > 1:
            del place[key]
        elif isinstance(place, dict):
            place[f"{key}_"] = copy.deepcopy(rng.choice(HOSTILE))
    return fields


def fuzz(name: str, *, rounds: int, seed: int) -> tuple[int, int, int]:
    """Returns (refused, read, peak of traced memory in bytes)."""
    fields = json.loads((TINY_MODELS / name / "config.json").read_text())
    family, rng = FAMILIES[fields["model_type"]], random.Random(seed)
    refused = read = 0
    tracemalloc.start()
    try:
        for _ in range(rounds):
            damaged = damage(rng, fields)
            try:
                assert isinstance(family.from_hf(damaged), specs.ModelConfig)
                read += 1
            except Exception as error:
                if not is_refusal(error):
                    error.add_note(json.dumps(damaged))
                    raise
                refused += 1
        return refused, read, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def is_refusal(error: Exception) -> bool:
    """A message of ours: of a family, or of a spec that no model can have; other errors are accidents."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = isinstance(error, ConfigError) or (isinstance(error, ValueError) and raised_in == specs.__file__)
    return ours and len(str(error)) > 40


def check(name: str, *, rounds: int, seed: int) -> None:
    refused, read, peak = fuzz(name, rounds=rounds, seed=seed)
    assert refused > rounds / 4
    assert read > 0
    assert peak < 30_000_000  # the largest number of layers that is read


@pytest.mark.parametrize("name", SAMPLES)
def test_damaged_configs(name):
    check(name, rounds=200, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLES)
def test_damaged_configs_at_length(name):
    check(name, rounds=100_000 // len(SAMPLES), seed=1)


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b'{"model_type": 1e999}', b"\xff\xfe", b"9" * 5000])
def test_damaged_text(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises((FormatError, ConfigError), match=r"config\.json"):
        model_config(tmp_path)


@pytest.mark.parametrize("kind", [[], {}, 3, True, "bert"])
def test_an_unknown_kind_of_model_is_refused(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ConfigError, match="model_type is"):
        model_config(tmp_path)
