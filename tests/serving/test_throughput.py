"""bench/throughput.py on the embedded default: its load, its gate, one whole run. No speed is asserted."""

import asyncio
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import contenders, new_names, throughput, throughput_rows
from bench.loadtest import load_generator
from bench.loadtest.processes import Processes
from vilu.checkpoint import save_checkpoint
from vilu.errors import UserError

pytestmark = pytest.mark.server


@pytest.fixture
def load(server, photos):
    requests = [load_generator.request(photo) for photo in photos]
    return load_generator.Load(server.grpc_url, requests, processes=Processes(server.process.pid))


def test_closed_loop_agrees_with_the_servers_own_count(load):
    window = load.closed(4, 1.0, ramp=0.1)
    assert not window.errors
    assert window.answered == len(window.latencies) > 0
    tower = window.models["clip_image"]
    # Four in flight: what was counted here and there differs by no more than those at either end.
    assert abs(tower.images - window.answered) <= 8
    assert set(tower.batches) <= set(range(1, 9))
    assert set(window.server_cpu) >= {"tritonserver", "preprocess", "clip_image", "vilu_head"}
    assert window.server_cpu["clip_image"] > 0
    assert window.memory > 20 << 20
    row = throughput_rows.summary([window, window])
    assert row["answered"] == 2 * window.answered
    assert row["models"]["clip_image"]["executions"] == 2 * tower.executions


def test_open_loop_sends_what_was_due_and_counts_every_answer(load):
    rate, seconds, seed = 40.0, 1.0, 3
    draw, due, expected = random.Random(seed), 0.0, 0
    while (due := due + draw.expovariate(rate)) < seconds:
        expected += 1
    window = load.open(rate, seconds, seed=seed)
    assert not window.errors
    assert len(window.latencies) == expected
    assert window.answered <= expected


def test_refused_requests_are_errors_not_answers(server):
    window = load_generator.Load(server.grpc_url, [load_generator.request(b"no image")]).closed(2, 0.3, ramp=0.0)
    assert window.answered == 0
    assert set(window.errors) == {"INVALID_ARGUMENT"}
    assert window.errors.total() > 0


def test_a_server_that_is_not_there_is_an_error():
    from vilu.serving.address import free_port

    load = load_generator.Load(f"127.0.0.1:{free_port()}", [load_generator.request(b"x")], timeout=1.0)
    with pytest.raises(Exception, match="UNAVAILABLE"):
        load.closed(1, 0.2, ramp=0.1)


@pytest.mark.parametrize(
    ("precision", "change", "fine"),
    [
        ("float32", {}, True),
        ("float32", {"failure": 2e-4}, False),
        ("int8", {"failure": 2e-4}, True),
        ("float32", {"failure": np.nan}, False),
        ("float32", {"wrong": 1}, False),
        ("bfloat16", {"wrong": 1}, False),
        ("int8", {"wrong": 1}, True),
        ("int8", {"wrong": 2}, False),
        ("bfloat16", {"noise": 0.02}, True),
        ("bfloat16", {"noise": 0.1}, False),
        ("int8", {"noise": 0.1}, True),
        ("float32", {"noise": 0.02}, False),
    ],
)
def test_gate(precision, change, fine):
    draw = np.random.default_rng(0)
    embedding = draw.normal(size=(100, 64))
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    noise = draw.normal(size=embedding.shape)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    index = draw.integers(10, size=100)
    reference = throughput_rows.Reference(embedding, np.full(100, 0.5), index)
    theirs = index.copy()
    theirs[: change.get("wrong", 0)] += 1
    failure = np.full(100, 0.5)
    failure[7] += change.get("failure", 0.0)
    judged = reference.judge(precision, failure, theirs, embedding + change.get("noise", 0.0) * noise)
    assert judged["within_budget"] is fine


def test_a_contender_that_disagrees_has_no_rank(clip, checkpoint, photos):
    images = [*photos, *photos][:16]
    run = throughput.Bench(throughput.Plan(1, 16, 0.01, 0.1, (), ()), images, "cpu")

    def wrong() -> contenders.Way:
        way = next(peers())[2]()
        way.tower = lambda pixels, tower=way.tower: -tower(pixels)
        return way

    def absent() -> contenders.Way:
        raise RuntimeError("is not installed\nsecond line")

    def peers():
        return contenders.peers(clip, checkpoint, "cpu", 1, Path(), True)

    name, precision, build = next(peers())
    run.add([(name, precision, build), ("wrong", "float32", wrong), ("absent", "float32", absent)], lambda _: None)
    run.measure(lambda _: None)
    right, bad, none = run.rows
    assert right.agrees
    assert right.rate("tower 1") > 0
    assert not bad.agrees
    assert bad.timings["tower 1"].seconds
    assert bad.rate("tower 1") == 0
    assert none.way is None
    assert none.note == "RuntimeError: is not installed"
    found = throughput_rows.targets(run.rows, [], None, [])
    assert all(row["measured"] is None for row in found)  # nothing of ours was measured


def test_limit_adds_the_two_parts():
    assert throughput_rows.limit(0.004, 0.016) == pytest.approx(50.0)


@pytest.mark.slow
def test_whole_run(clip, checkpoint, repository, tmp_path, monkeypatch):
    ckpt = tmp_path / "head.safetensors"
    save_checkpoint(checkpoint, ckpt)
    monkeypatch.setattr(throughput, "QUICK", throughput.Plan(1, 16, 0.05, 0.3, (1, 16), (0.5,)))
    report = throughput.run(
        ckpt=ckpt, repositories=[repository], quick=True, threads=torch.get_num_threads(), output=tmp_path / "out"
    )
    assert report == json.loads((tmp_path / "out.json").read_text())
    assert (tmp_path / "out.png").stat().st_size > 10_000
    agree = {
        (r["contender"], r["precision"]): r["parity"]["within_budget"] for r in report["contenders"] if r["parity"]
    }
    assert agree["eager", "float32"]
    assert agree["vilu export", "float32"]
    assert report["server_parity"]["float32"]["within_budget"]
    assert [(row["mode"], row["level"]) for row in report["server"][:2]] == [("closed", 1), ("closed", 16)]
    assert all(row["errors"] == {} for row in report["server"])
    stated = {row["what"]: row["measured"] for row in report["targets"]}
    assert stated["exported tower (float32) / eager float32"] > 0
    assert stated["server (float32) latency at 1 / in process"] > 0


def test_a_running_server_alone(server, tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "QUICK", throughput.Plan(1, 16, 0.05, 0.3, (2,), ()))
    report = throughput.run(
        url=server.grpc_url, rates="20", quick=True, threads=torch.get_num_threads(), output=tmp_path / "out"
    )
    assert report["contenders"] == []
    assert [(row["mode"], row["level"]) for row in report["server"]] == [("closed", 2), ("open, Poisson", 20.0)]
    assert report["server"][0]["throughput"]["median"] > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rates": "10,fast"}, "--rates '10,fast'"),
        ({"rates": "-1"}, "--rates '-1'"),
        ({"url": "http://127.0.0.1:8000"}, "over gRPC"),
        ({"clip_name": "ViT-B-33"}, "near: ViT-B-32"),
        ({"folder": Path("/nowhere")}, "not a folder"),
    ],
)
def test_bad_input_is_one_line(given, message):
    with pytest.raises(UserError, match=message) as caught:
        throughput.run(quick=True, threads=torch.get_num_threads(), **given)
    assert "\n" not in str(caught.value)


def test_new_names_are_asked_beside_the_closed_set(server, photos):
    requests = [load_generator.request(photo) for photo in photos[:3]]
    window = asyncio.run(new_names.window(server.grpc_url, requests, photos[0], 2, 1.2, 7000))
    assert window["questions"] == 2
    assert 0 < window["p50"] <= window["p99"] <= window["max"]
    assert "questions" not in asyncio.run(new_names.window(server.grpc_url, requests, photos[0], 1, 0.3, -1))
