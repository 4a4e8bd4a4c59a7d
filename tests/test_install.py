"""`.ci/find-python`: a Python that serves, or one line that says what is missing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def find(*arguments: str, path: str | None = None, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    changed = {"PATH": path, "HOME": None if home is None else str(home)}
    env = {**os.environ, **{name: value for name, value in changed.items() if value is not None}}
    env.pop("PYENV_ROOT", None)
    command = ["/bin/sh", str(ROOT / ".ci" / "find-python"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


@pytest.fixture
def bare(tmp_path) -> str:
    """A PATH with the shell's tools and no Python."""
    for tool in ("head", "sh"):
        (tmp_path / tool).symlink_to(next(p for p in (f"/usr/bin/{tool}", f"/bin/{tool}") if os.path.exists(p)))
    return str(tmp_path)


def test_the_named_python_is_taken():
    done = find(sys.executable)
    assert done.returncode == 0, done.stderr
    assert os.path.samefile(done.stdout.strip(), os.path.realpath(sys.executable))


def test_one_is_found_on_the_path(bare):
    if sys.version_info >= (3, 13):
        pytest.skip("this Python does not serve")
    (Path(bare) / "python3").symlink_to(os.path.realpath(sys.executable))
    done = find(path=bare, home=Path(bare))
    assert done.returncode == 0, done.stderr
    assert os.path.samefile(done.stdout.strip(), os.path.realpath(sys.executable))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "vilu: needs Python 3.10, 3.11 or 3.12 with its venv module"),
        (["python3.99"], "vilu: PYTHON=python3.99: no such program"),
        (["/bin/false"], "vilu: PYTHON=/bin/false: "),
    ],
)
def test_what_is_missing_is_said_in_one_line(bare, arguments, said):
    done = find(*arguments, path=bare, home=Path(bare))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(said)
    assert len(done.stderr.splitlines()) == 1


def test_a_python_that_is_too_old_or_too_new_is_named(bare):
    for version in ("(3, 9)", "(3, 15)"):
        program = Path(bare) / f"python{version[4:-1]}"
        # The real interpreter, which states another version.
        program.write_text(
            f'#!/bin/sh\nprogram="import sys; sys.version_info = {version}"; shift\n'
            f'code="$program\n$1"; shift\nexec {sys.executable} -c "$code" "$@"\n'
        )
        program.chmod(0o755)
        done = find(str(program), path=bare)
        assert done.returncode == 2
        said = version.strip("()").replace(", ", ".")
        assert f"it is Python {said}, not 3.10 to 3.14" in done.stderr


def test_the_claimed_versions_are_those_that_are_found():
    claimed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    assert claimed == ["3.10", "3.11", "3.12", "3.13", "3.14"]
    assert 'requires-python = ">=3.10,<3.15"' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_an_editable_install_wins_over_a_folder_of_its_name(tmp_path):
    """Such an install puts `.ci/import` on Python's path, where a folder `vilu` beside it does not hide the package."""
    assert 'package-dir = {"" = ".ci/import"}' in (ROOT / "pyproject.toml").read_text("utf-8")
    assert os.listdir(ROOT / ".ci" / "import") in (["vilu"], ["vilu", "vilu.egg-info"], ["vilu.egg-info", "vilu"])
    (tmp_path / "vilu").mkdir()
    env = {**os.environ, "PYTHONPATH": str(ROOT / ".ci" / "import")}
    command = [sys.executable, "-c", "import vilu.serving; from vilu import UserError; print(vilu.__file__)"]
    run = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == str(ROOT / ".ci" / "import" / "vilu" / "__init__.py"), run.stderr
