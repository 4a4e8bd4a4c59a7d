"""The door under what ended or filled tritonserver: cancel storms, 2 GB, servers that die; several servers."""

import asyncio
import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import grpc
import pytest
from tritonclient.grpc import InferResult
from tritonclient.grpc import service_pb2 as pb

from tests.serving.helpers import BIN, agree, descendants, opened, options, ports, question, stub_of
from vilu import UserError
from vilu.serving import Client, RequestRefused, Server
from vilu.serving.access import Access
from vilu.serving.address import open_directly
from vilu.serving.classes import list_sets, put_set, remove_set
from vilu.serving.door import Door, Limits, own_server

pytestmark = pytest.mark.server
STEER = "control-token-4567"


async def storm(url, images, count, wide, draw):
    """Ask `count` times, `wide` at a time, with clients that cancel or have no time; (how many ended how, answers)."""
    bodies = [question(image).SerializeToString() for image in images]
    outcomes: Counter[str] = Counter()
    answers: list[tuple[int, bytes]] = []
    room = asyncio.Semaphore(wide)
    async with contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(grpc.aio.insecure_channel(url)) for _ in range(4)]
        calls = [one.unary_unary("/inference.GRPCInferenceService/ModelInfer") for one in channels]

        async def one(i):
            async with room:
                patience = draw.choice([0.0, 0.01, 0.2, 1.0, None])
                timeout = draw.choice([patience, 60]) if patience is not None else 60
                call = calls[i % 4](bodies[i % len(bodies)], timeout=timeout)
                if patience is not None:
                    asyncio.get_running_loop().call_later(patience, call.cancel)
                try:
                    answers.append((i % len(bodies), await call))
                    outcomes["OK"] += 1
                except asyncio.CancelledError:
                    outcomes["CANCELLED"] += 1
                except grpc.aio.AioRpcError as error:
                    outcomes[error.code().name] += 1

        await asyncio.gather(*map(one, range(count)))
    return outcomes, answers


def test_a_storm_of_cancels_hurts_nobody(repository, photos, eager, tmp_path):
    """1,500 questions, 500 at a time, most of them left by their clients: the server lives, and whoever stays is
    answered right. Without the door 2.51 ends (bench/load.py --faults has the larger form)."""
    server = own_server(repository, log=tmp_path / "log")
    with opened(Door(options(limits=Limits(in_flight=128)), server)) as at:
        outcomes, answers = asyncio.run(storm(at.grpc, photos[:3], 1500, 500, random.Random(0)))
        assert set(outcomes) <= {"OK", "CANCELLED", "DEADLINE_EXCEEDED", "UNAVAILABLE"}
        assert outcomes["OK"] > 20
        for i, reply in answers:
            result = InferResult(pb.ModelInferResponse.FromString(reply))
            label, _, failure = eager(photos[i])
            assert result.as_numpy("LABEL")[0, 0].decode() == label
            assert result.as_numpy("FAILURE_PROBABILITY")[0, 0] == pytest.approx(failure, abs=1e-4)
        assert server.process.poll() is None
        with Client(at.grpc, timeout=60) as client:
            agree(client.ask(photos), photos, eager)
        text = metrics(at)
        assert "vilu_door_upstream_restarts_total 0.0" in text
        assert 'vilu_door_in_flight{model="vilu"} 0.0' in text


def metrics(at):
    return open_directly(f"http://{at.metrics}/metrics", timeout=10).read().decode()


def memory(pid, line):
    """Bytes of a line of /proc/PID/status."""
    found = re.search(rf"^{line}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) << 10


def test_two_gigabytes_cost_less_than_one_megabyte(repository, photos, tmp_path):
    """A body of 2 GB over HTTP: refused, and no process ever holds it. 600 MB over gRPC: nobody keeps them."""
    chosen = ports()
    flags = [f"--{kind}-port={port}" for kind, port in chosen.items()]
    with (tmp_path / "log").open("wb") as log:
        door = subprocess.Popen(
            [BIN / "vilu", "serve", "--model-repository", repository, *flags], stdout=log, stderr=log
        )
    try:
        wait(lambda: "serving" in (tmp_path / "log").read_text())
        with Client(f"127.0.0.1:{chosen['grpc']}") as client:
            client.ask(photos)
        small = f"POST /ask HTTP/1.1\r\nHost: x\r\nContent-Length: {65 << 20}\r\n\r\n".encode()
        assert pushed(chosen["http"], small, 65 << 20) < 65 << 20  # what the first refusal imports is there now
        pids = [pid for pid in descendants(door.pid) if Path(f"/proc/{pid}/status").read_text().count("VmRSS")]
        before = {pid: memory(pid, "VmRSS") for pid in pids}
        shm = sum(path.stat().st_blocks for path in Path("/dev/shm").glob(f"vilu_{door.pid}_*"))
        for pid in pids:
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # forgets the largest size so far
        large = f"POST /ask HTTP/1.1\r\nHost: x\r\nContent-Length: {2 << 30}\r\n\r\n".encode()
        chunked = b"POST /ask HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert pushed(chosen["http"], large, 2 << 30) < 2 << 30
        assert {pid for pid, size in before.items() if memory(pid, "VmHWM") - size > 1 << 20} == set()
        with grpc.insecure_channel(
            f"127.0.0.1:{chosen['grpc']}", options=[("grpc.max_send_message_length", -1)]
        ) as one:
            ask = one.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            with pytest.raises(grpc.RpcError) as caught:
                ask(question(bytes(600 << 20)).SerializeToString(), timeout=60)
            assert caught.value.code().name in ("RESOURCE_EXHAUSTED", "UNAVAILABLE")
        assert {pid for pid, size in before.items() if memory(pid, "VmHWM") - size > 8 << 20} == set()
        assert pushed(chosen["http"], chunked, 2 << 30, b"100000\r\n" + bytes(1 << 20) + b"\r\n") < 2 << 30
        assert sum(path.stat().st_blocks for path in Path("/dev/shm").glob(f"vilu_{door.pid}_*")) == shm
        with Client(f"127.0.0.1:{chosen['grpc']}") as client:
            assert client.ask(photos[:1])[0].label
    finally:
        door.send_signal(signal.SIGTERM)
        door.wait(60)


def pushed(port, head, size, piece=bytes(1 << 20)):
    """How much of a body the door let its sender send."""
    sent = 0
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head)
        with contextlib.suppress(OSError):  # refused
            while sent < size:
                connection.sendall(piece)
                sent += len(piece)
    return sent


def test_a_restart_is_invisible(repository, photos, eager, tmp_path):
    """The server, then a model's process, is killed while four clients ask: every question is answered, none wrong."""
    server = own_server(repository, log=tmp_path / "log")
    with opened(Door(options(), server, supervise=True)) as at:
        stop, faults, done = threading.Event(), [], []

        def ask(url):
            with Client(url, timeout=60) as client:
                while not stop.is_set():
                    try:
                        agree(client.ask(photos[:2]), photos[:2], eager)
                        done.append(time.monotonic())
                    except BaseException as error:
                        faults.append(error)

        threads = [threading.Thread(target=ask, args=(url,)) for url in (at.grpc, f"http://{at.http}") * 2]
        for thread in threads:
            thread.start()
        try:
            for victim in ("server", "preprocess"):
                wait(more_than(done, len(done) + 8))
                before = server.process.pid
                os.kill(before if victim == "server" else stub_of(before, victim), signal.SIGKILL)
                wait(lambda before=before: server.process.pid != before)
                killed = time.monotonic()
                wait(lambda killed=killed: sum(at > killed for at in done) > 8)
        finally:
            stop.set()
            for thread in threads:
                thread.join(120)
        assert not faults, faults
        assert "vilu_door_upstream_restarts_total 2.0" in metrics(at)


def more_than(done, count):
    return lambda: len(done) > count


def wait(for_what, seconds=120):
    deadline = time.monotonic() + seconds
    while not for_what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_several_servers_share_the_questions_and_one_may_go_and_come(repository, server, photos, eager, tmp_path):
    second = Server(repository, log=tmp_path / "log", stop_seconds=1)
    same = {name: getattr(second, name) for name in ("grpc_port", "http_port", "metrics_port")}
    with second:
        door = Door(options(upstreams=[server.grpc_url, second.grpc_url], limits=Limits(sent=2)))
        with opened(door) as at, Client(at.grpc, timeout=60, batch_size=1, in_flight=8) as client:
            wait(lambda: all(one.well for one in door.upstreams.all))
            before = second.inferences()
            agree(client.ask(photos * 4), photos * 4, eager)
            assert second.inferences() > before
            second.stop()
            agree(client.ask(photos * 2), photos * 2, eager)
            wait(lambda: not door.upstreams.all[1].well)
            assert 'vilu_door_upstream_well{url="' + second.grpc_url + '"} 0.0' in metrics(at)
            with Server(repository, log=tmp_path / "again", stop_seconds=1, **same) as again:
                wait(lambda: door.upstreams.all[1].well)
                before = again.inferences()
                agree(client.ask(photos * 4), photos * 4, eager)
                assert again.inferences() > before


@pytest.mark.slow
def test_a_class_set_is_put_at_every_server_or_at_none(repository, photos, checkpoint, tmp_path, monkeypatch):
    names = list(checkpoint.class_set.names)

    def started(name, **given):
        monkeypatch.setenv("VILU_CLASS_SETS", str(tmp_path / name))
        return Server(repository, access=Access(None, STEER), log=tmp_path / f"{name}.log", stop_seconds=1, **given)

    def sets(server):
        with Client(server.grpc_url) as client:
            return [one.name for one in client.run(list_sets)]

    first = started("first")
    with first:
        second = started("second")
        same = {name: getattr(second, name) for name in ("grpc_port", "http_port", "metrics_port")}
        with second:
            door = Door(options(upstreams=[first.grpc_url, second.grpc_url]))
            with opened(door) as at, Client(at.grpc, timeout=60) as client:
                wait(lambda: all(one.well for one in door.upstreams.all))
                client.run(put_set, "pets", names[:3], control_token=STEER)
                assert sets(first) == sets(second) == ["default", "pets"]
                with pytest.raises(UserError, match="repeats"):
                    client.run(put_set, "bad", [names[0], names[0]], control_token=STEER)
                assert sets(first) == sets(second) == ["default", "pets"]
                second.stop()
                wait(lambda: not door.upstreams.all[1].well)
                with pytest.raises(RequestRefused, match="every server"):
                    client.run(put_set, "more", names[:2], control_token=STEER)
                assert sets(first) == ["default", "pets"]
                with started("second", **same) as again:
                    wait(lambda: door.upstreams.all[1].well)
                    client.run(remove_set, "pets", control_token=STEER)
                    assert sets(first) == sets(again) == ["default"]
