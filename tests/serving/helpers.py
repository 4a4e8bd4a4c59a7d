"""Shared by the tests of this folder: the command, answers against the eager model, ports, processes, certificates."""

import contextlib
import csv
import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from vilu.serving.server import free_port

BIN = Path(sys.executable).parent
ASK, STEER = "inference-token-0123", "control-token-4567"


def agree(answers, photos, eager):
    for answer, photo in zip(answers, photos, strict=True):
        label, confidence, failure = eager(photo)
        assert answer.error is None
        assert answer.label == label
        assert answer.confidence == pytest.approx(confidence, abs=1e-4)
        assert answer.failure_probability == pytest.approx(failure, abs=1e-4)
        assert answer.accept == (answer.failure_probability < 0.505)


def descendants(pid):
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return found


def vilu(*arguments, **options):
    return subprocess.run([BIN / "vilu", *arguments], capture_output=True, text=True, timeout=60, **options)


def ports():
    return {kind: free_port() for kind in ("http", "grpc", "metrics")}


def wait_for(url, process, seconds=40):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail("the server did not come up")


def stub_of(pid: int, model: str) -> int:
    """The process of a Python model's instance."""
    with contextlib.suppress(OSError):  # a process may end since it was listed
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in task.read_text().split():
                with contextlib.suppress(OSError):
                    if f"{model}_0" in Path(f"/proc/{child}/cmdline").read_text():
                        return int(child)
                if found := stub_of(int(child), model):
                    return found
    return 0


def children(pid: int) -> set[int]:
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def certificate(folder: Path, name: str, issuer: str | None = None) -> None:
    """folder/NAME.pem and NAME.key; signed by itself, or by folder/ISSUER."""
    key, request, out = (str(folder / f"{name}.{kind}") for kind in ("key", "csr", "pem"))
    extension = folder / "san"
    extension.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    subject = ["-newkey", "rsa:2048", "-nodes", "-keyout", key, "-subj", f"/CN={name}"]
    if issuer is None:
        commands = [["req", "-x509", *subject, "-out", out, "-days", "2"]]
    else:
        by = ["-CA", str(folder / f"{issuer}.pem"), "-CAkey", str(folder / f"{issuer}.key"), "-CAcreateserial"]
        commands = [
            ["req", *subject, "-out", request],
            ["x509", "-req", "-in", request, *by, "-out", out, "-days", "2", "-extfile", str(extension)],
        ]
    for command in commands:
        subprocess.run(["openssl", *command], check=True, capture_output=True)


def rows_of(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".csv":
        return list(csv.DictReader(path.open(newline="")))
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()
