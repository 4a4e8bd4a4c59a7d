"""Hostile requests of bench/hostile.py against the real server: an error of the 4xx class, and nobody else hurt."""

import asyncio

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.loadtest import hostile, traffic
from bench.loadtest.hostile_requests import Generator
from bench.loadtest.wire import over_tcp
from vilu.preprocess.image import ImageError, decode
from vilu.serving import Client, Server

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def generator(asking, clip):
    return Generator(asking.world.images, clip.transform, asking.world.embedding.shape[1], 8)


def test_all_sorts_are_refused_and_good_requests_in_between_are_right(server, asking, generator):

    async def both():
        async with traffic.asker(server.grpc_url, server.http_url) as by:
            steady = traffic.Steady(by, asking.mixed(100), 2)
            tally = await hostile.attack(server.grpc_url, server.http_url, generator.attacks(400, seed=1))
            return tally, await steady.stop()

    tally, good = asyncio.run(both())
    assert tally.sent == 400
    assert not tally.bad, [(*key, tally.messages[key]) for key in tally.bad]
    assert (good.wrongs, good.lost, dict(good.refused)) == (0, 0, {}), good.wrong
    assert good.right > 20
    assert len({name.split(",")[0] for name, _ in tally.codes}) > 15  # sorts, by their first words
    assert server.process.poll() is None
    assert server.dead_stubs() == []


def test_a_refused_request_stays_in_flight_nowhere(repository, tmp_path, generator):
    """Every output asked for, the labels wrong or the image: of steps at the same time, a failing one leaves the
    request in flight for ever."""
    draw = np.random.default_rng(0)
    attacks = [generator.labels(draw) for _ in range(60)] + [generator.damaged(draw) for _ in range(60)]
    log = tmp_path / "log"
    with Server(repository, log=log) as server:
        tally = asyncio.run(hostile.attack(server.grpc_url, server.http_url, iter(attacks)))
        assert not tally.bad
        process = server.process
    assert process.returncode == 0
    assert hostile.in_flight(log.read_text()) == {}


def refusal(image, transform) -> str | None:
    try:
        decode(image, transform)
    except ImageError as error:
        return str(error)
    return None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1))
def test_a_damaged_image_is_answered_where_it_decodes_and_only_there(server, generator, clip, eager, seed):
    _, image = generator.mutator.one(np.random.default_rng(seed))
    with Client(server.grpc_url, shared_memory=False) as client:
        (answer,) = client.ask([image])
    told = refusal(image, clip.transform)
    assert answer.error == told
    if told is None:
        label, confidence, failure = eager(image)
        assert answer.label == label
        assert answer.confidence == pytest.approx(confidence, abs=1e-4)
        assert answer.failure_probability == pytest.approx(failure, abs=1e-4)


def test_the_same_seed_makes_the_same_attacks(generator):
    once, again = (list(generator.attacks(50, seed=3)) for _ in range(2))
    assert once == again
    assert once != list(generator.attacks(50, seed=4))


@pytest.mark.parametrize(
    ("decodes", "code", "fine"),
    [
        (None, "400", True),
        (None, "413", True),
        (None, "INVALID_ARGUMENT", True),
        (None, "RESOURCE_EXHAUSTED", True),
        (None, "500", False),
        (None, "INTERNAL", False),
        (None, "UNAVAILABLE", False),
        (None, "closed", False),
        (None, "no answer", False),
        (None, "DEADLINE_EXCEEDED", False),
        (None, "200", False),
        (True, "OK", True),
        (True, "400", False),
        (False, "OK", False),
        (False, "INVALID_ARGUMENT", True),
    ],
)
def test_what_counts_as_refused(decodes, code, fine):
    tally = hostile.Tally()
    tally.enter(hostile.Attack("made up", b"", decodes=decodes), "HTTP", code, "told")
    assert (not tally.bad) is fine
    assert not tally.known
    tally.enter(hostile.Attack("JSON, cut", b""), "HTTP", "500", "told")
    assert tally.known.total() == 1
    tally.enter(hostile.Attack("JSON, cut", b""), "HTTP", "no answer", "told")
    assert ("JSON, cut, HTTP", "no answer") in tally.bad


def test_a_server_that_says_nothing_is_no_refusal():

    async def silent(reply):
        async def hold(reader, writer):
            writer.write(reply)
            await asyncio.sleep(0 if reply else 2)
            writer.close()

        listening = await asyncio.start_server(hold, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        found = await over_tcp("127.0.0.1", port, b"GET / HTTP/1.1\r\n\r\n", patience=0.3)
        listening.close()
        return found[0]

    assert asyncio.run(silent(b"")) == "no answer"
    assert asyncio.run(silent(b"HTTP/1.1 4")) == "closed"
    assert asyncio.run(silent(b"HTTP/1.1 413 Too much\r\ncontent-length: 2\r\n\r\nno")) == "413"
