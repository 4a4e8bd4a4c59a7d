"""A cascade on the real server: the answers of the eager models and the rule, and what happens where stage 2 fails."""

import io
import json
import os
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from tests.serving.helpers import STEER, door_over, metrics, same_bits, send, stub_of, vilu, wait
from tests.support.cascade import Cascade, failures, stage
from vilu import CascadePredictor, Predictor, UserError
from vilu.answers import RequestRefused
from vilu.export import export, versions
from vilu.export.cascade import export_cascade
from vilu.export.model_config import save_config
from vilu.serving import Client, Scorer, Server
from vilu.serving.about import load_config
from vilu.serving.classes import get_set, put_set
from vilu.serving.door import own_server
from vilu.serving.monitor import watch
from vilu.serving.offline.triton import InferenceResponse, TritonError
from vilu.serving.record import open_record
from vilu.serving.record.recorder import RecordOptions
from vilu.serving.record.table import SCHEMA
from vilu.tiny import data

pytestmark = pytest.mark.server
NAMES = ("red circle", "blue star", "a cat", "smörgåsbord")
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    out = []
    for i, image in enumerate(data.digits("test").images[:48]):
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(image)).resize((64 + i, 80)).save(buffer, ("JPEG", "PNG", "WEBP")[i % 3])
        out.append(buffer.getvalue())
    return out


def same(answers, images, cascade, names=None):
    """Every answer is that of the eager models and the rule. Returns the stages."""
    stages = []
    for answer, image in zip(answers, images, strict=True):
        number, label, confidence, failure, near = cascade.eager(image, names)
        assert answer.error is None
        assert not answer.escalation_failed
        if near and answer.stage != number:
            continue
        assert (answer.stage, answer.label) == (number, label)
        assert answer.confidence == pytest.approx(confidence, abs=TOLERANCE)
        assert answer.failure_probability == pytest.approx(failure, abs=TOLERANCE)
        threshold = np.float32(cascade.checkpoints[number - 1].threshold)
        assert answer.accept == (np.float32(answer.failure_probability) < threshold)
        stages.append(number)
    return stages


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_answers_are_those_of_the_eager_models_and_the_rule(cascade_served, cascade, images, protocol):
    url = cascade_served.grpc if protocol == "grpc" else f"http://{cascade_served.http}"
    with Client(url, model="vilu_cascade", batch_size=5) as client:
        answers = client.ask(images)
    stages = same(answers, images, cascade)
    assert len(images) - 1 <= len(stages)
    assert {1, 2} == set(stages)
    with Client(url, batch_size=5) as client:
        first = client.ask(images)
    for answer, alone in zip(answers, first, strict=True):  # the routing, bit for bit by what stage 1 says
        assert answer.stage == (2 if alone.failure_probability > cascade.threshold else 1)
        if answer.stage == 1:
            assert (answer.label, answer.accept) == (alone.label, alone.accept)
    assert first[0].stage is None


def test_the_answers_without_a_server_are_the_same(cascade, images):
    stages = [Predictor(one, clip=clip) for one, clip in zip(cascade.checkpoints, cascade.clips, strict=True)]
    answers = CascadePredictor(stages, cascade.threshold)([images[0], b"no image", *images[1:]])
    assert (answers[1].source, answers[1].stage) == ("image 1", None)
    assert "not a JPEG" in str(answers[1].error)
    assert answers[3].source == "image 3"
    del answers[1]
    assert set(same(answers, images, cascade)) == {1, 2}
    with pytest.raises(UserError, match="at least two stages"):
        CascadePredictor(stages[:1], 0.5)
    with pytest.raises(UserError, match=r"must be in \[0, 1\]"):
        CascadePredictor(stages, 1.5)
    with pytest.raises(UserError, match="different classes"):
        CascadePredictor([stages[0], Predictor(cascade.checkpoints[1], clip=cascade.clips[1], classes=["a", "b"])], 0.5)


def test_requests_ride_together_in_every_stage(cascade_served, cascade, images):
    """One image a request, from many clients: both stages answer batches."""
    with Client(cascade_served.grpc, model="vilu_cascade", batch_size=1, in_flight=32) as client:
        asked = images * 4
        answers = client.ask(asked)
    assert len(same(answers, asked, cascade)) >= len(asked) - 4
    text = metrics(cascade_served).decode()

    def count(name, model):
        return float(re.search(rf'^{name}{{model="{model}",.*}} (\S+)', text, re.MULTILINE)[1])

    for model in ("clip_image", "stage2_clip_image"):
        assert count("nv_inference_exec_count", model) < count("nv_inference_count", model)


def test_labels_of_ones_own_and_details(cascade_served, cascade, images):
    with Client(cascade_served.grpc, model="vilu_cascade", batch_size=7) as client:
        stages = same(client.ask(images[:16], NAMES), images[:16], cascade, NAMES)
        answers = client.ask(images, details=True)
    assert len(stages) >= 15
    assert {answer.stage for answer in answers} == {1, 2}
    for answer in answers:
        assert answer.class_set == "default@1"
        assert answer.top[0] == (answer.label, pytest.approx(answer.confidence, abs=1e-5))
        assert len(answer.concepts) == 5
        assert answer.entropy is not None
        assert -1 <= answer.entropy <= 0
    with Client(cascade_served.grpc, model="vilu_cascade") as client:
        (answer,) = client.ask(images[:1], NAMES, details=True)
        assert {name for name, _ in answer.top} == set(NAMES)
        (refused,) = client.ask(images[:1], embedding=True)
    assert str(refused.error).startswith("there is no output 'IMAGE_EMBEDDING': a cascade gives none")


def test_offline_answers_equal_the_servers_to_the_last_bit(cascade_served, cascade, images):
    with Client(cascade_served.grpc, model="vilu_cascade", batch_size=8, in_flight=1) as client:
        answers = client.ask(images, details=True)
        rows = Scorer(cascade.root, details=True).answers(images).to_pylist()
        same_bits(rows, answers)
        own = Scorer(cascade.root, labels=NAMES, details=True).answers(images).to_pylist()
        same_bits(own, client.ask(images, NAMES, details=True))
    assert {row["stage"] for row in rows} == {1, 2}
    with Client(cascade_served.grpc, batch_size=8, in_flight=1) as client:  # stage 1 alone
        alone = client.ask(images, embedding=True, outlier_score=True)
    first = Scorer(cascade.root, cascade=False, embeddings=True, outlier_score=True)
    same_bits(first.answers(images).to_pylist(), alone)
    both = Scorer(cascade.root, embeddings=True, outlier_score=True).answers(images)
    for name in ("image_embedding", "outlier_score"):  # stage 1's for every image
        assert both[name].equals(first.answers(images)[name])


def test_an_offline_answer_of_a_cascade_depends_on_its_place_alone(cascade, images):
    scorer = Scorer(cascade.root, details=True)
    asked = [*images[:20], b"no image", "no path", *images[20:]]
    whole = scorer.answers(asked, range(len(asked)))
    assert [error is None for error in whole["error"].to_pylist()] == [i not in (20, 21) for i in range(len(asked))]
    assert whole["stage"].to_pylist()[20:22] == [None, None]
    kept = [1, 2, 3, 7, 11, 20, 30, 31, 45]
    assert scorer.answers([asked[i] for i in kept], kept).equals(whole.take(kept))
    for row, image in zip(whole.to_pylist(), asked, strict=True):
        if row["error"] is None:
            number, label, confidence, failure, near = cascade.eager(image)
            assert near or (row["stage"], row["label"]) == (number, label)
            if not near:
                assert row["confidence"] == pytest.approx(confidence, abs=TOLERANCE)
                assert row["failure_probability"] == pytest.approx(failure, abs=TOLERANCE)


def test_offline_pixels_of_a_later_stage_are_made_of_the_images_that_go_on(cascade, images, monkeypatch):
    """Where they cannot be made, the row says so, as one whose image cannot be decoded at all."""
    scorer = Scorer(cascade.root)
    asked: list[str] = []
    original, bad = scorer.preprocess.execute, ""

    def execute(requests):
        responses = original(requests)
        asked.extend(name for request in requests for name in request.requested_output_names())
        if bad in asked[-len(requests) :]:
            responses[0] = InferenceResponse(error=TritonError("too long and thin"))
        return responses

    monkeypatch.setattr(scorer.preprocess, "execute", execute)
    whole = scorer.answers(images, range(len(images)))
    stages = whole["stage"].to_pylist()
    assert 0 < stages.count(2) < len(images)
    assert (asked.count("PIXELS"), asked.count("PIXELS_2")) == (len(images), stages.count(2))
    bad = "PIXELS_2"
    found, lost = scorer.answers(images, range(len(images))).to_pylist(), stages.index(2)
    assert (found[lost]["error"], found[lost]["stage"], found[lost]["label"]) == ("too long and thin", None, None)
    assert [*found[:lost], *found[lost + 1 :]] == [row for i, row in enumerate(whole.to_pylist()) if i != lost]


def test_offline_answers_leave_the_priority_of_their_process(cascade, monkeypatch):
    """The server's decoder has a low one, but here it runs in the process that asks."""
    by: list[int] = []
    monkeypatch.setattr("os.nice", by.append)
    Scorer(cascade.root)
    assert set(by) <= {0}


def test_an_offline_identity_covers_every_stage_and_the_rule(cascade, tmp_path):
    root = shutil.copytree(cascade.root, tmp_path / "r")
    found = Scorer(root)
    assert found.metadata["cascade"]["threshold"] == cascade.threshold
    assert len({one["checkpoint"] for one in found.metadata["cascade"]["stages"]}) == 2
    config = load_config(root / "vilu_router" / "config.pbtxt")
    config.parameters["cascade_threshold"].string_value = repr(cascade.threshold + 0.01)
    save_config(root / "vilu_router", config)
    with pytest.raises(UserError, match="has changed since the job began"):
        Scorer(root, expected=found.identity)
    config.parameters["cascade_threshold"].string_value = repr(cascade.threshold)
    config.parameters["escalation_seconds"].string_value = "1"  # decides no answer
    save_config(root / "vilu_router", config)
    Scorer(root, expected=found.identity)
    with (root / "stage2_vilu_head" / "1" / "labels.txt").open("a") as labels:
        labels.write("more\n")
    assert Scorer(root, cascade=False).identity == Scorer(cascade.root, cascade=False).identity
    with pytest.raises(UserError, match="has changed since the job began"):
        Scorer(root, expected=found.identity)
    config.parameters["stages"].string_value = "[{}]"
    save_config(root / "vilu_router", config)
    with pytest.raises(UserError, match="does not name the stages of its cascade"):
        Scorer(root)


def test_a_class_set_put_live_is_answered_by_both_stages(cascade_served, cascade_root, cascade, images, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(NAMES) + "\n", "utf-8")
    (tmp_path / "token").write_text(STEER)
    put = ("classes", "put", "pets", names, "--url", cascade_served.grpc, "--control-token", f"@{tmp_path / 'token'}")
    done = vilu(*put)
    assert (done.returncode, done.stderr) == (0, "")
    with Client(cascade_served.grpc, model="vilu_cascade", batch_size=4) as client:
        answers = client.ask(images, class_set="pets")
        assert client.run(get_set, "pets").classes == 4
        rows = np.eye(4, 128, dtype=np.float32)
        with pytest.raises(Exception, match="cascade has 2 CLIPs"):
            client.run(put_set, "pets", NAMES, text_embeddings=rows, control_token=STEER)
    same(answers, images, cascade, NAMES)
    assert {answer.class_set for answer in answers} == {"pets@1"}
    text = metrics(cascade_served).decode()
    for name in ("default", "open", "pets"):
        found = re.search(rf'^vilu_escalated_total{{[^}}]*class_set="{name}"[^}}]*}} (\S+)', text, re.MULTILINE)
        if name != "open":  # all of the few images may be answered by stage 1
            assert found is not None
    counted = re.search(r'^vilu_escalated_total{[^}]*class_set="pets"[^}]*} (\S+)', text, re.MULTILINE)
    assert counted is not None
    assert float(counted[1]) == sum(answer.stage == 2 for answer in answers)
    with Client(cascade_served.grpc, model="vilu_cascade", batch_size=8, in_flight=1) as client:
        same_bits(
            Scorer(cascade_root, class_set="pets", details=True).answers(images).to_pylist(),
            client.ask(images, class_set="pets", details=True),
        )
    with (
        Client(cascade_served.grpc, model="vilu_cascade") as client,
        pytest.raises(RequestRefused, match="is not served"),
    ):
        client.ask(images[:1], class_set="none")[0].raise_for_error()


def test_ask_over_http_and_by_the_command(cascade_served, cascade, images, tmp_path):
    by_stage = {cascade.eager(image)[0]: image for image in images if not cascade.eager(image)[4]}
    for number, image in by_stage.items():
        status, _, found = send(cascade_served, "/ask?cascade=true", image)
        assert (status, found["stage"], found["escalation_failed"]) == (200, number, False)
        path = tmp_path / f"{number}.img"
        path.write_bytes(image)
        asked = vilu("ask", path, "--model", "vilu_cascade", "--json", "--url", cascade_served.grpc)
        (answer,) = json.loads(asked.stdout)
        assert (answer["stage"], answer["label"]) == (number, found["label"])
    status, _, found = send(cascade_served, "/ask", by_stage[2])
    assert "stage" not in found
    assert send(cascade_served, "/ask?cascade=2", by_stage[1])[0] == 400


def test_a_damaged_image_costs_the_others_nothing(cascade_served, cascade, images):
    with Client(cascade_served.grpc, model="vilu_cascade", batch_size=4) as client:
        answers = client.ask([images[0], b"no image", images[1]])
    assert "not a JPEG" in str(answers[1].error)
    same([answers[0], answers[2]], images[:2], cascade)


@pytest.mark.slow
def test_three_stages_served_as_vilu_and_recorded(cascade, larger, images, tmp_path, tower_cache):
    (first, _), digits = cascade.checkpoints, data.digits("test").images[:96]
    checkpoints = first, *(stage(larger, first.class_set.names, seed, 0.5) for seed in (3, 4))
    clips, root = (*cascade.clips, larger), tmp_path / "model_repository"
    threshold = float(failures(first, clips[0], digits).quantile(0.4))
    with torch.no_grad():  # half of stage 2's answers are above the threshold, too
        median = failures(checkpoints[1], larger, digits).median()
        checkpoints[1].head.output_layer.bias += torch.logit(torch.tensor(threshold)) - torch.logit(median)
    options = {"write": export, "precision": "float32", "max_batch_size": 8, "cache": tower_cache, "as_default": True}
    report = export_cascade(checkpoints, clips, root, threshold=threshold, **options, version=4)
    three = Cascade(root, checkpoints, clips, threshold, report)
    assert len(report["cascade"]["stages"]) == 2
    assert (versions.versions(root), versions.served(root)) == ([4], 4)
    with door_over(root, tmp_path, record=RecordOptions(str(tmp_path / "record"))) as (ports, _):
        with Client(ports.grpc, batch_size=4) as client:
            answers = client.ask(images, stage=True, details=True)
            stages = same(answers, images, three)
            assert client.ask(images[:1])[0].stage is None
        with Client(ports.grpc, model="vilu_cascade", batch_size=4) as client:  # by its own name, too
            assert same(client.ask(images[:4]), images[:4], three) == same(answers[:4], images[:4], three)
        for path in ("/ask", "/ask?cascade=true"):
            assert send(ports, path, images[0])[2]["stage"] == answers[0].stage
    assert set(stages) == {1, 2, 3}
    assert {answer.class_set for answer in answers} == {"default@4"}
    rows = [row for part in open_record(str(tmp_path / "record")).batches(SCHEMA.names) for row in part.to_pylist()]
    router = load_config(root / "vilu_router" / "config.pbtxt").parameters["checkpoint"].string_value
    assert {row["checkpoint"] for row in rows} == {router}
    recorded = {row["id"]: (row["stage"], row["escalation_failed"]) for row in rows}
    for answer in answers:
        assert recorded[answer.id] == (answer.stage, False)
    (watched,) = watch(open_record(str(tmp_path / "record"))).watched
    assert sum(watched.stages.values()) == len(rows) == len(images) + 7


def test_a_stage_that_does_not_load_is_one_line(cascade, tmp_path):
    root = shutil.copytree(cascade.root, tmp_path / "model_repository")
    (root / "stage2_vilu_head" / "1" / "labels.txt").unlink()
    message = r"ended at start with code 1: stage2_vilu_head did not load \(Internal: .*labels.txt'\); see .*log$"
    with pytest.raises(UserError, match=message), Server(root, log=tmp_path / "log"):
        pass
    for name in ("stage2_vilu_open", "stage2_clip_image"):
        (root / name).rename(tmp_path / name)
        with pytest.raises(UserError, match=f"names the model '{name}', which the repository lacks"):
            own_server(root)
        (tmp_path / name).rename(root / name)


@pytest.fixture
def weak(cascade, tmp_path):
    """A door over the cascade whose stage 2 may be waited for three seconds, by eight images."""
    root = shutil.copytree(cascade.root, tmp_path / "model_repository")
    config = load_config(root / "vilu_router" / "config.pbtxt")
    config.parameters["escalation_seconds"].string_value = "3"
    config.parameters["max_waiting"].string_value = "8"
    save_config(root / "vilu_router", config)
    with door_over(root, tmp_path) as (ports, server):
        yield ports, server


@pytest.mark.slow
def test_where_stage_2_is_slow_overloaded_or_dead_stage_1_answers_rejected(weak, cascade, images):
    ports, server = weak
    good = [image for image in images if cascade.eager(image)[0] == 1 and not cascade.eager(image)[4]]
    doubtful = [image for image in images if cascade.eager(image)[0] == 2 and not cascade.eager(image)[4]][:8]
    stub = stub_of(server.process.pid, "stage2_clip_image")

    def failed(answers):
        for answer in answers:
            assert (answer.stage, answer.escalation_failed, answer.accept) == (1, True, False)

    def total(reason):
        found = re.findall(
            rf'^vilu_escalation_failed_total{{.*reason="{reason}".*}} (\S+)', metrics(ports).decode(), re.M
        )
        return sum(map(float, found))

    details = stub_of(server.process.pid, "stage2_vilu_details")
    os.kill(details, signal.SIGSTOP)
    try:  # who asks for details that a stage does not give hears so; stage 1's details come
        status, _, found = send(ports, "/ask?cascade=true&details=true", doubtful[0])
        assert (status, "stage 2" in str(found) or "stage2" in str(found)) == (503, True), found
        assert send(ports, "/ask?cascade=true&details=true", good[0])[0] == 200
    finally:
        os.kill(details, signal.SIGCONT)
    with Client(ports.grpc, model="vilu_cascade", batch_size=1, in_flight=8) as client:
        same(client.ask(doubtful), doubtful, cascade)
        os.kill(stub, signal.SIGSTOP)
        try:
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(client.ask, doubtful)
                time.sleep(0.3)
                fast = client.ask(good[:8])  # these do not wait for those
                failed(client.ask(doubtful[:2]))  # nor do these: eight wait already
                assert not waiting.done()
                failed(waiting.result())
            same(fast, good[:8], cascade)
            # tritonserver may find the process ill before the time is over
            wait(lambda: total("timeout") + total("error") == 8)
            wait(lambda: total("overloaded") == 2)
        finally:
            os.kill(stub, signal.SIGKILL)
        failed(client.ask(doubtful))
        same(client.ask(good[:8]), good[:8], cascade)
        wait(lambda: total("timeout") + total("error") == 16)
