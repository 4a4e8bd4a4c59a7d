"""The interpreter of the server's Python steps: which one is taken, and what is refused before it can hang."""

import json
import os
import stat
import sys
from pathlib import Path

import pytest

from vilu.errors import UserError
from vilu.serving.server import build_backends, environment, find_tritonserver
from vilu.serving.stub_python import stub_python


@pytest.fixture
def named(tmp_path, monkeypatch):
    """Make VILU_SERVER_PYTHON name a program that answers as an interpreter would."""

    def name(version: str, numpy: str, libraries: str = "", shared: bool = True) -> Path:
        program = tmp_path / f"python-{version}-{numpy}" / "bin" / "python"
        program.parent.mkdir(parents=True)
        answer = json.dumps({"version": version, "numpy": numpy, "libraries": libraries, "shared": shared})
        program.write_text(f"#!/bin/sh\necho '{answer}'\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("VILU_SERVER_PYTHON", str(program))
        return program

    return name


def test_this_interpreter_by_default(monkeypatch):
    monkeypatch.delenv("VILU_SERVER_PYTHON", raising=False)
    if (Path(sys.prefix) / "server").is_dir():
        pytest.skip("this environment has one of its own for the server")
    found = stub_python()
    assert found.executable == Path(sys.executable)
    assert found.version == f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.mark.parametrize("absent", ["/absent/python", "/bin/false"])
def test_what_does_not_run_is_refused(monkeypatch, absent):
    monkeypatch.setenv("VILU_SERVER_PYTHON", absent)
    with pytest.raises(UserError, match=f"VILU_SERVER_PYTHON: {absent}"):
        stub_python()


@pytest.mark.parametrize(
    ("version", "numpy", "said"),
    [
        ("3.12", "2.1.0", "has NumPy 2.1.0: pip install 'numpy<2' there"),
        ("3.13", "2.1.0", "has NumPy 2.1.0: name the python of an environment of 3.10 to 3.12"),
        ("3.11", "", "has no NumPy"),
        ("3.9", "1.26.4", "has no libpython3.9.so.1.0"),
    ],
)
def test_what_would_hang_or_misread_is_refused(named, version, numpy, said):
    named(version, numpy, shared=version != "3.9")
    with pytest.raises(UserError, match=said):
        stub_python().check()


def test_the_wheel_s_server_gets_the_named_interpreter(named, tmp_path):
    found = find_tritonserver()
    if found.wheel is None:
        pytest.skip("the tritonserver found here has its own Python")
    program = named("3.12", "2.0.0", libraries="/libraries/of/3.12")
    env = environment(found)
    assert env["PATH"].split(os.pathsep)[0] == str(program.parent)
    assert "/libraries/of/3.12" in env["LD_LIBRARY_PATH"].split(os.pathsep)
    (tmp_path / "backends").mkdir()
    with pytest.raises(UserError, match="needs NumPy 1"):
        build_backends(found, tmp_path / "backends")
