"""Who may pass the door: tokens with names, TLS on both protocols, both changed while it serves; who may change it."""

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient import http as triton_http

from tests.serving.helpers import ASK, BIN, STEER, agree, certificate, descendants, opened, options, ports, vilu
from vilu import UserError
from vilu.serving import AccessDenied, Client, RequestRefused, Server, ServerUnavailable
from vilu.serving.access import Access
from vilu.serving.address import open_directly
from vilu.serving.classes import get_set, list_sets, put_set, remove_set
from vilu.serving.door import Door, own_server
from vilu.serving.door.keys import Keys, read_tokens

pytestmark = pytest.mark.server
TWO = "# who asks\nshop shop-token-0123456789\n\nlab lab-token-0123456789\n"


def status(url, token: Any = None, header="authorization", context=None):
    value: Any = f"Bearer {token}" if header == "authorization" else token
    request = urllib.request.Request(f"{url}/ask", b"x", {} if token is None else {header: value})
    try:
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        return opener.open(request, timeout=30).status
    except urllib.error.HTTPError as error:
        return error.code


def test_tokens_with_names_are_asked_for_and_read_again(server, photos, tmp_path):
    (tmp_path / "tokens").write_text(TWO)
    door = Door(
        options(upstreams=[server.grpc_url], tokens=tmp_path / "tokens", access_log=str(tmp_path / "log")), None
    )
    with opened(door) as at:
        for url in (at.grpc, f"http://{at.http}"):
            for known in ("shop-token-0123456789", "lab-token-0123456789"):
                with Client(url, token=known) as client:
                    assert client.ask(photos[:1])[0].label
            for wrong in (None, "another-token-0123456789", "shop"):
                with Client(url, token=wrong, timeout=10) as client, pytest.raises(AccessDenied):
                    client.ask(photos[:1])
        http = f"http://{at.http}"
        assert status(http) == status(http, "x" * 20) == 401
        assert status(http, "shop-token-0123456789") == 400  # it is let in; the image is none
        assert status(http, "lab-token-0123456789", "vilu-token") == 400
        with grpc.insecure_channel(at.grpc) as channel:  # a probe of Kubernetes has no token
            assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10).status == 1
        assert open_directly(f"{http}/readyz", timeout=10).status == 200
        # One is withdrawn, one is new: seen within seconds, by the file alone.
        (tmp_path / "tokens.new").write_text("lab lab-token-0123456789\nnew new-token-0123456789\n")
        os.replace(tmp_path / "tokens.new", tmp_path / "tokens")
        wait(lambda: status(http, "new-token-0123456789") == 400)
        assert status(http, "shop-token-0123456789") == 401
        # A file that is none changes nothing.
        (tmp_path / "tokens").write_text("new short\n")
        wait(lambda: b'vilu_door_reloads_total{result="refused"} 1.0' in metrics(at))
        assert status(http, "new-token-0123456789") == 400
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert {line.get("token") for line in lines} == {None, "shop", "lab", "new"}
    assert "token-0123456789" not in (tmp_path / "log").read_text()
    assert {line["reason"] for line in lines if line["outcome"] in ("401", "UNAUTHENTICATED")} == {"token"}


def metrics(at):
    return open_directly(f"http://{at.metrics}/metrics", timeout=10).read()


def wait(for_what, seconds=60):
    deadline = time.monotonic() + seconds
    while not for_what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no token"),
        ("# nothing\n", "holds no token"),
        ("alone-0123456789abcdef\n", "line 1 is not a name"),
        ("shop a-token-0123456789 more\n", "line 1 is not a name"),
        ("shop short\n", "line 1: 16 to 256"),
        ("shop shop-token-0123456789\nshop other-token-0123456789\n", "line 2 has a name or a token"),
        ("shop shop-token-0123456789\nlab shop-token-0123456789\n", "line 2 has a name or a token"),
    ],
)
def test_a_file_of_tokens_that_is_none_is_refused_at_start(tmp_path, repository, text, message):
    (tmp_path / "tokens").write_text(text)
    with pytest.raises(UserError, match=message):
        read_tokens(tmp_path / "tokens")
    done = vilu("serve", "--model-repository", repository, "--tokens", tmp_path / "tokens")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert message in done.stderr


def test_no_token_is_let_in_by_an_empty_one():
    keys = Keys(lambda: Access(ASK, STEER))
    assert keys.name_of(ASK) == "token"
    assert [keys.name_of(token) for token in (None, "", STEER, ASK[:-1], ASK + " ", "\0")] == [None] * 6
    assert keys.may_change(STEER)
    assert not any(keys.may_change(token) for token in (None, "", ASK))
    assert Keys(Access).open
    assert not Keys(Access).may_change("")


@pytest.fixture
def tls(tmp_path):
    for name in ("server", "client"):
        certificate(tmp_path, "authority") if name == "server" else None
        certificate(tmp_path, name, "authority")
    return tmp_path


def test_tls_on_both_protocols_with_client_certificates_changed_while_it_serves(server, photos, tls, tmp_path):
    files = [tls / name for name in ("server.pem", "server.key", "authority.pem")]
    mine = {"tls_ca": files[2], "tls_cert": tls / "client.pem", "tls_key": tls / "client.key"}
    door = Door(options(upstreams=[server.grpc_url], access=lambda: Access(ASK, None, *files)))
    with opened(door) as at:
        secure = (f"grpcs://{at.grpc}", f"https://{at.http}")
        for url in secure:
            with Client(url, token=ASK, **mine) as client:
                assert client.ask(photos[:1])[0].label
            with Client(url, token=ASK, tls_ca=files[2], timeout=2) as client, pytest.raises(ServerUnavailable):
                client.ask(photos[:1])
            with Client(url, timeout=10, **mine) as client, pytest.raises(AccessDenied):
                client.ask(photos[:1])
        for url in (at.grpc, f"http://{at.http}"):
            with Client(url, token=ASK, timeout=2) as client, pytest.raises(ServerUnavailable):
                client.ask(photos[:1])
        # Another authority, and new certificates by it: the old client is shut out, a new one let in.
        (tmp_path / "new").mkdir()
        certificate(tmp_path / "new", "authority")
        certificate(tmp_path / "new", "server", "authority")
        certificate(tmp_path / "new", "client", "authority")
        for path in files:
            os.replace(tmp_path / "new" / path.name, path)
        wait(lambda: b'vilu_door_reloads_total{result="ok"}' in metrics(at))
        door.reload()
        new = {"tls_ca": files[2], "tls_cert": tmp_path / "new/client.pem", "tls_key": tmp_path / "new/client.key"}
        for url in secure:
            with Client(url, token=ASK, **new) as client:
                assert client.ask(photos[:1])[0].label
            with Client(url, token=ASK, timeout=2, **mine) as client, pytest.raises(ServerUnavailable):
                client.ask(photos[:1])


def test_a_locked_server_behind_is_given_the_clients_own_token(repository, photos, tmp_path):
    with (
        Server(repository, access=Access(ASK), log=tmp_path / "log") as locked,
        opened(Door(options(upstreams=[locked.grpc_url]))) as at,
    ):
        for url in (at.grpc, f"http://{at.http}"):
            with Client(url, token=ASK) as client:
                assert client.ask(photos[:1])[0].label
            with Client(url, timeout=10) as client, pytest.raises(AccessDenied):
                client.ask(photos[:1])


def test_the_control_token_alone_changes_class_sets_and_models(repository, photos, tmp_path, checkpoint):
    names = list(checkpoint.class_set.names)
    front = Door(options(access=lambda: Access(ASK, STEER)), own_server(repository, log=tmp_path / "log"))
    with opened(front) as at:
        for url in (at.grpc, f"http://{at.http}"):
            with Client(url, token=ASK, timeout=60) as client:
                with pytest.raises(AccessDenied, match="control token"):
                    client.run(put_set, "some", names[:3])
                with pytest.raises(AccessDenied, match="control token"):
                    client.run(put_set, "some", names[:3], control_token=ASK)
                put = client.run(put_set, "some", names[:3], control_token=STEER)
                assert put.names == tuple(names[:3])
                assert client.ask(photos[:1], class_set="some")[0].label in names[:3]
                with pytest.raises(RequestRefused):
                    client.run(put_set, "UPPER", names[:3], control_token=STEER)
                client.run(remove_set, "some", control_token=STEER)
                assert [one.name for one in client.run(list_sets)] == ["default"]
        api = triton_http.InferenceServerClient(at.http)
        api.unload_model("vilu_full", headers={"vilu-control": STEER})
        assert not api.is_model_ready("vilu_full")
        api.load_model("vilu_full", headers={"vilu-control": STEER})
        assert api.is_model_ready("vilu_full")
        assert {row["name"] for row in api.get_model_repository_index({"vilu-control": STEER})} >= {"vilu"}
        api.close()
        # What was put is kept in the repository, not in the links that the server reads.
        with Client(at.grpc, token=ASK, timeout=60) as client:
            client.run(put_set, "kept", names[:2], control_token=STEER)
            assert client.run(get_set, "kept").names == tuple(names[:2])
            assert list((repository / "class_sets" / "sets").iterdir())
            client.run(remove_set, "kept", control_token=STEER)


def test_no_secret_stands_in_a_command_line_and_sighup_reads_them_again(repository, photos, eager, tmp_path):
    (tmp_path / "token").write_text(ASK)
    (tmp_path / "control").write_text(STEER)
    chosen = ports()
    flags = [f"--{kind}-port={port}" for kind, port in chosen.items()]
    flags += ["--token", f"@{tmp_path / 'token'}", "--control-token", f"@{tmp_path / 'control'}"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [BIN / "vilu", "serve", "--model-repository", repository, *flags], stdout=log, stderr=log
        )
    try:
        wait(lambda: "serving" in (tmp_path / "log").read_text(), 120)
        with Client(f"127.0.0.1:{chosen['grpc']}", token=ASK) as client:
            agree(client.ask(photos[:2]), photos[:2], eager)
        for pid in descendants(process.pid):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes()
                assert ASK.encode() not in words
                assert STEER.encode() not in words
        (tmp_path / "token").write_text("another-token-0123456789")
        process.send_signal(signal.SIGHUP)
        with Client(f"127.0.0.1:{chosen['grpc']}", token="another-token-0123456789") as client:
            wait(lambda: answered(client, photos))
        with Client(f"127.0.0.1:{chosen['grpc']}", token=ASK) as client, pytest.raises(AccessDenied):
            client.ask(photos[:1])
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def answered(client, photos):
    try:
        return client.ask(photos[:1])[0].label
    except AccessDenied:
        return False
