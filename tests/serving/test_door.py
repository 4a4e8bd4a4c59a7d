"""The door's gRPC before the real server: what it lets through is answered as ever, what it refuses reaches nobody."""

import asyncio
import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import grpc
import pytest
from google.protobuf import text_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as stubs

from bench.loadtest import hostile, traffic
from bench.loadtest.hostile_requests import Generator
from tests.serving.helpers import code_of, opened, options, ports, question, strings, vilu
from vilu.errors import UserError
from vilu.serving import Client, ServerUnavailable
from vilu.serving.door import Door, Limits
from vilu.serving.door.check import MODELS, check, named, parsed_question, tensors
from vilu.serving.door.refused import Refused

pytestmark = pytest.mark.server


def test_the_client_is_answered_as_by_the_server(server, front, photos):
    with Client(server.grpc_url) as direct, Client(front.grpc) as through:
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


@pytest.mark.parametrize("stage", [2, 9, 10, 12])
def test_every_later_stage_embeds_the_names_of_a_class_set(stage):
    assert named(pb.ModelInferRequest(model_name=f"stage{stage}_vilu_text")) == f"stage{stage}_vilu_text"
    for other in (f"stage{stage}_vilu_head", f"stage{stage}_vilu_text2", "stage1_vilu_text", "stage_vilu_text"):
        with pytest.raises(Refused, match="there is no model"):
            named(pb.ModelInferRequest(model_name=other))


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("SystemSharedMemoryRegister", pb.SystemSharedMemoryRegisterRequest(name="a", key="/a", byte_size=1)),
        ("SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest()),
        ("TraceSetting", pb.TraceSettingRequest()),
        ("LogSettings", pb.LogSettingsRequest()),
        ("ModelStatistics", pb.ModelStatisticsRequest()),
    ],
)
def test_nothing_else_is_offered(call, method, request_):
    assert code_of(getattr(call, method), request_)[0] == "UNIMPLEMENTED"


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("RepositoryIndex", pb.RepositoryIndexRequest()),
        ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="vilu")),
        ("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="vilu")),
    ],
)
def test_changes_are_closed_without_a_control_token(call, method, request_):
    assert code_of(getattr(call, method), request_)[0] == "UNAUTHENTICATED"


def test_streams_and_compression_are_not_offered(call, front, photos):
    with pytest.raises(grpc.RpcError) as caught:
        next(call.ModelStreamInfer(iter([question(photos[0])])))
    assert caught.value.code().name == "UNIMPLEMENTED"
    with grpc.insecure_channel(front.grpc, compression=grpc.Compression.Gzip) as channel:
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


def test_hostile_requests_are_refused_and_hurt_nobody(front, front_server, asking, generator):
    """Those of every sort over gRPC, those that spoil a batch and the one that would end the server: each gets an error
    of the 4xx class, and not one of the good requests in between is refused."""
    world = asking.world
    dim = world.embedding.shape[1]
    attacks = list(generator.attacks(400, seed=7))
    attacks += [*hostile.poison(world.images[0], dim), hostile.deadly(world.images[0])] * 5
    kinds = dict.fromkeys(("vilu", "vilu_open", "embeddings", "embeddings+LABELS", "vilu_text"), 1)

    async def both():
        async with traffic.asker(front.grpc, front.http) as by:
            steady = traffic.Steady(by, asking.mixed(100, mix=kinds, http=0), 2)
            tally = await hostile.attack(front.grpc, front.http, iter(attacks), concurrency=8)
            return tally, await steady.stop()

    tally, good = asyncio.run(both())
    assert tally.sent == 420
    assert not tally.bad, [(*key, tally.messages[key]) for key in tally.bad]
    assert not tally.known
    assert (good.wrongs, good.lost, dict(good.refused)) == (0, 0, {}), good.wrong
    assert good.right > 20
    assert front_server.process.poll() is None
    assert front_server.dead_stubs() == []


def checked(request, model):
    check(*parsed_question(request.SerializeToString()), model)


@pytest.fixture(scope="module")
def models(repository):
    return {
        name: tensors(
            text_format.Parse((repository / name / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
        )
        for name in MODELS
        if (repository / name).is_dir()
    }


def test_what_is_wrong_is_told_in_one_line(models):
    def told(change):
        request = question(b"an image")
        change(request)
        with pytest.raises(Refused) as caught:
            checked(request, models["vilu"])
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

    checked(question(b"an image"), models["vilu"])
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
    assert told(lambda r: r.outputs.add(name="STAGE")).startswith("there is no output 'STAGE': the model is no cascade")
    scored = question(b"an image")
    scored.outputs.add(name="OUTLIER_SCORE")
    with pytest.raises(Refused, match="'OUTLIER_SCORE': the exported checkpoint has no outlier score"):
        checked(scored, models["vilu"] | {"outputs": {"LABEL"}})
    assert told(lambda r: [r.outputs.add(name="LABEL") for _ in range(2)]) == "an output is asked for twice"
    assert "only class_set" in told(lambda r: r.parameters["sequence_id"].SetInParent())
    assert "BYTES is wanted" in told(lambda r: setattr(r.inputs[0], "datatype", "FP32"))
    request = pb.ModelInferRequest(model_name="vilu_full")
    request.parameters["class_set"].string_param = "default"
    with pytest.raises(Refused, match="exported classes alone"):
        checked(request, models["vilu_full"])
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
        checked(request, models["vilu"])
    else:
        with pytest.raises(Refused):
            checked(request, models["vilu"])


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
            checked(request, model)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=80), cut=st.integers(0, 60), flip=st.integers(0, 400))
def test_a_message_is_read_as_protobuf_reads_it(data, cut, flip):
    """The views of its tensors are protobuf's own fields, and what protobuf refuses is refused."""
    request = question(data)
    request.id = "an id"
    request.raw_input_contents.append(data[:9])
    whole = request.SerializeToString()
    rest, raw = parsed_question(whole)
    assert [bytes(view) for view in raw] == list(request.raw_input_contents)
    request.ClearField("raw_input_contents")
    assert rest == request
    damaged = bytearray(whole[: max(0, len(whole) - cut)])
    if damaged:
        damaged[flip % len(damaged)] ^= 1 << flip % 8
    try:
        expected = pb.ModelInferRequest.FromString(bytes(damaged))
    except DecodeError:
        with pytest.raises(Refused):
            parsed_question(bytes(damaged))
        return
    try:
        rest, raw = parsed_question(bytes(damaged))
    except Refused:
        return  # stricter: groups, which nobody sends
    assert [bytes(view) for view in raw] == list(expected.raw_input_contents)
    expected.ClearField("raw_input_contents")
    assert rest.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


def test_health_and_reflection(front):
    with grpc.insecure_channel(front.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "vilu", "inference.GRPCInferenceService"):
            assert health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status == 1
            assert next(health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=10)).status == 1
        assert code_of(health.Check, health_pb2.HealthCheckRequest(service="other"))[0] == "NOT_FOUND"
        found = ProtoReflectionDescriptorDatabase(channel)
        assert "inference.GRPCInferenceService" in found.get_services()
        service = DescriptorPool(found).FindServiceByName("inference.GRPCInferenceService")
        assert "ModelInfer" in service.methods_by_name


@contextlib.contextmanager
def silent():
    """HOST:PORT of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def test_what_is_too_large_too_slow_or_too_much_is_refused(server, photos):
    limits = Limits(in_flight=4, sent=1, body_bytes=1 << 20, body_seconds=1, per_connection=3, timeout=20)
    with opened(Door(options(upstreams=[server.grpc_url], limits=limits))) as ports:
        with grpc.insecure_channel(ports.grpc) as channel:
            ask = stubs.GRPCInferenceServiceStub(channel).ModelInfer
            assert ask(question(photos[0]), timeout=20).outputs
            assert code_of(ask, question(bytes(2 << 20)))[0] == "RESOURCE_EXHAUSTED"
            # Two minutes of headers and no message.
            never = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")
            stop = threading.Event()
            with pytest.raises(grpc.RpcError) as caught:
                never((b"" for _ in iter(stop.wait, True)), timeout=120)
            stop.set()
            assert caught.value.details() == "the request did not arrive in 1 s"
            many = [ask.future(question(photos[i % 4]), timeout=60) for i in range(40)]
            assert all(one.result().outputs for one in many)  # one connection has three at a time, and waits
        channels = [
            grpc.insecure_channel(ports.grpc, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(40)
        ]
        many = [stubs.GRPCInferenceServiceStub(one).ModelInfer.future(question(photos[0])) for one in channels]
        ended = [one.exception() for one in many]
        refused = [error for error in ended if error is not None]
        assert 0 < len(refused) < 40
        assert {error.code().name for error in refused} == {"UNAVAILABLE"}
        assert {key for error in refused for key, _ in error.trailing_metadata()} >= {"retry-after"}
        for one in channels:
            one.close()
        with Client(ports.grpc) as client:
            assert client.ask(photos[:1])[0].label


def test_a_new_connection_may_ask_as_much_as_the_door_takes(front, photos):
    """HTTP/2 lets a client begin before it knows how many requests it may have at a time."""
    with grpc.insecure_channel(front.grpc, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        ask = stubs.GRPCInferenceServiceStub(channel).ModelInfer
        many = [ask.future(question(photos[i % 4]), timeout=60) for i in range(Limits().in_flight - 20)]
        assert {one.code().name for one in many} == {"OK"}


def test_connections_of_one_address_are_limited(server, photos):
    limits = Limits(connections_per_address=5)
    with opened(Door(options(upstreams=[server.grpc_url], limits=limits))) as ports:
        host, _, port = ports.grpc.rpartition(":")
        held = [socket.create_connection((host, int(port))) for _ in range(12)]
        for one in held:
            one.settimeout(0.2)
        deadline = time.monotonic() + 60
        while sum(map(closed, held)) < 7:
            assert time.monotonic() < deadline
        held.extend(socket.create_connection(tuple(ports.http.split(":"))) for _ in range(12))
        while sum(map(closed, held[12:])) < 7:
            assert time.monotonic() < deadline
        assert sum(not closed(one) for one in held) == 10
        for one in held:
            one.close()
        with Client(ports.grpc, timeout=30) as client:
            assert client.ask(photos[:1])[0].label


def closed(connection):
    """Whether the other side has ended a connection; what it said before is read."""
    connection.settimeout(0.05)
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def test_a_server_that_is_not_there_is_unavailable(photos):
    with silent() as url, opened(Door(options(upstreams=[url], limits=Limits(timeout=2)))) as ports:
        with grpc.insecure_channel(ports.grpc) as channel:
            ask = stubs.GRPCInferenceServiceStub(channel).ModelInfer
            assert code_of(ask, question(photos[0])) == ("UNAVAILABLE", "no server answers")
            health = health_pb2_grpc.HealthStub(channel)
            assert health.Check(health_pb2.HealthCheckRequest(), timeout=10).status == 2
        with Client(ports.grpc, timeout=3) as client, pytest.raises(ServerUnavailable):
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


ATTACH = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""


@contextlib.contextmanager
def serving_in_a_terminal(server, *before):
    """Serve in a session of its own, whose terminal is a pseudo-terminal: (process, the terminal's other end)."""
    ours, theirs = os.openpty()
    serve = [sys.executable, "-m", "vilu", "serve", "--upstream", server.grpc_url]
    free = [flag for kind, port in ports().items() for flag in (f"--{kind}-port", str(port))]
    process = subprocess.Popen(
        [sys.executable, "-c", ATTACH, *before, *serve, *free],
        stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    try:
        assert process.stderr.readline().startswith("serving ")
        yield process, ours
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_it_ends_with_its_terminal(server):
    with serving_in_a_terminal(server) as (process, terminal):
        process.send_signal(signal.SIGHUP)  # the terminal is there: only the tokens are read anew
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        os.close(terminal)
        assert process.wait(20) == 0


@pytest.mark.slow
def test_nohup_outlives_its_terminal(server):
    """As nohup starts it: SIGHUP is ignored."""
    with serving_in_a_terminal(server, "sh", "-c", "trap '' HUP; exec \"$@\"", "nohup") as (process, terminal):
        os.close(terminal)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


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


@pytest.mark.parametrize("way", [[], ["--direct"]], ids=["door", "direct"])
@pytest.mark.parametrize(
    ("given", "meant"),
    [("--acess-log", "--access-log"), ("--tokns", "--tokens"), ("--log-verbsoe", "--log-verbose")],
)
def test_a_misspelt_option_of_ours_is_named_first(repository, way, given, meant):
    done = vilu("serve", *way, "--model-repository", repository, given, "-")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert f"has an option {given}; did you mean {meant}?" in done.stderr


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_a_limit_is_a_number_above_0(value):
    with pytest.raises(UserError, match="must be a number above 0"):
        Limits(body_seconds=value)
