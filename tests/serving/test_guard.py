"""`vilu guard` before the real server: what it lets through is answered as ever, what it refuses reaches nobody."""

import asyncio
import contextlib
import signal
import socket
import struct
import subprocess
import sys
import threading
from typing import Any

import grpc
import pytest
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as stubs

from bench.loadtest import hostile, traffic
from bench.loadtest.hostile_requests import Generator
from tests.serving.helpers import ASK, certificate
from vilu.serving import AccessDenied, Client, Server, ServerUnavailable
from vilu.serving.access import Access
from vilu.serving.guard import MODELS, Guard, Refused, check, tensors

pytestmark = pytest.mark.server


@contextlib.contextmanager
def guarding(url, host="127.0.0.1", **options):
    """HOST:PORT of a guard in a thread of its own."""
    ready = threading.Event()
    stop: dict[str, Any] = {}
    found: dict[str, int] = {}

    async def run():
        stop["event"], stop["loop"] = asyncio.Event(), asyncio.get_running_loop()
        try:
            async with Guard(url, **options).serving(host, 0) as port:
                found["port"] = port
                ready.set()
                await stop["event"].wait()
        finally:
            ready.set()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    ready.wait(10)
    try:
        yield f"{host}:{found['port']}"
    finally:
        stop["loop"].call_soon_threadsafe(stop["event"].set)
        thread.join(20)


@pytest.fixture(scope="module")
def guarded(server):
    with guarding(server.grpc_url) as url:
        yield url


@pytest.fixture(scope="module")
def call(guarded):
    with grpc.insecure_channel(guarded) as channel:
        yield stubs.GRPCInferenceServiceStub(channel)


def code_of(ask, request):
    with pytest.raises(grpc.RpcError) as caught:
        ask(request, timeout=20)
    return caught.value.code().name, caught.value.details()


def strings(*words):
    return b"".join(struct.pack("<I", len(word)) + word for word in words)


def question(image, model="vilu", **more):
    request = pb.ModelInferRequest(model_name=model, **more)
    request.inputs.add(name="IMAGE", datatype="BYTES", shape=[1, 1])
    request.raw_input_contents.append(strings(image))
    return request


def test_the_client_is_answered_as_by_the_server(server, guarded, photos):
    with Client(server.grpc_url) as direct, Client(guarded) as through:
        for asked in ({}, {"labels": ["a red circle", "zero"]}, {"class_set": "default"}):
            assert through.ask(photos, **asked) == direct.ask(photos, **asked)
        # Large ones would go through shared memory, which is not offered: the client sends them instead.
        large = [photo + bytes(1 << 20) for photo in photos[:2]]
        assert [a.label for a in through.ask(large)] == [a.label for a in direct.ask(large)]


def test_every_model_for_people_answers_and_no_other(call, repository, asking):
    kinds = {"vilu": 1, "vilu_open": 1, "embeddings": 1, "embeddings+LABELS": 1, "embeddings+TEXT": 1, "vilu_full": 1,
             "vilu_text": 1}  # fmt: skip
    for asked in asking.mixed(40, seed=5, mix=kinds, http=0):
        request = pb.ModelInferRequest.FromString(asked.body)
        reply = call.ModelInfer(request, timeout=20)
        assert {output.name for output in reply.outputs} == {output.name for output in request.outputs}
    for name in {path.parent.name for path in repository.glob("*/config.pbtxt")} - set(MODELS):
        told = "NOT_FOUND", f"there is no model {name!r} here"
        assert code_of(call.ModelInfer, pb.ModelInferRequest(model_name=name)) == told
        assert code_of(call.ModelConfig, pb.ModelConfigRequest(name=name)) == told
    assert call.ServerReady(pb.ServerReadyRequest()).ready
    assert call.ModelReady(pb.ModelReadyRequest(name="vilu")).ready
    assert {one.name for one in call.ModelMetadata(pb.ModelMetadataRequest(name="vilu")).inputs} == {"IMAGE"}


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("RepositoryIndex", pb.RepositoryIndexRequest()),
        ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="vilu")),
        ("SystemSharedMemoryRegister", pb.SystemSharedMemoryRegisterRequest(name="a", key="/a", byte_size=1)),
        ("SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest()),
        ("TraceSetting", pb.TraceSettingRequest()),
        ("LogSettings", pb.LogSettingsRequest()),
        ("ModelStatistics", pb.ModelStatisticsRequest()),
    ],
)
def test_nothing_else_is_offered(call, method, request_):
    assert code_of(getattr(call, method), request_)[0] == "UNIMPLEMENTED"


def test_streams_and_compression_are_not_offered(call, guarded, photos):
    with pytest.raises(grpc.RpcError) as caught:
        next(call.ModelStreamInfer(iter([question(photos[0])])))
    assert caught.value.code().name == "UNIMPLEMENTED"
    with grpc.insecure_channel(guarded, compression=grpc.Compression.Gzip) as channel:
        ask = stubs.GRPCInferenceServiceStub(channel).ModelInfer
        assert code_of(ask, question(photos[0] + bytes(1 << 20)))[0] == "UNIMPLEMENTED"


def test_typed_contents_are_taken(call, checkpoint):
    dim = checkpoint.head.dim
    request = pb.ModelInferRequest(model_name="vilu_embeddings")
    for name, kind, shape in (("IMAGE_EMBEDDING", "FP32", [1, dim]), ("LABELS", "BYTES", [1, 2])):
        request.inputs.add(name=name, datatype=kind, shape=shape)
    request.inputs[0].contents.fp32_contents.extend([0.1] * dim)
    request.inputs[1].contents.bytes_contents.extend([b"a", b"b"])
    assert call.ModelInfer(request).outputs
    request.inputs[1].contents.bytes_contents.append(b"c")
    told = "input LABELS: its contents are not 2 values of BYTES"
    assert code_of(call.ModelInfer, request) == ("INVALID_ARGUMENT", told)


@pytest.fixture(scope="module")
def generator(asking, clip):
    return Generator(asking.world.images, clip.transform, asking.world.embedding.shape[1], 8, guarded=True)


def test_hostile_requests_are_refused_and_hurt_nobody(server, guarded, asking, generator):
    """Those of every sort over gRPC, those that spoil a batch and the one that would end the server: each gets an error
    of the 4xx class, and not one of the good requests in between is refused."""
    world = asking.world
    dim = world.embedding.shape[1]
    attacks = list(generator.attacks(400, seed=7))
    attacks += [*hostile.poison(world.images[0], dim), hostile.deadly(world.images[0])] * 5
    kinds = dict.fromkeys(("vilu", "vilu_open", "embeddings", "embeddings+LABELS", "vilu_text"), 1)

    async def both():
        async with traffic.asker(guarded, server.http_url) as by:
            steady = traffic.Steady(by, asking.mixed(100, mix=kinds, http=0), 2)
            tally = await hostile.attack(guarded, server.http_url, iter(attacks), concurrency=8)
            return tally, await steady.stop()

    tally, good = asyncio.run(both())
    assert tally.sent == 420
    assert not tally.bad, [(*key, tally.messages[key]) for key in tally.bad]
    assert not tally.known
    assert (good.wrongs, good.lost, dict(good.refused)) == (0, 0, {}), good.wrong
    assert good.right > 20
    assert server.process.poll() is None
    assert server.dead_stubs() == []


@pytest.fixture(scope="module")
def models(repository):
    return {
        name: tensors(
            text_format.Parse((repository / name / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
        )
        for name in MODELS
    }


def test_what_is_wrong_is_told_in_one_line(models):
    def told(change):
        request = question(b"an image")
        change(request)
        with pytest.raises(Refused) as caught:
            check(request, models["vilu"])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def output(request):
        request.outputs.add(name="LABEL").parameters["classification"].int64_param = 1

    def shared(request):
        request.inputs[0].parameters["shared_memory_region"].string_param = "x"

    def contents(data):
        def change(request):
            request.raw_input_contents[0] = data

        return change

    def shape(*dims):
        def change(request):
            request.inputs[0].shape[:] = dims

        return change

    check(question(b"an image"), models["vilu"])
    assert "classes" in told(output)
    assert "shared memory" in told(shared)
    assert told(shape(0, 1)) == "input IMAGE: 1 to 8 rows are taken, not 0"
    assert told(shape(1 << 40, 1)) == f"input IMAGE: 1 to 8 rows are taken, not {1 << 40}"
    assert told(shape(-1, 1)) == "input IMAGE: 1 to 8 rows are taken, not -1"
    assert "is not [-1, 1]" in told(shape())
    assert "is not [-1, 1]" in told(shape(1, 1, 1))
    assert "is not [-1, 1]" in told(shape(1, 0))
    assert told(contents(strings(b"ab")[:-1])) == "input IMAGE: its bytes are not 1 whole strings"
    assert told(contents(b"")) == "input IMAGE: its bytes are not 1 whole strings"
    assert told(contents(strings(b"a", b"b"))) == "input IMAGE: its bytes are not 1 whole strings"
    assert told(lambda r: r.inputs.add(name="IMAGE")) == "an input is there twice"
    assert told(lambda r: r.inputs.add(name="MORE")) == "2 inputs, but the contents of 1"
    assert told(lambda r: r.ClearField("inputs")) == "input IMAGE is missing"
    assert told(lambda r: r.outputs.add(name="NOBODY")) == "there is no output 'NOBODY'"
    assert told(lambda r: [r.outputs.add(name="LABEL") for _ in range(2)]) == "an output is asked for twice"
    assert "only class_set" in told(lambda r: r.parameters["sequence_id"].SetInParent())
    assert "BYTES is wanted" in told(lambda r: setattr(r.inputs[0], "datatype", "FP32"))
    request = pb.ModelInferRequest(model_name="vilu_full")
    request.parameters["class_set"].string_param = "default"
    with pytest.raises(Refused, match="exported classes alone"):
        check(request, models["vilu_full"])
    assert "NUL" in told(lambda r: setattr(r, "id", "a\0"))


@settings(max_examples=300, deadline=None)
@given(data=st.one_of(st.binary(max_size=60), st.lists(st.binary(max_size=9), max_size=4).map(lambda w: strings(*w))),
       images=st.integers(-2, 5))  # fmt: skip
def test_strings_pass_where_they_are_whole_and_only_there(models, data, images):
    request = question(b"")
    request.inputs[0].shape[:] = [images, 1]
    request.raw_input_contents[0] = data
    found, rest = 0, data
    while len(rest) >= 4 and len(rest) - 4 >= (length := struct.unpack("<I", rest[:4])[0]):
        found, rest = found + 1, rest[4 + length :]
    if not rest and found == images and images > 0:
        check(request, models["vilu"])
    else:
        with pytest.raises(Refused):
            check(request, models["vilu"])


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_attack_makes_it_raise_anything_else(models, generator, seed):
    (attack,) = generator.attacks(1, seed=seed)
    try:
        request = pb.ModelInferRequest.FromString(attack.wire)
    except Exception:
        return
    for model in models.values():
        with contextlib.suppress(Refused):
            check(request, model)


def test_too_many_and_too_large_are_told_so_at_once(photos):
    """Before a server that takes questions and never answers."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        limits = {"in_flight": 2, "timeout": 2, "max_request_bytes": 1 << 20}
        with guarding(url, **limits) as guarded, grpc.insecure_channel(guarded) as channel:
            ask = stubs.GRPCInferenceServiceStub(channel).ModelInfer
            waiting = [ask.future(question(photos[0])) for _ in range(2)]
            threading.Event().wait(0.5)
            assert code_of(ask, question(photos[0])) == ("UNAVAILABLE", "2 requests are under way")
            assert {one.exception().code().name for one in waiting} == {"DEADLINE_EXCEEDED"}
            assert code_of(ask, question(bytes(2 << 20)))[0] == "RESOURCE_EXHAUSTED"


def test_a_server_that_is_not_there_is_unavailable(photos):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound and not listening
        with guarding(f"127.0.0.1:{free.getsockname()[1]}") as guarded, grpc.insecure_channel(guarded) as channel:
            assert code_of(stubs.GRPCInferenceServiceStub(channel).ModelInfer, question(photos[0]))[0] == "UNAVAILABLE"


def test_tokens_are_handed_on_and_tls_is_the_guards(repository, tmp_path, photos):
    certificate(tmp_path, "authority")
    certificate(tmp_path, "server", "authority")
    certificate(tmp_path, "client", "authority")
    tls = Access(tls_cert=tmp_path / "server.pem", tls_key=tmp_path / "server.key", tls_ca=tmp_path / "authority.pem")
    mine = {
        "tls_ca": tmp_path / "authority.pem",
        "tls_cert": tmp_path / "client.pem",
        "tls_key": tmp_path / "client.key",
    }
    locked = Server(repository, access=Access(ASK), log=tmp_path / "log")
    with locked as server, guarding(server.grpc_url, access=tls) as guarded:
        with Client(f"grpcs://{guarded}", token=ASK, **mine) as client:
            assert client.ask(photos[:1])[0].label
        with Client(f"grpcs://{guarded}", **mine) as client, pytest.raises(AccessDenied):
            client.ask(photos[:1])
        with Client(guarded, token=ASK, timeout=2) as client, pytest.raises(ServerUnavailable):
            client.ask(photos[:1])


def test_the_command(server, photos):
    command = [sys.executable, "-m", "vilu", "guard", "--url", server.grpc_url, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stderr.readline()
            assert line.startswith(f"guarding {server.grpc_url}: gRPC 127.0.0.1:")
            with Client(line.rsplit(" ", 1)[1].strip()) as client:
                assert client.ask(photos[:1])[0].label
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stderr.read() == ""


def test_what_cannot_be_is_told(server):
    for flags, told in (
        (["--url", "http://127.0.0.1:8000"], "expected HOST:PORT"),
        (["--url", server.grpc_url, "--port", str(server.grpc_port)], f"cannot listen on 127.0.0.1:{server.grpc_port}"),
        (["--tls-cert", "absent.pem"], "TLS needs both a certificate and its key"),
    ):
        command = [sys.executable, "-m", "vilu", "guard", *flags]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 2
        assert told in ended.stderr
        assert ended.stderr.count("\n") == 1
