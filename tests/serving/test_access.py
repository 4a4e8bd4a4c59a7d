"""Tokens, TLS, closed protocols, the health probe and the supervisor, against the real tritonserver."""

import os
import signal
import subprocess
import sys
import time

import pytest
from tritonclient import grpc, http
from tritonclient.utils import InferenceServerException

from tests.serving.helpers import ASK, BIN, STEER, agree, certificate, ports, stub_of, tritonserver_of, vilu
from vilu import UserError
from vilu.serving import AccessDenied, Client, Server, ServerUnavailable
from vilu.serving.access import Access
from vilu.serving.address import free_port
from vilu.serving.tokens import CONTROL, TOKEN, token_from

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def secured(repository, tmp_path_factory):
    """(server, keyword arguments of a client that it answers): both tokens, and TLS on both sides."""
    folder = tmp_path_factory.mktemp("tls")
    certificate(folder, "authority")
    certificate(folder, "server", "authority")
    certificate(folder, "client", "authority")
    access = Access(ASK, STEER, folder / "server.pem", folder / "server.key", folder / "authority.pem")
    mine = {"tls_ca": folder / "authority.pem", "tls_cert": folder / "client.pem", "tls_key": folder / "client.key"}
    with Server(repository, access=access, log=folder / "log") as server:
        yield server, {"token": ASK, **mine}


def test_a_client_with_token_and_certificate_is_answered(secured, photos, eager):
    server, mine = secured
    assert server.grpc_url.startswith("grpcs://")
    with Client(server.grpc_url, **mine) as client:
        agree(client.ask(photos[:3]), photos[:3], eager)
    with Client(server.http_url, token=ASK) as client:
        agree(client.ask(photos[:3]), photos[:3], eager)


@pytest.mark.parametrize("token", [None, "another-token-0123", STEER])
def test_without_the_token_nothing_is_answered(secured, token):
    server, mine = secured
    for url, given in ((server.grpc_url, {**mine, "token": token}), (server.http_url, {"token": token})):
        with Client(url, timeout=5, **given) as client, pytest.raises(AccessDenied, match="token"):
            client.ask([b"x"])


def test_without_the_certificate_there_is_no_connection(secured):
    server, mine = secured
    plain = server.grpc_url.removeprefix("grpcs://")
    for url, given in ((server.grpc_url, {"tls_ca": mine["tls_ca"]}), (server.grpc_url, {}), (plain, {})):
        with Client(url, timeout=1, token=ASK, **given) as client, pytest.raises(ServerUnavailable):
            client.ask([b"x"])


def test_the_control_token_alone_loads_and_unloads(secured):
    server, _ = secured
    client = http.InferenceServerClient(server.http_url.removeprefix("http://"))
    for headers in ({}, {TOKEN: ASK}, {CONTROL: ASK}):
        with pytest.raises(InferenceServerException):
            client.unload_model("clip_text", headers=headers)
    assert client.is_model_ready("clip_text")
    client.unload_model("clip_text", headers={CONTROL: STEER})
    client.load_model("clip_text", headers={CONTROL: STEER})
    assert client.is_model_ready("clip_text")
    client.close()


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_what_changes_the_server_is_closed_by_default(server, protocol):
    api = {"grpc": grpc, "http": http}[protocol]
    url = server.grpc_url if protocol == "grpc" else server.http_url.removeprefix("http://")
    client = api.InferenceServerClient(url)
    for attempt in (
        lambda: client.load_model("vilu"),
        lambda: client.unload_model("vilu"),
        lambda: client.update_trace_settings(settings={"trace_level": ["TIMESTAMPS"]}),
        lambda: client.update_log_settings({"log_verbose_level": 5}),
    ):
        with pytest.raises(InferenceServerException, match="restricted"):
            attempt()
    client.close()


def test_other_machines_may_not_name_this_ones_memory():
    flags = Access().flags("0.0.0.0")
    assert all("shared-memory" in flag for flag in flags)
    assert not any("shared-memory" in flag for flag in Access().flags("127.0.0.1"))
    secret = flags[0].rpartition("=")[2]
    assert len(secret) > 30
    assert secret not in "".join(Access().flags("0.0.0.0"))


def test_with_tls_plain_http_stays_on_loopback(tmp_path):
    certificate(tmp_path, "server")
    secure = Access(tls_cert=tmp_path / "server.pem", tls_key=tmp_path / "server.key")
    assert secure.http_host("0.0.0.0") == "127.0.0.1"
    assert Access().http_host("0.0.0.0") == "0.0.0.0"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"token": "short"}, "token: 16"),
        ({"token": "a token with spaces in it"}, "token: 16"),
        ({"token": ASK, "control_token": ASK}, "must not be"),
        ({"tls_cert": "here"}, "certificate and its key"),
        ({"tls_ca": "here"}, "of the server's own"),
        ({"tls_cert": "absent", "tls_key": "absent"}, "cannot be read"),
        ({"tls_cert": "here", "tls_key": "here"}, "not a PEM"),
    ],
)
def test_bad_settings_are_told_in_one_line(tmp_path, given, message):
    (tmp_path / "here").write_text("no certificate")
    given = {key: tmp_path / value if key.startswith("tls") else value for key, value in given.items()}
    with pytest.raises(UserError, match=message) as caught:
        Access(**given)
    assert "\n" not in str(caught.value)


def test_tokens_come_from_options_files_and_the_environment(tmp_path, monkeypatch):
    (tmp_path / "token").write_text(f"{ASK}\n")
    monkeypatch.setenv("VILU_TOKEN", STEER)
    assert token_from(ASK, "VILU_TOKEN") == ASK
    assert token_from(f"@{tmp_path / 'token'}", "VILU_TOKEN") == ASK
    assert token_from(None, "VILU_TOKEN") == STEER
    assert token_from(None, "VILU_ABSENT") is None
    with pytest.raises(UserError, match="cannot be read"):
        token_from(f"@{tmp_path / 'absent'}", "VILU_TOKEN")
    # Editors on Windows begin a file with a byte order mark. An option or a variable has none.
    (tmp_path / "token").write_text(f"{ASK}\r\n", "utf-8-sig")
    assert token_from(f"@{tmp_path / 'token'}", "VILU_TOKEN") == ASK
    with pytest.raises(UserError, match="byte order mark"):
        token_from(f"\ufeff{ASK}", "VILU_TOKEN")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (" \t\n", "is empty"),
        ("\ufeff", "is empty"),
        (f"{ASK}\n{STEER}\n", "more than one line"),
        ("a token with spaces", "a space or a character"),
        ("schlüssel-schlüssel", "printable ASCII"),
    ],
)
def test_an_empty_or_malformed_secret_is_refused(tmp_path, monkeypatch, content, message):
    (tmp_path / "token").write_text(content, "utf-8")
    with pytest.raises(UserError, match=message) as caught:
        token_from(f"@{tmp_path / 'token'}", "VILU_TOKEN")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message):
        token_from(content, "VILU_TOKEN")
    monkeypatch.setenv("VILU_TOKEN", content)
    with pytest.raises(UserError, match=message):
        token_from(None, "VILU_TOKEN")


@pytest.mark.parametrize(
    ("command", "option", "variable"),
    [
        (["serve"], "--token", "VILU_TOKEN"),
        (["serve"], "--control-token", "VILU_CONTROL_TOKEN"),
        (["serve", "--direct"], "--token", "VILU_TOKEN"),
        (["ask", "photo.jpg"], "--token", "VILU_TOKEN"),
        (["health"], "--token", "VILU_TOKEN"),
        (["classes", "list"], "--token", "VILU_TOKEN"),
        (["classes", "remove", "pets"], "--control-token", "VILU_CONTROL_TOKEN"),
        (["web", "--port", "0"], "--token", "VILU_TOKEN"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else given,
)
def test_every_command_refuses_an_empty_secret(repository, monkeypatch, command, option, variable):
    """It never stands for none: a server would be open to everybody."""
    given = [*command, "--model-repository", repository] if command[0] == "serve" else command
    by_option = vilu(*given, option, "")
    monkeypatch.setenv(variable, "")
    by_environment = vilu(*given)
    for done in (by_option, by_environment):
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert "is empty" in done.stderr


def test_vilu_health(server):
    for url in (server.grpc_url, server.http_url):
        well = vilu("health", "--url", url)
        assert (well.returncode, well.stderr) == (0, "")
    ill = vilu("health", "--url", f"127.0.0.1:{free_port()}", "--timeout", "1")
    assert ill.returncode == 1
    assert len(ill.stderr.splitlines()) == 1
    assert vilu("health", "--url", server.grpc_url, "--model", "absent").returncode == 1


DIRECT = pytest.param(["--direct"], marks=pytest.mark.slow, id="direct")
WAYS = pytest.mark.parametrize("way", [pytest.param([], id="door"), DIRECT])


def health(url: str) -> int:
    return vilu("health", "--url", url, "--timeout", "2").returncode


def wait_well(url: str, seconds: float) -> float:
    """Seconds until the server answers."""
    start = time.monotonic()
    while health(url) != 0:
        assert time.monotonic() - start < seconds, "the server does not answer"
    return time.monotonic() - start


@WAYS
def test_a_dead_stub_is_noticed_and_the_server_comes_back(repository, photos, eager, tmp_path, way):
    """kill -9 of a stub, then of the server: the health probe sees it, and under --supervise both come back."""
    chosen = ports()
    url = f"127.0.0.1:{chosen['grpc']}"
    flags = [f"--{kind}-port={port}" for kind, port in chosen.items()]
    with (tmp_path / "log").open("wb") as log:
        launcher = subprocess.Popen(
            [BIN / "vilu", "serve", *way, "--supervise", "--model-repository", repository, *flags],
            stderr=log,
            stdout=log,
        )
    try:
        wait_well(url, 120)
        for victim in ("preprocess", "clip_image", "server"):
            pid = tritonserver_of(launcher.pid) if victim == "server" else stub_of(launcher.pid, victim)
            assert pid
            os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + 60
            # First gone, then back: a new process in its place.
            while (now := stub_of(launcher.pid, "preprocess" if victim == "server" else victim)) in (0, pid):
                assert time.monotonic() < deadline, f"{victim} did not come back"
                time.sleep(0.1)
            assert now != pid
            wait_well(url, 120)
            with Client(url) as client:
                agree(client.ask(photos[:2]), photos[:2], eager)
        told = (tmp_path / "log").read_text()
        assert told.count("restarting it") >= 3  # more where a busy machine kept a probe waiting
        launcher.send_signal(signal.SIGTERM)
        # 1: on a busy machine a probe that was given up may hold a model past the exit timeout.
        assert launcher.wait(30) in (0, 1)
    finally:
        launcher.kill()
        launcher.wait()


@pytest.mark.slow
@WAYS
def test_a_stub_that_dies_before_the_first_answer_is_noticed(repository, tmp_path, way):
    """Then no answer would ever come; the launcher must not wait for it, nor take it for a mistake of its user's."""
    chosen = ports()
    flags = [f"--{kind}-port={port}" for kind, port in chosen.items()]
    with (tmp_path / "log").open("wb") as log:
        launcher = subprocess.Popen(
            [BIN / "vilu", "serve", *way, "--supervise", "--model-repository", repository, *flags],
            stderr=log,
            stdout=log,
        )
    try:
        deadline = time.monotonic() + 60
        while not (pid := stub_of(launcher.pid, "preprocess")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        wait_well(f"127.0.0.1:{chosen['grpc']}", 60)
        told = (tmp_path / "log").read_text()
        assert "a model's process died" in told
        while "serving" not in told:
            assert time.monotonic() < deadline + 60
            told = (tmp_path / "log").read_text()
        # And again, now as soon as it answers: what a supervisor has seen to work is started again, whatever happens.
        server = tritonserver_of(launcher.pid)
        os.kill(server, signal.SIGKILL)
        while (again := tritonserver_of(launcher.pid)) in (0, server):
            time.sleep(0.01)
        os.kill(again, signal.SIGKILL)
        wait_well(f"127.0.0.1:{chosen['grpc']}", 60)
        assert (tmp_path / "log").read_text().count("restarting it") >= 2
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(30) in (0, 1)
    finally:
        launcher.kill()
        launcher.wait()


def test_a_process_that_is_dead_for_a_moment_is_no_dead_model(repository, monkeypatch):
    """The backend starts each stub by `sh`, and a crash report by addr2line: their ends are not a model's."""
    lines = "import os,sys,time; sys.stdout.flush()\n"
    lines += "for name in sys.argv[1:]:\n  child = os.fork()\n"
    lines += "  if not child: open('/proc/self/comm','w').write(name); os._exit(0)\n"
    lines += "  os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)\n"  # it is dead, and stays unreaped
    lines += "print('ready', flush=True); time.sleep(600)"
    server = Server(repository)
    server.process = subprocess.Popen(
        [sys.executable, "-c", lines, "sh", "addr2line", "triton_python_b"], stdout=subprocess.PIPE
    )
    try:
        assert server.process.stdout.readline() == b"ready\n"
        now = [0.0]
        monkeypatch.setattr("vilu.serving.server.time.monotonic", lambda: now[0])
        for now[0], expected in (
            (0.0, set()),  # a stub, too, may be reaped in a moment
            (0.9, set()),
            (1.1, {"triton_python_b"}),
            (4.9, {"triton_python_b"}),
            (5.1, {"triton_python_b", "sh", "addr2line"}),  # nobody reaps them: a model that died as it was started
        ):
            assert {name.split()[0] for name in server.dead_stubs()} == expected
    finally:
        server.process.kill()
        server.process.wait()
        server.process.stdout.close()


def test_without_supervision_a_dead_stub_is_seen_by_the_probe_alone(repository, tmp_path):
    with Server(repository, log=tmp_path / "log", stop_seconds=2) as server:
        assert health(server.grpc_url) == 0
        os.kill(stub_of(server.process.pid, "vilu_head"), signal.SIGKILL)
        api = grpc.InferenceServerClient(server.grpc_url)
        deadline = time.monotonic() + 20
        while not server.dead_stubs():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert api.is_server_ready()  # the server's own word is worth nothing here
        assert api.is_model_ready("vilu")
        assert health(server.grpc_url) == 1
        api.close()
