"""Recipes: Python files whose `get_config()` returns what a command runs, and the settings that are given after them.

Nothing heavy is imported here that the recipe does not import itself.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import tyro


class RecipeError(ValueError):
    """A recipe that is not there, or cannot be run as it is."""


def parse_recipe(recipe: str, overrides: Sequence[str], *, kind: type | None = None, command: str = "train") -> Any:
    """A recipe's configuration with the settings of a command line. Imports what the recipe imports, no more.
    kind: what the command runs; None is a TrainConfig.

    Kinds (which losses, which optimizer) are the recipe's; the command line sets the numbers, names and choices in
    them. A number that may be a schedule takes a number.
    """
    module = load_recipe(recipe)
    default = _default_config(module, recipe, kind)
    return tyro.cli(
        type(default),
        default=default,
        args=list(overrides),
        prog=f"jaxdistill {command} {recipe}",
        description=inspect.cleandoc(module.__doc__ or ""),
        config=(tyro.conf.AvoidSubcommands,),
        registry=_registry(),
    )


def load_recipe(recipe: str) -> ModuleType:
    """The Python file as a module; files beside it can be imported by it."""
    path = Path(recipe).expanduser()
    if not path.is_file():
        found = sorted(str(file) for file in path.parent.glob("*.py")) if path.parent.is_dir() else []
        others = f"in {path.parent} there are {', '.join(found)}" if found else f"{path.parent} has no recipes"
        raise RecipeError(f"there is no recipe {recipe}; {others}.")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    if path.suffix != ".py" or spec is None or spec.loader is None:
        raise RecipeError(f"{recipe} is not a Python file; a recipe is NAME.py with a function get_config().")
    module = importlib.util.module_from_spec(spec)
    # Annotations are resolved through here, and the recipe's own losses may stand in files beside it.
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _recipe_error(path, error) from error
    return module


def _default_config(module: ModuleType, recipe: str, kind: type | None) -> Any:
    from jaxdistill.train.config import TrainConfig

    kind = kind or TrainConfig
    if not callable(vars(module).get("get_config")):
        raise RecipeError(
            f"the recipe {recipe} has no function get_config(); define one that returns a {kind.__name__}."
        )
    try:
        config = module.get_config()
    except Exception as error:
        raise _recipe_error(Path(recipe), error) from error
    if not isinstance(config, kind):
        raise RecipeError(
            f"get_config() of {recipe} returned a {type(config).__name__}; it must return a {kind.__name__}."
        )
    return config


def _recipe_error(path: Path, error: Exception) -> RecipeError:
    """Names the recipe's line that an error came from."""
    if isinstance(error, SyntaxError):
        return RecipeError(f"the recipe {path}, line {error.lineno}: {error.msg}.")
    frames = traceback.extract_tb(error.__traceback__)
    line = next((f.lineno for f in reversed(frames) if Path(f.filename).name == path.name), "?")
    return RecipeError(f"the recipe {path}, line {line}: {type(error).__name__}: {error}")


def _registry() -> tyro.constructors.ConstructorRegistry:
    """Numbers that may be schedules (`types.Scalar`) are given as numbers."""
    registry = tyro.constructors.ConstructorRegistry()
    from jaxdistill.types import Scalar

    @registry.primitive_rule
    def number_or_schedule(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec | None:
        if info.type != Scalar:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="FLOAT",
            instance_from_str=lambda given: float(given[0]),
            is_instance=lambda value: callable(value) or isinstance(value, float | int),
            str_from_instance=lambda value: ["a schedule" if callable(value) else repr(float(value))],
        )

    return registry
