"""The table of faults fits the source, and the tool tells what tests catch from what they miss."""

from __future__ import annotations

import runpy
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOL = runpy.run_path(str(ROOT / "tools" / "mutate.py"))


def test_every_fault_fits_the_source_and_names_tests_that_exist():
    assert not TOOL["problems"](ROOT, TOOL["read_table"]())


NAMES = ("minus for plus", "sign lost", "rounded down")


def repository(root: Path) -> Path:
    """One module, tests of two thirds of it, one of them slow, and a table of three faults."""
    files = {
        "jaxdistill/__init__.py": "",
        "jaxdistill/sums.py": "def add(a, b):\n    return a + b\n\n\ndef negate(a):\n    return -a\n\n\n"
        "def half(a):\n    return a / 2\n",
        "tests/test_sums.py": "from jaxdistill.sums import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n",
        "tests/test_half.py": """
            import pytest
            from jaxdistill.sums import half

            @pytest.mark.slow
            def test_half():
                assert half(3) == 1.5
        """,
        "pyproject.toml": "[tool.pytest.ini_options]\nmarkers = ['slow']\n",
        "mutations.toml": """
            [[mutation]]
            name = "minus for plus"
            file = "jaxdistill/sums.py"
            before = "a + b"
            after = "a - b"
            tests = ["tests/test_sums.py::test_add"]

            [[mutation]]
            name = "sign lost"
            file = "jaxdistill/sums.py"
            before = "return -a"
            after = "return a"
            tests = ["tests/test_sums.py"]

            [[mutation]]
            name = "rounded down"
            file = "jaxdistill/sums.py"
            before = "a / 2"
            after = "a // 2"
            tests = ["tests/test_half.py"]
        """,
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(textwrap.dedent(text))
    return root


@pytest.fixture
def tried(tmp_path, capfd):
    """Runs the tool on a small repository; exit status and what it printed."""
    root = repository(tmp_path)

    def run(*arguments):
        status = TOOL["main"](["--jobs", "1", *arguments], root=root, table=root / "mutations.toml")
        return status, capfd.readouterr().out

    run.root = root
    return run


def test_what_tests_miss_is_told_and_the_source_is_left_alone(tried):
    before = {path: path.read_text() for path in tried.root.rglob("*") if path.is_file()}
    status, out = tried()
    assert status == 1
    assert "caught" in next(line for line in out.splitlines() if "minus for plus" in line)
    assert "SURVIVED" in next(line for line in out.splitlines() if "sign lost" in line)
    assert "2 of 3 faults caught" in out
    assert {path: path.read_text() for path in tried.root.rglob("*") if path.is_file()} == before


def test_slow_tests_meet_what_quick_ones_do_not_notice(tried):
    status, out = tried("--only", "rounded")
    assert status == 0
    assert ["NOT RUN" in line for line in out.splitlines() if "rounded down" in line] == [True, False]
    assert "1 of 1 faults caught" in out


def test_faults_can_be_chosen(tried):
    assert tried("--list") == (0, "".join(f"jaxdistill/sums.py{' ' * 23}{name}\n" for name in NAMES))
    status, out = tried("--list", "--only", "minus")
    assert (status, out.split()[-3:]) == (0, ["minus", "for", "plus"])
    assert tried("--only", "nothing") == (2, "no fault has 'nothing' in its name or file; see --list.\n")


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("jaxdistill/sums.py", "a + b", "b + a", "`before` occurs 0 times in jaxdistill/sums.py"),
        ("jaxdistill/sums.py", "return -a", "return -a  # return -a", "`before` occurs 2 times in jaxdistill/sums.py"),
        ("mutations.toml", "a - b", "a + b", "`after` is `before`"),
        ("mutations.toml", "::test_add", "::test_ad", "there is no test tests/test_sums.py::test_ad"),
        ("mutations.toml", "sign lost", "minus for plus", "2 entries have this name"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tried, file, old, new, message):
    path = tried.root / file
    path.write_text(path.read_text().replace(old, new))
    status, out = tried()
    assert status == 2
    assert "update mutations.toml" in out
    assert message in out


def test_nothing_is_tried_while_tests_fail(tried):
    (tried.root / "tests/test_sums.py").write_text("def test_add():\n    assert False\n")
    status, out = tried()
    assert status == 2
    assert "The tests fail on the code as it is" in out
    assert "caught" not in out
