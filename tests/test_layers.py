"""The floors of the house: imports point down only, and what stands at the edges imports nothing that it must not.

Sources are parsed, not imported, so that imports inside functions and under TYPE_CHECKING count as well.
"""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS = {
    "cli": 10,
    "recipes": 9,
    "search": 9,
    "jobs": 8,
    "report": 8,
    "train": 8,
    "evaluate": 7,
    "step": 6,
    "objective": 5,
    "checkpoint": 4,
    "generate": 4,
    "prune": 4,
    "retokenize": 4,
    "data": 3,
    "models": 3,
    "align": 2,
    "assets": 2,
    "losses": 2,
    "optimizer": 2,
    "tokenizers": 2,
    "formats": 1,
    "partition": 1,
    "sharding": 1,
    "choices": 0,
    "specs": 0,
    "types": 0,
}
"""Rooms (a module or a package of jaxdistill each) and their floors, as docs/concepts.md shows them."""

WITHOUT_JAX = ("align", "data", "formats", "tokenizers")
"""Rooms of NumPy alone: they work in tools and data workers that never start a device backend."""

DEVICE_LIBRARIES = {"jax", "jaxlib", "flax", "optax", "orbax", "tensorstore"}

Imports = dict[str, set[str]]
"""Absolute names that each module imports; of the package's own, the modules; of others, the top-level name."""


def module_files(root: Path) -> dict[str, Path]:
    """Every module of the package by dotted name; a package goes by its own name."""
    found = {}
    for path in sorted((root / "jaxdistill").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, modules: Iterable[str]) -> set[str]:
    """What a file imports, anywhere in it. `from package import name` is the module `package.name` if there is one."""
    known, names = set(modules), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: write imports absolutely."
            assert node.module
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in known else node.module)
    return {name if name.startswith("jaxdistill") else name.partition(".")[0] for name in names}


def package_imports(root: Path) -> Imports:
    files = module_files(root)
    return {name: imported(path, files) for name, path in files.items()}


def room_of(module: str) -> str:
    """jaxdistill.models.families.llama → models."""
    return module.split(".")[1]


def is_inside(module: str) -> bool:
    return module.startswith("jaxdistill.")


def upward(imports: Imports, floors: Mapping[str, int]) -> list[str]:
    """Imports of another room that is not on a lower floor."""
    return [
        f"{module} (floor {floors[room_of(module)]}) imports {name} (floor {floors[room_of(name)]})"
        for module, names in imports.items()
        if is_inside(module)
        for name in sorted(names)
        if is_inside(name) and room_of(name) != room_of(module) and floors[room_of(name)] >= floors[room_of(module)]
    ]


def cycle(imports: Imports) -> list[str]:
    """Modules that import each other in a circle, [] when there are none."""
    inside = {module: {n for n in names if n in imports} for module, names in imports.items()}
    try:
        graphlib.TopologicalSorter(inside).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def reached(imports: Imports, start: str) -> dict[str, str]:
    """Everything that a module imports directly or through the package, and the module that imports it first."""
    found: dict[str, str] = {}
    waiting = [start]
    while waiting:
        module = waiting.pop()
        for name in imports.get(module, set()):
            # Importing a.b runs a/__init__.py too.
            for each in (name.rsplit(".", depth)[0] for depth in range(name.count(".") + 1)):
                if each not in found:
                    found[each] = module
                    waiting.append(each)
    return found


IMPORTS = package_imports(ROOT)


def test_every_room_has_a_floor_and_every_floor_a_room():
    rooms = {room_of(module) for module in IMPORTS if is_inside(module)}
    assert rooms == set(FLOORS), "list new rooms in FLOORS and docs/concepts.md, and take out those that are gone"


def test_the_page_shows_these_floors():
    page = (ROOT / "docs" / "concepts.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", page, re.MULTILINE)
    assert {room: int(floor) for floor, rooms in rows for room in re.findall(r"`(\w+)`", rooms)} == FLOORS


def test_imports_point_down():
    assert not upward(IMPORTS, FLOORS)


def test_rooms_have_no_cycles():
    assert not cycle(IMPORTS)


def test_the_package_itself_imports_nothing():
    assert IMPORTS["jaxdistill"] == set(), "`import jaxdistill` must stay free: rooms are imported by name"


@pytest.mark.parametrize("room", WITHOUT_JAX)
def test_rooms_without_jax(room):
    for module in IMPORTS:
        if is_inside(module) and room_of(module) == room:
            found = reached(IMPORTS, module)
            devices = {name: found[name] for name in DEVICE_LIBRARIES & found.keys()}
            assert not devices, f"{module} must not reach {devices}"


def test_nothing_imports_recipes_tools_or_tests():
    for module, names in IMPORTS.items():
        assert not names & {"configs", "tools", "tests"}, module
    for path in sorted((ROOT / "tools").glob("*.py")) + sorted((ROOT / "configs").glob("*.py")):
        assert not imported(path, IMPORTS) & {"configs", "tools", "tests"}, path


def test_recipes_import_the_package_alone():
    for path in sorted((ROOT / "configs").glob("*.py")):
        foreign = {n for n in imported(path, IMPORTS) if not is_inside(n)} - sys.stdlib_module_names
        assert not foreign, f"{path.name} imports {sorted(foreign)}"


def test_a_house_with_faults_is_refused(tmp_path):
    package = tmp_path / "jaxdistill"
    (package / "low").mkdir(parents=True)
    sources = {
        "__init__.py": "",
        "high.py": "import jax",
        "low/__init__.py": "",
        "low/one.py": "from jaxdistill.low import two",
        "low/two.py": "def late():\n    import jaxdistill.low.one",
        "low/three.py": "if False:\n    from jaxdistill.high import name",
    }
    for name, source in sources.items():
        (package / name).write_text(source)
    imports = package_imports(tmp_path)
    assert upward(imports, {"high": 1, "low": 0}) == [
        "jaxdistill.low.three (floor 0) imports jaxdistill.high (floor 1)"
    ]
    assert upward(imports, {"high": 0, "low": 0})
    assert set(cycle(imports)) == {"jaxdistill.low.one", "jaxdistill.low.two"}
    assert reached(imports, "jaxdistill.low.three")["jax"] == "jaxdistill.high"


def test_the_command_line_starts_light():
    """A wrong command or `--help` is answered before JAX, Orbax and the data libraries are loaded."""
    program = "import jaxdistill.cli, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "jaxdistill" in loaded
    assert not loaded & (DEVICE_LIBRARIES | {"grain", "tensorflow_datasets", "tokenizers", "sentencepiece"})
