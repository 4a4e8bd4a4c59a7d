"""Bodies that are arriving at the door: what one address and all of them may cost, who left, and the end."""

import asyncio
import contextlib
import http.client
import socket
import threading
import time

import grpc
import pytest

from tests.serving.helpers import NOWHERE, metrics, opened, options, question, wait
from vilu.serving.door import Door, Limits

pytestmark = pytest.mark.server


@contextlib.contextmanager
def slow(at, sizes, source="127.0.0.1", sent=b"x"):
    """Senders of /ask whose bodies, of these sizes, do not end."""
    host, _, port = at.http.rpartition(":")
    with contextlib.ExitStack() as stack:
        for size in sizes:
            one = stack.enter_context(socket.create_connection((host, int(port)), source_address=(source, 0)))
            one.sendall(f"POST /ask HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode() + sent)
        yield


def asked(at, source, body=b"x"):
    """(status, body) of a question that no server needs to see."""
    host, _, port = at.http.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30, source_address=(source, 0))
    with contextlib.closing(connection):
        connection.request("POST", "/ask?details=perhaps", body)
        reply = connection.getresponse()
        return reply.status, reply.read()


def test_slow_senders_of_one_address_leave_places_to_others():
    door = Door(options(upstreams=NOWHERE, limits=Limits(in_flight=8, body_seconds=20)))
    with opened(door) as at, slow(at, [9] * 12):
        wait(lambda: door.core.coming["127.0.0.1"] == 8)
        assert door.core.reading == 2
        assert asked(at, "127.0.0.2")[0] == 400
        assert asked(at, "127.0.0.1")[0] == 503


def test_a_place_that_is_free_again_is_given_to_who_waits():
    door = Door(options(upstreams=NOWHERE, limits=Limits(in_flight=4, body_seconds=20)))
    with opened(door) as at:
        with slow(at, [9]):
            wait(lambda: door.core.reading == 1)
            found = []
            thread = threading.Thread(target=lambda: found.append(asked(at, "127.0.0.1")[0]))
            thread.start()
            wait(lambda: door.core.coming["127.0.0.1"] == 2)
        thread.join(30)
        assert found == [400]
        wait(lambda: not (door.core.coming or door.core.places or door.core.coming_bytes))


def test_bodies_that_are_arriving_are_held_bytes():
    door = Door(options(upstreams=NOWHERE, limits=Limits(held_bytes=4000, body_seconds=20)))
    with opened(door) as at:
        with contextlib.ExitStack() as stack:
            for i in range(1, 5):
                stack.enter_context(slow(at, [900], f"127.0.0.{i}"))
            wait(lambda: door.core.held == 3600)
            status, said = asked(at, "127.0.0.1", bytes(200))
            assert (status, b"of this address" in said) == (503, True)
            status, said = asked(at, "127.0.0.5", bytes(900))
            assert (status, b"too large together" in said) == (503, True)
        wait(lambda: door.core.held == 0)
        assert asked(at, "127.0.0.5", bytes(900))[0] == 400
        host, _, port = at.http.rpartition(":")
        with socket.create_connection((host, int(port))) as one:
            head = b"POST /ask HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            one.sendall(head + b"64\r\n" + bytes(100) + b"\r\n")
            wait(lambda: door.core.held == 100)
        wait(lambda: door.core.held == 0)


def test_calls_that_are_cancelled_are_counted_as_that():
    with opened(Door(options(upstreams=NOWHERE))) as at, grpc.insecure_channel(at.grpc) as channel:
        method = "/inference.GRPCInferenceService/ModelInfer"
        for i in range(60):
            if i % 2:
                stop = threading.Event()
                call = channel.stream_unary(method).future(b"" for _ in iter(stop.wait, True))
            else:
                call = channel.unary_unary(method).future(question(bytes(1 << 20)).SerializeToString())
            time.sleep(0.001 * (i % 7))
            call.cancel()
            if i % 2:
                stop.set()
        wait(lambda: b'outcome="CANCELLED",protocol="grpc"' in metrics(at))
        time.sleep(0.5)
        assert b"malformed" not in metrics(at)
        assert b"INVALID_ARGUMENT" not in metrics(at)
        # A call that ends without a message is malformed.
        with pytest.raises(grpc.RpcError) as caught:
            channel.stream_unary(method)(iter(()), timeout=20)
        assert caught.value.code().name == "INVALID_ARGUMENT"


def test_the_end_takes_no_new_question_while_slow_bodies_are_waited_for(caplog, capfd):
    async def run():
        door = Door(options(upstreams=NOWHERE, limits=Limits(body_seconds=60)))
        async with contextlib.AsyncExitStack() as stack:
            context = door.serving()
            at = await context.__aenter__()
            stack.enter_context(slow(at, [9] * 3))
            while door.core.reading < 3:
                await asyncio.sleep(0.02)
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(at.grpc))
            ask = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            assert await code(ask(b"none", timeout=10)) == "INVALID_ARGUMENT"
            ending = asyncio.create_task(context.__aexit__(None, None, None))
            await asyncio.sleep(0.1)
            codes = {await code(ask(b"none", timeout=10)) for _ in range(3)}
            assert not ending.done()
            await ending
            return codes

    assert asyncio.run(run()) == {"UNAVAILABLE"}
    assert "Traceback" not in caplog.text + capfd.readouterr().err


async def code(call):
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code().name
