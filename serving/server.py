"""Starting tritonserver: finding it, giving it backends, checking the repository, waiting for a real answer.

A Python stub that dies early hangs a load without an error, and a forced exit leaks shared memory; so everything that
can be checked is checked before the start, start-up and stop have deadlines that end in SIGKILL, and "ready" means
that an inference has succeeded (the server's own readiness says less).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from vilu.errors import UserError
from vilu.serving.access import Access
from vilu.serving.client import Client, DeadlineExceeded, ServerUnavailable
from vilu.serving.stub_python import stub_python

CONTAINER = Path("/opt/tritonserver/bin/tritonserver")
BACKENDS = Path(__file__).parent / "backends"
SHARED_MEMORY = Path("/dev/shm")
PROBE_SECONDS, PROBE_TIMEOUT = 3.0, 2.0  # of a supervised server: a stop of its answers is seen within 10 s
RESTARTS, RESTART_SECONDS = 5, 60
# Model files per backend, where the config names none.
_FILES = {"python": "model.py", "onnxruntime": "model.onnx"}


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
        if not (path.is_file() and os.access(path, os.X_OK)):
            raise UserError(f"{path}: not an executable tritonserver")
        return _known(path)
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        path = Path(folder or ".") / "tritonserver"
        if path.is_file() and os.access(path, os.X_OK) and not _is_script(path):
            return _known(path)
    if CONTAINER.is_file():
        return _known(CONTAINER)
    spec = importlib.util.find_spec("pytriton")
    if spec is not None and spec.origin is not None:
        wheel = Path(spec.origin).parent / "tritonserver"
        if (wheel / "bin" / "tritonserver").is_file():
            return _known(wheel / "bin" / "tritonserver")
    raise UserError("no tritonserver found: give --tritonserver PATH, or pip install --no-deps nvidia-pytriton")


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
    return [f"{k}={v}" if v else k for k, v in flags.items() if not _has(given, k)]


def _has(given: Sequence[str], flag: str) -> bool:
    return any(word == flag or word.startswith(f"{flag}=") for word in given)


def check_repository(root: Path) -> None:
    """Refuse what would hang or fail a load later.

    Raises:
        UserError: one line for the first problem found.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such model repository")
    models = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not models:
        raise UserError(f"{root}: holds no models; write them with `vilu export`")
    names = {model.name for model in models}
    for model in models:
        config = model / "config.pbtxt"
        try:
            text = config.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            raise UserError(f"{config}: missing or not text") from None
        _check_syntax(config, text)
        versions = [path for path in model.iterdir() if path.is_dir() and path.name.isdigit()]
        if not versions:
            raise UserError(f"{model}: has no version folder")
        backend = re.search(r'^\s*backend:\s*"(\w+)"', text, re.MULTILINE)
        default = re.search(r'^\s*default_model_filename:\s*"([^"]+)"', text, re.MULTILINE)
        file = default[1] if default else _FILES.get(backend[1] if backend else "")
        for folder in versions:
            if file and not (folder / file).is_file():
                raise UserError(f"{folder / file}: missing")
        for step in re.findall(r'^\s*model_name:\s*"([^"]+)"', text, re.MULTILINE):
            if step not in names:
                raise UserError(f"{config}: names the model {step!r}, which the repository lacks")


def _check_syntax(path: Path, text: str) -> None:
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except ImportError:
        return
    try:
        text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise UserError(f"{path}: not a Triton model configuration ({error})") from None


def free_port() -> int:
    """A TCP port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Outlives its launcher: the pipe on its standard input ends when the launcher does, however that came about, and the
# server must not stay behind, holding ports and shared memory. $1: process group; $2: shared memory's prefix.
_GUARD = 'read _; kill -TERM "$1"; sleep 2; kill -KILL "-$1"; rm -f "$2"*'


def _exit_timeout(flags: Sequence[str], default: float) -> float:
    """Seconds the server gives requests in flight: the user's --exit-timeout-secs where it is given."""
    for word, following in zip(flags, [*flags, ""][1:], strict=True):
        name, _, value = word.partition("=")
        if name == "--exit-timeout-secs":
            with contextlib.suppress(ValueError):
                return float(value or following)
    return default


class Server:
    """A running tritonserver, as a context manager: inside, it has answered a real request.

    Args:
        repository: the model repository.
        tritonserver: explicit path of the binary.
        host: address to listen on; loopback unless told otherwise.
        http_port, grpc_port, metrics_port: 0 picks a free one.
        flags: passed through to tritonserver.
        startup_seconds: deadline of the first answer.
        stop_seconds: how long the server may finish what it has; then the whole process group is killed.
        log: file for the server's output; by default this process's own.
        access: tokens and TLS. With TLS, HTTP listens on loopback whatever the host.

    Raises:
        UserError: nothing to start, a bad repository, or no answer before the deadline.
    """

    def __init__(
        self,
        repository: str | os.PathLike[str],
        *,
        tritonserver: str | os.PathLike[str] | None = None,
        host: str = "127.0.0.1",
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        flags: Sequence[str] = (),
        startup_seconds: float = 60,
        stop_seconds: float = 10,
        log: Path | None = None,
        access: Access | None = None,
    ) -> None:
        self.repository = Path(repository).resolve()
        self.found = find_tritonserver(tritonserver)
        check_repository(self.repository)
        self.host = host
        ports = [http_port, grpc_port, metrics_port]
        for i in range(3):
            if not ports[i]:
                ports[i] = next(port for port in iter(free_port, 0) if port not in ports)  # it may offer one twice
        self.http_port, self.grpc_port, self.metrics_port = ports
        self.flags = list(flags)
        self.startup_seconds, self.stop_seconds = startup_seconds, stop_seconds
        self.log = log
        self.access = access or Access()
        self.process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        # Names of its own let a killed server's shared memory be told from other servers'.
        self._prefix = f"vilu_{os.getpid()}_{self.grpc_port}_"

    @property
    def grpc_url(self) -> str:
        scheme = "grpcs://" if self.access.tls_cert else ""
        return f"{scheme}{_reach(self.host)}:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        return f"http://{_reach(self.access.http_host(self.host))}:{self.http_port}"

    def __enter__(self) -> Server:
        try:
            self.start()
            self.wait_until_answering()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process; returns at once."""
        for port in (self.http_port, self.grpc_port, self.metrics_port):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((self.host, port))
                except OSError as error:
                    raise UserError(f"cannot listen on {self.host}:{port} ({error.strerror})") from None
        self._folder = tempfile.TemporaryDirectory(prefix="vilu-backends-")
        backends = Path(self._folder.name)
        build_backends(self.found, backends)
        ours = [f"--model-repository={self.repository}"]
        for kind in ("http", "grpc", "metrics"):
            host = self.access.http_host(self.host) if kind == "http" else self.host
            ours += [f"--{kind}-address={host}", f"--{kind}-port={getattr(self, f'{kind}_port')}"]
        ours.append(f"--backend-config=python,shm-region-prefix-name={self._prefix}")
        ours.append(f"--exit-timeout-secs={math.ceil(self.stop_seconds)}")
        ours = [
            flag for flag in ours if flag.startswith("--backend-config") or not _has(self.flags, flag.split("=")[0])
        ]
        given = [*ours, *self.access.flags(self.host), *self.flags]
        command = [str(self.found.binary), *default_flags(self.found, given, backends), *given]
        output = self.log.open("wb") if self.log else None
        try:
            self.process = subprocess.Popen(
                command,
                env=environment(self.found),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,
            )
        finally:
            if output is not None:
                output.close()
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "guard", str(self.process.pid), f"{SHARED_MEMORY}/{self._prefix}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def wait_until_answering(self) -> None:
        """Wait for a real inference to succeed. Raises UserError when the server ends or the deadline passes."""
        assert self.process is not None
        deadline = time.monotonic() + self.startup_seconds
        reason = "it gave no answer"
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise UserError(f"tritonserver ended at start with code {self.process.returncode}{self._log_hint()}")
            try:
                if self.answers(timeout=max(1.0, deadline - time.monotonic())):
                    return
            except Exception as error:  # not up yet, or not well: the last reason is told
                reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            time.sleep(0.1)
        raise UserError(f"tritonserver did not answer in {self.startup_seconds:.0f} s: {reason}{self._log_hint()}")

    def answers(self, timeout: float) -> bool:
        """Whether the server is ready and, where the repository has the `vilu` ensemble, answers through it.

        Raises:
            Exception: what a client raises where it does not.
        """
        ready = urllib.request.Request(f"{self.http_url}/v2/health/ready")
        with urllib.request.urlopen(ready, timeout=timeout) as reply:
            if reply.status != 200:
                return False
        if (self.repository / "vilu").is_dir():
            probe(self.http_url, timeout=timeout, token=self.access.token)
            if not self.access.tls_cert:  # the certificate is for a name that only clients know
                probe(self.grpc_url, timeout=timeout, token=self.access.token)
        return True

    def inferences(self) -> int:
        """How many images all models together have answered; 0 where the server does not say."""
        try:
            with urllib.request.urlopen(f"{self.http_url}/v2/models/stats", timeout=PROBE_TIMEOUT) as reply:
                return sum(int(model["inference_count"]) for model in json.load(reply)["model_stats"])
        except (OSError, ValueError, KeyError):
            return 0

    def dead_stubs(self) -> list[str]:
        """Names of Python model instances whose process has died: the server neither restarts nor reaps one, and goes
        on saying that the model is ready. (An unloaded model's is reaped.)"""
        assert self.process is not None
        return [name for pid in _children(self.process.pid) if (name := _zombie(pid))]

    def _log_hint(self) -> str:
        return f"; see {self.log}" if self.log else ""

    def stop(self, seconds: float | None = None) -> int | None:
        """Stop everything within the deadline (or these seconds) and leave nothing in shared memory. Returns the exit
        code."""
        process = self.process
        if process is not None:
            if self._guard is not None:
                self._guard.kill()
                self._guard.communicate()
                self._guard = None
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            if seconds is None:
                seconds = _exit_timeout(self.flags, self.stop_seconds) + 5
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                print(f"tritonserver did not stop in {seconds:.0f} s: killed", file=sys.stderr, flush=True)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # stubs that ignored the server's end, too
            process.wait()
            for left in SHARED_MEMORY.glob(f"{self._prefix}*"):
                left.unlink(missing_ok=True)
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        return process.returncode if process is not None else None


def _reach(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "") else host


def probe(url: str, *, model: str = "vilu", **options: Any) -> None:
    """Ask a server about an image of one pixel: the way through every step of the ensemble, by a `Client`'s options.

    Raises:
        UserError: no answer, or an error in its place.
    """
    with Client(url, model=model, **options) as client:
        client.ask([PROBE_IMAGE])[0].raise_for_error()


# A 1x1 white PNG: small, and it goes through every step of the ensemble.
PROBE_IMAGE = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8ffff3f0005fe02fe0def46b8"
    "0000000049454e44ae426082"
)


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in task.read_text().split()]
    return found


def _zombie(pid: int) -> str:
    """The command's name of a process that has ended and was not waited for; "" for any other."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    name, _, rest = stat[stat.index("(") + 1 :].rpartition(")")
    return f"{name} ({pid})" if rest.split()[0] == "Z" else ""


def serve(server: Server, *, supervise: bool = False) -> int:
    """Run a server in the foreground: SIGTERM and SIGINT stop it; returns its exit code.

    Args:
        supervise: restart the server when it ends, or when a process of a Python model dies or it stops answering;
            only requests in flight are lost. After RESTARTS of them within RESTART_SECONDS it gives up.

    Raises:
        UserError: as `Server` does.
    """
    stopping = threading.Event()
    previous = {number: signal.signal(number, lambda *_: stopping.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    restarts: deque[float] = deque()
    proven = False  # it has answered: what ends it now is no mistake of the user's
    try:
        while True:
            code, fault, answered = _serve_once(server, stopping, supervise, proven)
            proven |= answered
            if stopping.is_set() or not supervise:
                return code
            restarts.append(time.monotonic())
            while restarts[0] < time.monotonic() - RESTART_SECONDS:
                restarts.popleft()
            if len(restarts) > RESTARTS:
                raise UserError(f"tritonserver: {fault}; gave up after {RESTARTS} restarts in {RESTART_SECONDS} s")
            print(f"tritonserver: {fault}; restarting it", file=sys.stderr, flush=True)
    finally:
        server.stop()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _serve_once(
    server: Server, stopping: threading.Event, supervise: bool, proven: bool
) -> tuple[int, str, bool]:  # fmt: skip
    """Start, run until something ends it, stop: (exit code, what ended it, whether it has answered).

    Raises:
        UserError: it does not start, and supervision has not seen it do so before (`proven`).
    """
    server.start()
    assert server.process is not None
    waiter = _Waiter(server, stopping)
    waiter.start()
    fault, checked, unanswered, done = "", time.monotonic(), 0, 0
    while server.process.poll() is None and not fault and not stopping.wait(0.2):
        if waiter.error is not None:
            fault = str(waiter.error)
        elif not supervise:
            continue
        # Before its first answer, too: a server one of whose models has died then never gives one.
        elif dead := server.dead_stubs():
            fault = f"a model's process died, {dead[0]}"
        elif waiter.answered and time.monotonic() - checked > PROBE_SECONDS:
            before, done = done, server.inferences()
            unanswered = 0 if _well(server) or done > before else unanswered + 1
            if unanswered == 2 and server.process.poll() is None:
                fault = "it does not answer"
            checked = time.monotonic()
    again = supervise and proven
    if waiter.error is not None and not again:
        raise waiter.error
    ended = server.process.poll()
    if ended is not None and not waiter.answered and not stopping.is_set() and not again:
        raise UserError(f"tritonserver ended at start with code {ended}")
    code = server.stop(seconds=1 if fault else None) or 0
    return code, fault or f"it ended with code {code}", waiter.answered


def _well(server: Server) -> bool:
    try:
        return server.answers(timeout=PROBE_TIMEOUT)
    except Exception as error:
        # A full queue is not a fault: a server must not be restarted for being busy.
        return isinstance(error, ServerUnavailable) and not isinstance(error, DeadlineExceeded)


class _Waiter(threading.Thread):
    """Waits for the first answer beside the signal loop, so that a stop during start-up is not held up."""

    def __init__(self, server: Server, stopping: threading.Event) -> None:
        super().__init__(daemon=True)
        self.server, self.stopping = server, stopping
        self.process = server.process
        self.answered = False
        self.error: UserError | None = None

    def run(self) -> None:
        try:
            self.server.wait_until_answering()
            if self.server.process is not self.process:
                return  # it was restarted meanwhile, and has another to wait for it
            self.answered = True
            print(
                f"serving {self.server.repository}: gRPC {self.server.grpc_url}, HTTP {self.server.http_url}",
                file=sys.stderr,
                flush=True,
            )
        except UserError as error:
            mine = self.server.process is self.process
            if mine and not self.stopping.is_set() and self.process and self.process.poll() is None:
                self.error = error
