"""Starting on an unusual machine: proxies, spaces in paths, IPv6, taken ports, a small /dev/shm, mistyped options."""

import asyncio
import gc
import json
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.serving.helpers import BIN, agree, opened, options, ports, vilu, wait_for
from vilu import UserError
from vilu.serving import Client, Server
from vilu.serving.address import free_port, is_loopback, is_this_machine, parse_url
from vilu.serving.door import Door
from vilu.serving.door.upstream import Upstream, probe_question
from vilu.serving.server_log import copy_without_alarms

pytestmark = pytest.mark.server


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_a_proxy_is_not_asked_about_this_machine(repository, photos, tmp_path):
    """http_proxy is set in every company network; nothing listens at this one."""
    dead = f"http://127.0.0.1:{free_port()}"
    names = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")
    env = os.environ | {case: dead for name in names for case in (name, name.upper())}
    env = {name: value for name, value in env.items() if name.lower() not in ("no_proxy", "no_grpc_proxy")}
    (tmp_path / "photo.png").write_bytes(photos[1])
    chosen = ports()
    flags = [f"--{kind}-port={port}" for kind, port in chosen.items()]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [BIN / "vilu", "serve", "--direct", "--model-repository", repository, *flags],
            stderr=log,
            stdout=log,
            env=env,
        )
    try:
        wait_for(f"http://127.0.0.1:{chosen['http']}", process)
        for url in (f"127.0.0.1:{chosen['grpc']}", f"http://127.0.0.1:{chosen['http']}"):
            assert vilu("health", "--url", url, env=env).returncode == 0
            found = vilu("ask", tmp_path / "photo.png", "--json", "--url", url, env=env)
            assert json.loads(found.stdout)[0]["label"], found.stderr
            assert "default" in vilu("classes", "list", "--url", url, env=env).stdout
        while "serving" not in (tmp_path / "log").read_text():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_paths_may_hold_spaces_and_brackets(repository, photos, eager, tmp_path, monkeypatch):
    root = tmp_path / "my models (new) [2]'s"
    shutil.copytree(repository, root / "model repository")
    (root / "temporary files").mkdir()
    monkeypatch.setenv("TMPDIR", str(root / "temporary files"))
    monkeypatch.setattr("tempfile.tempdir", None)
    with Server(root / "model repository", log=tmp_path / "log") as server, Client(server.grpc_url) as client:
        agree(client.ask(photos[:2]), photos[:2], eager)
    assert not list((root / "temporary files").glob("vilu*"))


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_ipv6(repository, photos, eager, tmp_path):
    with Server(repository, host="::1", log=tmp_path / "log") as server:
        assert server.grpc_url == f"[::1]:{server.grpc_port}"
        for url in (server.grpc_url, server.http_url):
            with Client(url) as client:
                agree(client.ask(photos[:2]), photos[:2], eager)


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_the_door_over_ipv6(server, photos, eager):
    with opened(Door(options(host="::1", upstreams=[server.grpc_url]))) as at:
        for url in (at.grpc, f"http://{at.http}"):
            with Client(url) as client:
                agree(client.ask(photos[:2]), photos[:2], eager)


def test_an_ipv6_host_may_stand_in_brackets(repository):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = vilu("serve", "--model-repository", repository, "--host", "[127.0.0.1]", "--grpc-port", port)
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr


@pytest.mark.parametrize("way", [[], ["--direct"]], ids=["door", "direct"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--http-port", "99999"], "99999"),
        (["--grpc-port", "-1"], "-1"),
        (["--modle-repository", "x"], "has an option --modle-repository; did you mean --model-repository?"),
        (["--log-verbsoe=1"], "did you mean --log-verbose?"),
        (["--no-such-flag"], "has an option --no-such-flag"),
        (["--host", "no such host"], "cannot listen on no such host"),
        (["--token", "@"], "the name of a file is missing after @"),
    ],
)
def test_a_mistake_is_one_line(repository, arguments, message, way):
    free = [f"--{kind}-port={port}" for kind, port in ports().items()]
    done = vilu("serve", *way, "--model-repository", repository, *free, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_taken_port_is_one_line(repository):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = vilu("serve", "--direct", "--model-repository", repository, "--http-port", str(port))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"vilu: cannot listen on 127.0.0.1:{port} (Address already in use)"]


def test_a_probe_that_nobody_waits_for_any_more_is_no_second_line():
    """A door that cannot listen ends while its first probe is under way."""
    complaints = []

    async def end_while_it_asks():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        upstream = Upstream(f"127.0.0.1:{free_port()}")
        waiting = asyncio.create_task(upstream.probe(probe_question().SerializeToString()))
        await asyncio.sleep(0)  # it asks
        await asyncio.sleep(0)
        waiting.cancel()
        assert upstream.probing is not None
        await asyncio.wait({upstream.probing})
        upstream.probing = None
        gc.collect()

    asyncio.run(end_while_it_asks())
    gc.collect()
    assert complaints == []


def test_a_small_shared_memory_is_named(repository):
    """In a mount namespace whose /dev/shm has 1 MiB, as in a container with too little."""
    serve = f"{BIN / 'vilu'} serve --direct --model-repository {repository} " + " ".join(
        f"--{kind}-port={port}" for kind, port in ports().items()
    )
    command = ["unshare", "-rm", "sh", "-c", f"mount -t tmpfs -o size=1m none /dev/shm && exec {serve}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("no mount namespace to be had")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "/dev/shm has 1 MiB free" in done.stderr
    assert "--shm-size" in done.stderr


@pytest.mark.parametrize("url", ["::1:8001", "[::1:8001", "127.0.0.1:99999", "grpc://", "127.0.0.1:port", "host:1/x"])
def test_a_bad_address_is_refused(url):
    with pytest.raises(UserError, match="HOST:PORT"):
        parse_url(url)


def test_a_free_port_is_offered_once_and_to_no_outgoing_connection():
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    offered = [free_port() for _ in range(200)]
    assert len(set(offered)) == 200
    assert all(1024 < port < lowest for port in offered)


def test_what_is_this_machine():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.3.2.1", "::1")))
    assert not any(map(is_loopback, ("128.0.0.1", "example.org", "127.0.0.1.example.org", "")))
    assert not is_this_machine("192.0.2.7")
    assert Path("/proc/net/fib_trie").exists() is False or is_this_machine("127.0.0.1")


def test_the_servers_log_has_no_alarm_about_cuda(tmp_path):
    reading, writing = os.pipe()
    thread = copy_without_alarms(os.fdopen(reading, "rb"), (tmp_path / "log").open("wb"))
    lines = [
        b'W1 pinned_memory_manager.cc:273] "Unable to allocate pinned system memory, pinned memory pool will not be\n',
        b'E1 server.cc:241] "CudaDriverHelper has not been initialized."\n',
        b"E1 ensemble_scheduler.cc:1468] unable to create stream for vilu: CUDA driver version is insufficient for\n",
        b"E1 model.cc:1] the model cannot be loaded\n",
        b"a last line without an end",
    ]
    with os.fdopen(writing, "wb") as pipe:
        pipe.writelines(lines)
    thread.join(30)
    assert (tmp_path / "log").read_bytes() == b"".join(lines[3:])


def test_a_log_that_nobody_reads_does_not_hold_up_the_server():
    reading, writing = os.pipe()
    nobody, target = os.pipe()
    os.close(nobody)
    thread = copy_without_alarms(os.fdopen(reading, "rb"), os.fdopen(target, "wb"))
    with os.fdopen(writing, "wb") as pipe:
        for _ in range(3):
            pipe.write(b"a line\n" * 100_000)
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("reason", "died"),
    [("Stub process 'preprocess_0_0' is not healthy.", True), ("ModuleNotFoundError: No module named 'head'", False)],
)
def test_a_process_killed_while_it_loads_says_nothing_against_its_model(repository, reason, died):
    """A supervisor starts such a server again; one whose model is wrong it does not."""
    server = Server(repository)
    server._notice(
        f"E1126 model_lifecycle.cc:642] \"failed to load 'preprocess' version 1: Internal: {reason}\"".encode()
    )
    assert server.stub_died_loading == died
    assert "preprocess did not load" in server.log_hint()


CRASH = """
import os, pathlib, signal
at_start = pathlib.Path({mark!r})
if len(at_start.read_bytes()) < {times}:
    with at_start.open("ab") as file:
        file.write(b"x")
    above = os.getppid()
    while pathlib.Path(f"/proc/{{above}}/comm").read_text().strip() != "tritonserver":
        above = int(pathlib.Path(f"/proc/{{above}}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(above, signal.SIGABRT)
"""


def crashing(repository: Path, folder: Path, times: int) -> tuple[Path, Path]:
    """A copy whose preprocessing ends tritonserver at so many starts, and the file that counts them."""
    root, mark = folder / "model_repository", folder / "crashes"
    shutil.copytree(repository, root)
    mark.touch()
    model = root / "preprocess" / "1" / "model.py"
    model.write_text(CRASH.format(mark=str(mark), times=times) + model.read_text())
    return root, mark


@pytest.mark.parametrize("way", [[], pytest.param(["--direct"], marks=pytest.mark.slow)], ids=["door", "direct"])
def test_a_crash_of_tritonserver_at_its_start_is_tried_again(repository, photos, tmp_path, way):
    """That is rare and nobody's mistake, so it is no reason to end."""
    root, mark = crashing(repository, tmp_path, times=1)
    at = ports()
    free = [f"--{kind}-port={port}" for kind, port in at.items()]
    command = [BIN / "vilu", "serve", *way, "--model-repository", root, *free]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            wait_for(f"http://127.0.0.1:{at['http']}", process, 60)
            with Client(f"127.0.0.1:{at['grpc']}", timeout=30) as client:
                assert client.ask(photos[:1])[0].error is None
        finally:
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=30)
    assert "tritonserver: it ended at start with code -6; restarting it" in errors or way
    assert "tritonserver: it ended with code -6; restarting it" in errors or not way
    assert mark.read_bytes() == b"x"


@pytest.mark.slow
def test_a_server_that_crashes_at_every_start_is_given_up(repository, tmp_path):
    root, mark = crashing(repository, tmp_path, times=9)
    with pytest.raises(UserError, match="ended at start with code -6"), Server(root, log=tmp_path / "log"):
        pytest.fail("it started")
    assert mark.read_bytes() == b"xxx"
