"""The tritonserver binary: where it is, what it needs here, and the command `tritonserver` that becomes it."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from vilu.errors import UserError
from vilu.serving.repository import check_repository
from vilu.serving.stub_python import stub_python

CONTAINER = Path("/opt/tritonserver/bin/tritonserver")
BACKENDS = Path(__file__).parent / "backends"


@dataclass(frozen=True)
class Tritonserver:
    """A tritonserver binary, its own backends folder if it has one, and the wheel's folder if it is the wheel's."""

    binary: Path
    backends: Path | None = None
    wheel: Path | None = None


def find_tritonserver(explicit: str | os.PathLike[str] | None = None) -> Tritonserver:
    """An explicit path, else the PATH (not our own entry point), NVIDIA's container location, the wheel's.

    Raises:
        UserError: there is none.
    """
    if explicit is not None:
        path = Path(explicit)
        if not _executable(path):
            raise UserError(f"{path}: not an executable tritonserver")
        return _known(path)
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        path = Path(folder or ".") / "tritonserver"
        if _executable(path) and not _is_script(path):
            return _known(path)
    if _executable(CONTAINER):
        return _known(CONTAINER)
    spec = importlib.util.find_spec("pytriton")
    if spec is not None and spec.origin is not None:
        wheel = Path(spec.origin).parent / "tritonserver"
        if (wheel / "bin" / "tritonserver").is_file():
            return _known(wheel / "bin" / "tritonserver")
    raise UserError("no tritonserver found: give --tritonserver PATH, or pip install --no-deps nvidia-pytriton")


def _executable(path: Path) -> bool:
    return os.path.isfile(path) and os.access(path, os.X_OK)  # Path.is_file raises where a folder may not be searched


def _is_script(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"#!"


def _known(binary: Path) -> Tritonserver:
    binary = binary.resolve()
    root = binary.parent.parent
    if (root / "python_backend_stubs").is_dir():
        return Tritonserver(binary, root / "backends", root)
    return Tritonserver(binary, root / "backends" if (root / "backends").is_dir() else None)


def build_backends(server: Tritonserver, folder: Path) -> None:
    """Fill `folder` for --backend-directory: the server's own backends, `stub_python()`'s stub, and our `onnxruntime`
    where the server has no native one.

    Raises:
        UserError: the wheel has no stub for that Python, or it lacks NumPy 1 or its shared library.
    """
    if server.backends is not None:
        for backend in server.backends.iterdir():
            if backend.name != "python" or server.wheel is None:
                (folder / backend.name).symlink_to(backend)
    if server.wheel is not None:
        python = stub_python()
        python.check()
        stub = server.wheel / "python_backend_stubs" / python.version / "triton_python_backend_stub"
        if not stub.is_file():
            raise UserError(f"this tritonserver has no Python backend stub for Python {python.version}")
        # Copied: the backend looks for its stub beside itself.
        shutil.copytree(server.wheel / "backends" / "python", folder / "python")
        shutil.copy2(stub, folder / "python" / "triton_python_backend_stub")
    if not (folder / "onnxruntime").exists():
        shutil.copytree(BACKENDS / "onnxruntime", folder / "onnxruntime", ignore=shutil.ignore_patterns("__pycache__"))


def environment(server: Tritonserver) -> dict[str, str]:
    """The server's environment: its Python steps take their packages from `stub_python()` and find its libpython."""
    env = dict(os.environ)
    python = stub_python() if server.wheel is not None else None
    first = python.executable if python is not None else Path(sys.executable)
    env["PATH"] = os.pathsep.join([str(first.parent), env.get("PATH", "")])
    # glibc keeps what deep queues once needed, for each of many threads: with two arenas half as much stays.
    env.setdefault("MALLOC_ARENA_MAX", "2")
    if server.wheel is not None and python is not None:
        libraries = [str(server.wheel.parent.parent / "nvidia_pytriton.libs"), python.libraries]
        env["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [*libraries, env.get("LD_LIBRARY_PATH", "")]))
    return env


def default_flags(server: Tritonserver, given: Sequence[str], backends: Path | None) -> list[str]:
    """Flags the user did not give: loopback addresses, backends, the response cache's folder."""
    flags = {f"--{kind}-address": "127.0.0.1" for kind in ("http", "grpc", "metrics")}
    if backends is not None:
        flags["--backend-directory"] = str(backends)
    if server.wheel is not None:
        flags["--cache-directory"] = str(server.wheel / "caches")
    if not Path("/dev/nvidiactl").exists():
        flags["--allow-gpu-metrics"] = "false"
    flags["--disable-auto-complete-config"] = ""  # `vilu export` writes every field
    return [f"{k}={v}" if v else k for k, v in flags.items() if not has_flag(given, k)]


def has_flag(given: Sequence[str], flag: str) -> bool:
    return any(word == flag or word.startswith(f"{flag}=") for word in given)


def check_flags(server: Tritonserver, given: Sequence[str], own: Sequence[str] = ()) -> None:
    """Refuse an option that tritonserver does not have, which it would answer with its whole usage.

    Args:
        own: the options of `vilu serve`, which are suggested first.

    Raises:
        UserError: the first unknown option, with the one that looks most like it.
    """
    options = [word.partition("=")[0] for word in given if word.startswith("-")]
    if not options:
        return
    try:
        usage = subprocess.run(
            [server.binary, "--help"], env=environment(server), capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return  # the start will say what is wrong with it
    known = set(re.findall(r"(?<!\S)(--?[a-z][a-z0-9-]*)", usage.stdout + usage.stderr))
    for option in options:
        # An unambiguous beginning is an option, too; a number is a value.
        if len(known) > 20 and not re.fullmatch(r"-[\d.]+", option) and not any(o.startswith(option) for o in known):
            close = difflib.get_close_matches(option, own, 1, 0.75) or difflib.get_close_matches(option, known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"neither `vilu serve` nor tritonserver has an option {option}{hint}")


# (the first release without the fault, what happens before it): tritonserver issues 7368 and 8034, and its own tests.
KNOWN_FAULTS = (
    ((2, 57), "clients that cancel while a queue is full can end it"),
    ((2, 60), "a request for strings as classes ends it"),
)


def describe_version(version: str, *, guarded: bool) -> str:
    """Return a line about a tritonserver's version and the faults that it is known for.

    Args:
        guarded: whether the front door stands before it, which lets neither through.

    Example:
        >>> describe_version("2.73.0", guarded=True)
        'tritonserver 2.73.0'
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    have = (int(found[1]), int(found[2])) if found else None
    faults = [f"before {a}.{b} {fault}" for (a, b), fault in KNOWN_FAULTS if have is not None and have < (a, b)]
    if not faults:
        return f"tritonserver {version}"
    end = "the front door prevents that" if guarded else "leave out --direct to prevent that"
    return f"tritonserver {version}: {', '.join(faults)}; {end}"


_SHELL_SAFE = re.compile(r"[A-Za-z0-9_./+-]+")  # tritonserver starts a stub by `sh -c`, with its paths unquoted


def temporary_base() -> str:
    """Where temporary folders go whose paths a shell takes as one word.

    Raises:
        UserError: there is no such place.
    """
    for base in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        if _SHELL_SAFE.fullmatch(base) and os.access(base, os.W_OK | os.X_OK):
            return base
    raise UserError(f"{tempfile.gettempdir()}: set TMPDIR to a folder whose path has letters, digits and ._+- alone")


def safe_path(path: Path, folder: Path) -> Path:
    """The path itself, or a link to it in `folder` where a shell would not take the path as one word."""
    if _SHELL_SAFE.fullmatch(str(path)):
        return path
    link = folder / f"repository-{len(list(folder.glob('repository-*')))}"
    link.symlink_to(path)
    return link


def main() -> None:
    """Entry point: `tritonserver --model-repository DIR [ANY FLAG]`."""
    given = sys.argv[1:]
    try:
        server = find_tritonserver()
        if server.wheel is None:
            # A native installation has its own backends and defaults: nothing of ours belongs in between.
            os.execv(server.binary, [str(server.binary), *given])
        # Kept: the process that could remove it is about to become the server.
        folder = Path(tempfile.mkdtemp(prefix="vilu-tritonserver-", dir=temporary_base()))
        (folder / "backends").mkdir()
        given = [_repository(word, before, folder) for before, word in pairwise(["", *given])]
        build_backends(server, folder / "backends")
    except (UserError, OSError) as error:
        print(f"tritonserver: {error}", file=sys.stderr)
        sys.exit(2)
    command = [str(server.binary), *default_flags(server, given, folder / "backends"), *given]
    os.execve(server.binary, command, environment(server))


def _repository(word: str, before: str, folder: Path) -> str:
    """A word of the command line; a model repository's path is checked, and made fit for a shell."""
    for flag in ("--model-repository", "--model-store"):
        name, equals, value = word.partition("=")
        if name != flag or not equals:
            name, equals, value = "", "", word
        if (before == flag or name == flag) and "://" not in value:
            check_repository(Path(value))
            return f"{name}{equals}{safe_path(Path(value).absolute(), folder)}"
    return word
