"""Another tritonserver than the wheel's, in a folder like that of NVIDIA's container, and versions' known faults."""

import importlib.util
import shutil
from pathlib import Path
from urllib.request import Request

import pytest

from tests.deploy.helpers import serving
from vilu.serving.address import open_directly
from vilu.serving.server import PROBE_IMAGE
from vilu.serving.stub_python import stub_python
from vilu.serving.tritonserver import describe_version


@pytest.mark.parametrize(
    ("version", "faults"),
    [
        ("2.51.0", ["before 2.57", "before 2.60"]),
        ("2.57.0", ["before 2.60"]),
        ("2.60.0", []),
        ("3.0.0", []),
        ("2.73.0dev", []),
        ("", []),
        ("newest", []),
    ],
)
@pytest.mark.parametrize("guarded", [True, False])
def test_a_version_is_described_with_the_faults_it_has(version, faults, guarded):
    line = describe_version(version, guarded=guarded)
    assert line.startswith(f"tritonserver {version}")
    assert [fault for fault in ("before 2.57", "before 2.60") if fault in line] == faults
    assert ("front door" in line) == (guarded and bool(faults))
    assert ("--direct" in line) == (not guarded and bool(faults))


@pytest.fixture
def container(tmp_path):
    """A folder with bin/tritonserver and backends, as /opt/tritonserver is, with the wheel's files."""
    found = importlib.util.find_spec("pytriton")
    if found is None:
        pytest.skip("nvidia-pytriton is not installed")
    wheel = Path(str(found.origin)).parent / "tritonserver"
    root = tmp_path / "opt" / "tritonserver"
    shutil.copytree(wheel / "backends" / "python", root / "backends" / "python")
    python = stub_python()
    stub = wheel / "python_backend_stubs" / python.version / "triton_python_backend_stub"
    shutil.copy2(stub, root / "backends" / "python")
    binary = root / "bin" / "tritonserver"
    binary.parent.mkdir()
    libraries = f"{wheel.parent.parent / 'nvidia_pytriton.libs'}:{python.libraries}"
    binary.write_text(f'#!/bin/sh\nexport LD_LIBRARY_PATH="{libraries}"\nexec "{wheel}/bin/tritonserver" "$@"\n')
    binary.chmod(0o755)
    return binary


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.parametrize("direct", [False, True])
def test_a_tritonserver_elsewhere_serves_and_its_version_is_said_once(container, repository, tmp_path, direct):
    words = ["--tritonserver", str(container), *(["--direct"] if direct else [])]
    with serving(repository, tmp_path, *words) as replica:
        with open_directly(f"http://127.0.0.1:{replica.http}/v2", timeout=10) as reply:
            assert b'"version":"2.51' in reply.read().replace(b" ", b"")
        if not direct:
            with open_directly(Request(f"http://127.0.0.1:{replica.http}/ask", PROBE_IMAGE), timeout=20) as reply:
                assert b"failure_probability" in reply.read()
    lines = [line for line in replica.log.read_text().splitlines() if line.startswith("tritonserver 2.51")]
    assert len(lines) == 1
    assert "before 2.57" in lines[0]
    assert ("--direct" in lines[0]) == direct
