"""The client's promises: order, bounded memory, retries, deadlines, shared memory, and the files of `vilu ask`."""

import asyncio
import errno
import json
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from tritonclient import http

from tests.serving.helpers import BIN, agree, descendants, rows_of, vilu
from vilu import UserError
from vilu.serving import AsyncClient, Client, DeadlineExceeded, Server, ServerUnavailable
from vilu.serving.address import free_port

pytestmark = pytest.mark.server


def urls(server):
    return [server.grpc_url, server.http_url]


@pytest.mark.parametrize("in_flight", [1, 3])
@pytest.mark.parametrize("protocol", [0, 1])
def test_a_stream_keeps_order_and_reads_no_further_than_it_asks(server, photos, eager, protocol, in_flight):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield photos[(taken - 1) % len(photos)]

    with Client(urls(server)[protocol], batch_size=2, in_flight=in_flight) as client:
        stream = client.stream(endless())
        for place, photo in enumerate(photos * 2, 1):
            agree([next(stream)], [photo], eager)
            assert taken <= place + 2 * in_flight + 1
        stream.close()  # type: ignore[attr-defined]  # it is a generator
        agree(client.ask(photos[:1]), photos[:1], eager)


def test_an_async_stream_and_bad_images_in_between(server, photos, eager):
    async def everything():
        async with AsyncClient(server.grpc_url, batch_size=4, in_flight=2) as client:
            return [answer async for answer in client.stream([*photos[:5], b"garbage", "/absent", *photos[5:]])]

    answers = asyncio.run(everything())
    assert [i for i, answer in enumerate(answers) if answer.error] == [5, 6]
    agree(answers[:5] + answers[7:], photos, eager)


@pytest.mark.parametrize("protocol", [0, 1])
def test_embeddings_are_answered_as_their_images_are(server, photos, eager, protocol):
    with Client(urls(server)[protocol], batch_size=5) as client:
        images = client.ask(photos, embedding=True)
        rows = 3 * np.array([answer.embedding for answer in images])
        agree(client.ask_embeddings(rows), photos, eager)
        labels = ["handwritten three", "a cat", "red circle"]
        for answer, same in zip(client.ask_embeddings(rows, labels), client.ask(photos, labels), strict=True):
            assert (answer.label, answer.accept) == (same.label, same.accept)
            assert answer.failure_probability == pytest.approx(same.failure_probability, abs=1e-4)


def test_threads_share_a_client(server, photos, eager):
    found: dict[int, list] = {}
    with Client(server.grpc_url) as client:
        threads = [
            threading.Thread(target=lambda i=i: found.__setitem__(i, client.ask(photos[i : i + 3]))) for i in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i in range(8):
        agree(found[i], photos[i : i + 3], eager)


def test_a_server_that_comes_up_late_is_waited_for(repository, photos, eager, tmp_path):
    """Refused connections are UNAVAILABLE: retried until the timeout, not given up at once."""
    grpc_port, http_port = free_port(), free_port()
    found = {}

    def ask(url):
        with Client(url, timeout=60) as client:
            found[url] = client.ask(photos[:2])

    asking = [
        threading.Thread(target=ask, args=(u,)) for u in (f"127.0.0.1:{grpc_port}", f"http://127.0.0.1:{http_port}")
    ]
    for thread in asking:
        thread.start()
    time.sleep(0.5)
    with Server(repository, grpc_port=grpc_port, http_port=http_port, log=tmp_path / "log"):
        for thread in asking:
            thread.join(60)
    assert len(found) == 2
    for answers in found.values():
        agree(answers, photos[:2], eager)


def test_a_server_that_never_answers_costs_no_more_than_the_timeout():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        for url in (f"127.0.0.1:{port}", f"http://127.0.0.1:{port}"):
            with Client(url, timeout=1) as client, pytest.raises(ServerUnavailable) as caught:
                client.ask([b"x"])
            assert "\n" not in str(caught.value)


def test_a_stopped_server_is_a_deadline_not_a_refusal(repository, photos, tmp_path):
    with Server(repository, log=tmp_path / "log", stop_seconds=2) as server:
        pids = descendants(server.process.pid)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            for url in urls(server):
                with Client(url, timeout=1) as client, pytest.raises(DeadlineExceeded, match="in 1 s"):
                    client.ask(photos[:1])
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)


def large():
    """Images that together pass the size from which shared memory is used."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (400, 500, 3), np.uint8) for _ in range(3)]


@pytest.mark.parametrize("protocol", [0, 1])
def test_large_requests_go_through_shared_memory_and_leave_none(server, protocol):
    before = regions()
    pictures = large()
    with Client(urls(server)[protocol], shared_memory=False) as client:
        plain = client.ask(pictures)
    with Client(urls(server)[protocol]) as client:
        shared = client.ask(pictures)
        ours = regions()
        assert len(ours - before) == 1
        assert client.ask(pictures) == shared  # the same region again
        assert regions() == ours
        status = http.InferenceServerClient(server.http_url.removeprefix("http://"))
        assert len(status.get_system_shared_memory_status()) == 1
    assert shared == plain
    assert status.get_system_shared_memory_status() == []
    status.close()
    assert not regions() - before


@pytest.mark.parametrize("where", ["SharedMemory", "os.posix_fallocate"])
def test_where_shared_memory_cannot_be_had_requests_are_sent(server, monkeypatch, where):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = regions()
    monkeypatch.setattr(f"vilu.serving.shared_memory.{where}", full)
    with Client(server.grpc_url) as client:
        assert all(answer.error is None for answer in client.ask(large()))
        assert not regions() - before


def regions():
    """Of this process: other tests run beside it."""
    return {path.name for path in Path("/dev/shm").glob(f"vilu_client_{os.getpid()}_*")}


def test_one_failure_does_not_end_the_use_of_shared_memory(server, monkeypatch, caplog):
    """A full /dev/shm is logged, the request is sent all the same, and shared memory is used again after a pause."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = regions()
    with Client(server.grpc_url, shared_memory=True) as client:
        with monkeypatch.context() as patch:
            patch.setattr("vilu.serving.shared_memory.SharedMemory", full)
            assert client.ask(large())[0].error is None
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "without shared memory" in caplog.text
        assert os.strerror(errno.ENOSPC) in caplog.text
        client.ask(large())
        assert regions() == before  # within the pause
        monkeypatch.setattr("vilu.serving.shared_memory.time.monotonic", lambda: time.time() + 1e9)
        client.ask(large())
        assert len(regions() - before) == 1
    assert regions() <= before


def test_a_registration_that_is_cut_off_leaves_no_memory():
    before = regions()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        for url in (f"127.0.0.1:{port}", f"http://127.0.0.1:{port}"):
            with Client(url, timeout=1) as client, pytest.raises(ServerUnavailable):
                client.ask(large())
            assert regions() <= before


@pytest.mark.parametrize("protocol", [0, 1])
def test_close_ends_though_the_server_says_nothing(repository, tmp_path, protocol):
    before = regions()
    with Server(repository, log=tmp_path / "log", stop_seconds=2) as server:
        client = Client(urls(server)[protocol], timeout=600)
        client.ask(large())
        assert regions() - before
        pids = descendants(server.process.pid)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        closing = threading.Thread(target=client.close, daemon=True)
        closing.start()
        closing.join(60)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        assert not closing.is_alive()
        assert regions() <= before


def test_close_frees_a_thread_that_waits_for_an_answer():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = Client(f"127.0.0.1:{silent.getsockname()[1]}", timeout=600)
        found = []

        def ask():
            with pytest.raises(UserError, match="closed before the answer"):
                client.ask([b"x"])
            found.append(True)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        silent.accept()  # the request is under way
        client.close()
        asking.join(30)
        assert found
        with pytest.raises(UserError, match="is closed"):
            client.ask([b"x"])


@pytest.mark.parametrize("protocol", [0, 1])
def test_a_fault_of_the_program_is_not_reported_as_the_servers(server, photos, protocol, monkeypatch):
    with Client(urls(server)[protocol]) as client:
        with pytest.raises(TypeError, match="labels must be strings, not 3"):
            client.ask(photos[:1], [3])  # type: ignore[list-item]
        with pytest.raises(TypeError, match="a list of strings"):
            client.ask(photos[:1], "cat")
        with pytest.raises(TypeError, match="class_set"):
            client.ask(photos[:1], class_set=3)  # type: ignore[arg-type]
        with pytest.raises(UserError, match="labels: needs at least two labels, found only 'a cat'"):
            client.ask(photos[:1], ["a cat"])
        with pytest.raises(UserError, match="surrogate"):
            client.ask(photos[:1], ["a cat", "\ud800"])
        with monkeypatch.context() as patch:
            patch.setattr("vilu.serving.answers.OUTPUTS", None)
            with pytest.raises(TypeError):
                client.ask(photos[:1])
        # Bytes of a command line that are not UTF-8 are the server's to refuse.
        assert "UTF-8" in client.ask(photos[:1], ["a cat", "caf\udce9"])[0].error
        assert client.ask(photos[:1])[0].error is None


@pytest.mark.parametrize("token", ["", " ", "two words", "first-of-two\nsecond", "\ufeffa-token-with-a-mark"])
def test_a_malformed_token_is_refused_at_once(token):
    with pytest.raises(UserError, match="token: ") as caught:
        Client("127.0.0.1:1", token=token)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("ftp://127.0.0.1:1", {}, "scheme"),
        ("127.0.0.1:1", {"batch_size": 0}, "batch_size"),
        ("127.0.0.1:1", {"timeout": 0}, "timeout"),
        ("127.0.0.1:1", {"tls_ca": "x"}, "grpcs"),
        ("grpcs://127.0.0.1:1", {"tls_ca": "/absent"}, "TLS"),
        ("https://127.0.0.1:1", {"tls_ca": "/absent"}, "TLS"),
    ],
)
def test_bad_arguments(url, options, message):
    def clients():  # by name: a gRPC thread of an earlier test may end at any time
        return [thread for thread in threading.enumerate() if thread.name == "vilu client"]

    before = clients()
    with pytest.raises(UserError, match=message):
        Client(url, **options)
    assert clients() == before


@pytest.fixture
def folder(tmp_path, photos):
    """a/0.jpg, a/b/1.png and a/b/2.webp, one file that is no image, and one that is of no interest."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "0.jpg").write_bytes(photos[0])
    (tmp_path / "a" / "b" / "1.png").write_bytes(photos[1])
    (tmp_path / "a" / "b" / "2.webp").write_bytes(photos[2])
    (tmp_path / "a" / "b" / "3.jpg").write_bytes(b"no image")
    (tmp_path / "a" / "notes.txt").write_text("not asked about")
    return tmp_path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_vilu_ask_writes_every_answer_of_a_folder(server, folder, photos, eager, suffix):
    output = folder / f"answers{suffix}"
    done = vilu("ask", folder / "a", "--url", server.grpc_url, "--output", output)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"{folder / 'a/b/3.jpg'}: not a JPEG, PNG or WEBP image"]
    rows = rows_of(output)
    assert [Path(row["source"]).name for row in rows] == ["0.jpg", "1.png", "2.webp", "3.jpg"]
    for row, photo in zip(rows, photos[:3], strict=False):
        label, confidence, failure = eager(photo)
        assert row["label"] == label
        assert float(row["confidence"]) == pytest.approx(confidence, abs=1e-4)
        assert float(row["failure_probability"]) == pytest.approx(failure, abs=1e-4)
    assert rows[3]["error"] == "not a JPEG, PNG or WEBP image"
    assert [path.name for path in folder.iterdir() if path.suffix == suffix] == [output.name]


def test_vilu_ask_writes_json_lines_to_standard_output(server, folder):
    done = vilu("ask", folder / "a", "--url", server.grpc_url, "--output", "-")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(row["source"]).name for row in rows] == ["0.jpg", "1.png", "2.webp", "3.jpg"]
    assert rows[3]["error"] == "not a JPEG, PNG or WEBP image"
    assert rows[0]["label"].startswith("handwritten ")
    assert not (folder / "-").exists()


def test_vilu_ask_takes_patterns_and_names_from_stdin(server, folder):
    found = vilu("ask", f"{folder}/a/**/*.png", "--json", "--url", server.grpc_url)
    assert [Path(row["source"]).name for row in json.loads(found.stdout)] == ["1.png"]
    names = f"{folder}/a/0.jpg\n{folder}/a/b/2.webp\n"
    found = vilu("ask", "-", "--json", "--url", server.http_url, input=names)
    assert [Path(row["source"]).name for row in json.loads(found.stdout)] == ["0.jpg", "2.webp"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{0}/nothing/*.jpg"], "no .jpg"),
        (["{0}/a", "--output", "{0}/answers.txt"], "must end in"),
        (["{0}/a", "--output", "{0}/absent/answers.csv"], "cannot be written"),
        (["{0}/a", "--output", "{0}/answers.csv", "--json"], "one or the other"),
    ],
)
def test_vilu_ask_refuses_in_one_line(server, folder, arguments, message):
    done = vilu("ask", *[part.format(folder) for part in arguments], "--url", server.grpc_url)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_answers_of_an_interrupted_run_are_kept(repository, folder, tmp_path):
    """The server goes away in the middle: the answers until then lie in a file that is named."""
    with Server(repository, log=tmp_path / "log", stop_seconds=1) as server:
        asking = subprocess.Popen(
            [BIN / "python", "-c", _SLOW, server.grpc_url, folder / "out.jsonl", folder / "a" / "0.jpg"],
            stderr=subprocess.PIPE,
            text=True,
        )
        while not (folder / "ready").exists():
            assert asking.poll() is None
            time.sleep(0.05)
    _, told = asking.communicate(timeout=60)
    assert asking.returncode == 1
    assert "answers until then are in" in told
    assert not (folder / "out.jsonl").exists()
    assert len(rows_of(folder / "out.part.jsonl")) >= 2


# `vilu ask` over a source of names that says when two answers are there, and then goes on for long.
_SLOW = """
import sys, time
from pathlib import Path
from vilu.cli import run
from vilu.cli import ask
url, output, image = sys.argv[1:]

class Names(list):
    def __iter__(self):
        for i in range(10**6):
            if i == 6:
                Path(output).with_name("ready").touch()
            time.sleep(0.05 if i > 6 else 0)
            yield image

    def __bool__(self):
        return True

ask.find_images = lambda given: Names()
ask.list = lambda names: names
sys.argv = ["vilu", image, "--url", url, "--output", output, "--batch-size", "1", "--in-flight", "2", "--timeout", "2"]
run(ask.ask_command, "vilu ask")
"""
