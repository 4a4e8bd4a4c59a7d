"""The router: its rule is the calibration's, for any number of stages, and what a failing stage costs."""

import importlib.util
import json
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vilu.evaluation.cascade import Stage, answered_by
from vilu.export.repository import TEMPLATES

THRESHOLD = 0.5
DIMS = (3, 5, 2)


class Tensor:
    def __init__(self, name, array):
        self.name, self.array = name, np.asarray(array)

    def as_numpy(self):
        return self.array


class Error(str):
    """TritonError."""

    UNAVAILABLE, INVALID_ARG, INTERNAL = 1, 2, 3

    def __new__(cls, message, code=None):
        return str.__new__(cls, message)

    def message(self):
        return str(self)


class Towers:
    """What the router's calls meet: an image's file and its pixels are its number, and so is its embedding's first
    value."""

    def __init__(self, failure: np.ndarray) -> None:
        self.failure = failure  # (stages, images)
        self.broken: set[str] = set()
        self.hold = threading.Event()
        self.hold.set()
        self.asked: list[tuple[str, int]] = []

    def __call__(self, model, inputs, outputs):
        (first, *_) = inputs.values()
        self.asked.append((model, len(first)))
        if model.endswith("vilu_details"):
            if model.startswith("stage"):  # the first stage's come at once
                self.hold.wait(5)
            return {name: np.full((len(first), 1), len(model), np.float32) for name in outputs}
        self.hold.wait(5)
        if model in self.broken:
            raise RuntimeError("not loaded")
        stage = int(model.removeprefix("stage").removesuffix("_vilu"))
        number = first.reshape(len(first), -1)[:, 0].astype(int)
        embedding = np.zeros((len(first), DIMS[stage - 1]), np.float32)
        embedding[:, 0] = number
        found = answer(stage, number, self.failure) | {"IMAGE_EMBEDDING": embedding}
        return {name: found[name] for name in outputs}


def answer(stage, number, failure):
    label = np.array([[f"stage {stage} image {i}".encode()] for i in number], object)
    p = failure[stage - 1, number].astype(np.float32)[:, None]
    kinds = {"CLASS_INDEX": np.full_like(p, stage, np.int32), "CONFIDENCE": p, "FAILURE_PROBABILITY": p}
    version = np.full_like(p, 7, np.int32)
    name = np.full(p.shape, b"pets@7", object)
    return kinds | {"LABEL": label, "ACCEPT": p < 0.9, "CLASS_SET": name, "CLASS_SET_VERSION": version}


def stub(towers):
    class Call:
        def __init__(self, model_name, inputs, requested_output_names, **_):
            self.model, self.names = model_name, requested_output_names
            self.inputs = {one.name: one.array for one in inputs}

        def exec(self):
            try:
                found = towers(self.model, self.inputs, self.names)
            except RuntimeError as error:
                return SimpleNamespace(has_error=lambda: True, error=lambda text=str(error): Error(text))
            return SimpleNamespace(has_error=lambda: False, found=found)

    class Family:
        COUNTER, HISTOGRAM = "COUNTER", "HISTOGRAM"
        values: dict[tuple[Any, ...], float] = {}  # noqa: RUF012

        def __init__(self, name, **_):
            self.name = name

        def Metric(self, labels, **_):  # noqa: N802
            key = (self.name, *(labels[k] for k in ("stage", "reason", "class_set") if k in labels))

            def increment(by):
                Family.values[key] = Family.values.get(key, 0) + by

            return SimpleNamespace(increment=increment)

    Family.values = {}
    return SimpleNamespace(
        Tensor=Tensor,
        InferenceRequest=Call,
        InferenceResponse=lambda output_tensors=None, error=None: SimpleNamespace(tensors=output_tensors, error=error),
        get_input_tensor_by_name=lambda request, name: request.tensors.get(name),
        get_output_tensor_by_name=lambda response, name: Tensor(name, response.found[name]),
        TritonModelException=type("TritonModelException", (Exception,), {}),
        TritonError=Error,
        MetricFamily=Family,
        Logger=SimpleNamespace(log_warn=print, log_error=print, log_info=print),
        PreferredMemory=lambda _: None,
        TRITONSERVER_MEMORY_CPU=0,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
    )


class Request:
    """A request about images, with what stage 1 said of them."""

    def __init__(self, numbers, failure):
        self.done = threading.Event()
        self.numbers, self.later = numbers, False
        self.outputs = ["LABEL", "ACCEPT", "FAILURE_PROBABILITY", "STAGE", "ESCALATION_FAILED", "ANSWERED"]
        pixels = np.array(numbers, np.uint8)[:, None, None, None] + np.zeros((1, 2, 2, 3), np.uint8)
        files = np.array([[b"%d" % number] for number in numbers], object)
        embedding = np.zeros((len(numbers), DIMS[0]), np.float32)
        self.tensors = {name: Tensor(name, value) for name, value in answer(1, np.array(numbers), failure).items()}
        for name, value in (("PIXELS", pixels), ("IMAGE", files), ("IMAGE_EMBEDDING", embedding)):
            self.tensors[name] = Tensor(name, value)

    def requested_output_names(self):
        return self.outputs

    def parameters(self):
        return '{"class_set": "pets"}'

    def get_response_sender(self):
        self.later = True

        def send(response, flags):
            assert flags == 1
            assert not self.done.is_set(), "one response"
            self.response = response
            self.done.set()

        return SimpleNamespace(send=send)

    @classmethod
    def for_details(cls, stages):
        """A request for the details of one answer of each of these stages."""
        made = cls([0] * len(stages), np.zeros((len(DIMS), 1), np.float32))
        made.tensors = {
            "ANSWERED": Tensor("ANSWERED", np.array([[s, 7, *[0] * max(DIMS)] for s in stages], np.float32))
        }
        made.outputs = ["ENTROPY"]
        return made

    @staticmethod
    def run(router, requests):
        """Hand requests to the router; each is answered at once, or by a sender."""
        responses = router.execute(requests)
        assert len(responses) == len(requests)
        for request, response in zip(requests, responses, strict=True):
            assert request.later == (response is None), "one response"
            if response is not None:
                request.response = response
                request.done.set()

    def answered(self) -> dict[str, np.ndarray]:
        assert self.done.wait(10)
        assert self.response.error is None
        return {one.name: one.array for one in self.response.tensors}


def wait(for_what):
    """Wait until it holds: images are counted after they are answered."""
    deadline = time.monotonic() + 10
    while not for_what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def forget():
    """Let the next model import its own files."""
    for name in ("head", "sets"):
        sys.modules.pop(name, None)


@pytest.fixture
def make(monkeypatch, tmp_path):
    made = []
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "labels.txt").write_text("cat\ndog\n")
    np.save(tmp_path / "1" / "text_embeddings.npy", np.eye(2, DIMS[0], dtype=np.float32))

    def model(towers, stages=3, **parameters):
        forget()
        backend = stub(towers)
        monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
        monkeypatch.syspath_prepend(TEMPLATES / "shared")
        spec = importlib.util.spec_from_file_location("router", TEMPLATES / "vilu_router" / "model.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        about = [{"prefix": "", "dim": DIMS[0], "pixels": "PIXELS"}]
        pixels = {2: "PIXELS_2", 3: "PIXELS"}  # the third sees images as the first does
        about += [
            {"prefix": f"stage{n}_", "dim": DIMS[n - 1], "pixels": pixels[n], "model": f"stage{n}_vilu"}
            for n in range(2, stages + 1)
        ]
        given = {"cascade_threshold": repr(THRESHOLD), "stages": json.dumps(about), "max_waiting": "0"}
        given |= {"escalation_seconds": "5", "threshold": "0.9", "fingerprint": "", "intra_op_thread_count": "1"}
        given |= parameters
        config = {"max_batch_size": 4, "parameters": {key: {"string_value": value} for key, value in given.items()}}
        router = module.TritonPythonModel()
        names = {"model_name": "vilu_router", "model_version": "1", "model_repository": str(tmp_path)}
        router.initialize({"model_config": json.dumps(config), **names})
        made.append(router)
        return router, backend.MetricFamily.values

    yield model
    for router in made:
        router.finalize()
    forget()


@pytest.mark.parametrize("stages", [2, 3])
def test_the_rule_is_that_of_the_calibration(make, stages):
    rng = np.random.default_rng(0)
    failure = rng.random((3, 60)).astype(np.float32)
    failure[:, ::7] = THRESHOLD  # not above it
    towers = Towers(failure)
    router, counted = make(towers, stages)
    requests = [Request(list(range(i, min(i + 1 + i % 4, 60))), failure) for i in range(60)]
    for start in range(0, 60, 10):
        Request.run(router, requests[start : start + 10])
    truth = answered_by([Stage(p, np.ones(60, bool), 1.0) for p in failure[:stages]], THRESHOLD)
    for request in requests:
        found = request.answered()
        stage = truth[request.numbers] + 1
        assert found["STAGE"][:, 0].tolist() == stage.tolist()
        assert not found["ESCALATION_FAILED"].any()
        expected = [f"stage {s} image {i}".encode() for s, i in zip(stage, request.numbers, strict=True)]
        assert found["LABEL"][:, 0].tolist() == expected
        assert found["FAILURE_PROBABILITY"][:, 0].tolist() == failure[stage - 1, request.numbers].tolist()
        assert found["ANSWERED"][:, :2].tolist() == [[s, 7] for s in stage]
        later = stage > 1
        assert found["ANSWERED"][later, 2].tolist() == np.array(request.numbers)[later].tolist()
    asked = [np.array(request.numbers) for request in requests]
    for number in range(2, stages + 1):
        assert counted["vilu_escalated_total", str(number), "pets"] == sum(
            (truth[i] >= number - 1).sum() for i in asked
        )
        called = sum(size for model, size in towers.asked if model == f"stage{number}_vilu")
        assert called == sum((truth[i] >= number - 1).sum() for i in asked), "no image that stays"
    assert max(size for _, size in towers.asked) <= 4
    assert max(size for _, size in towers.asked) > 1, "doubtful images of several requests share a call"


def test_an_answer_that_no_later_stage_gives_is_rejected_and_marked(make):
    failure = np.full((3, 4), 0.8, np.float32)
    failure[0, 0] = 0.2
    for broken, stage in (("stage2_vilu", 1), ("stage3_vilu", 2)):
        towers = Towers(failure)
        towers.broken = {broken}
        router, counted = make(towers)
        request = Request([0, 1, 2, 3], failure)
        Request.run(router, [request])
        found = request.answered()
        assert found["STAGE"][:, 0].tolist() == [1, stage, stage, stage]
        assert found["ESCALATION_FAILED"][:, 0].tolist() == [False, True, True, True]
        assert found["ACCEPT"][:, 0].tolist() == [True, False, False, False]
        wait(lambda: counted.get(("vilu_escalation_failed_total", str(stage + 1), "error", "pets")) == 3)  # noqa: B023


def test_a_stage_that_hangs_costs_its_own_images_alone(make):
    failure = np.array([[0.2, 0.8, 0.8, 0.8]] * 3, np.float32)
    failure[1:] = 0.1
    towers = Towers(failure)
    towers.hold.clear()
    router, counted = make(towers, max_waiting="2", escalation_seconds="1.5")
    slow, other = Request([1, 2], failure), Request([2], failure)
    calm, full = Request([0], failure), Request([0, 3], failure)
    Request.run(router, [slow, other])
    Request.run(router, [calm, full])
    assert calm.answered()["STAGE"].tolist() == [[1]]
    found = full.answered()  # two requests wait already
    assert found["ESCALATION_FAILED"].tolist() == [[False], [True]]
    assert not slow.done.is_set()
    found = slow.answered()
    assert found["STAGE"].tolist() == [[1], [1]]
    assert found["ACCEPT"].tolist() == [[False], [False]]
    for reason, images in (("timeout", 3), ("overloaded", 1)):
        wait(lambda: counted.get(("vilu_escalation_failed_total", "2", reason, "pets")) == images)  # noqa: B023
    towers.hold.set()  # the stage answers again; its late answers change nothing
    wait(lambda: not router.waiting)
    again = Request([3], failure)
    Request.run(router, [again])
    assert again.answered()["STAGE"].tolist() == [[2]]


@pytest.mark.parametrize("missing", ["PIXELS", "IMAGE", "IMAGE_EMBEDDING", "CONFIDENCE"])
def test_a_request_without_an_input_takes_no_place(make, missing):
    failure = np.array([[0.8]] * 3, np.float32)
    router, counted = make(Towers(failure), max_waiting="1")
    for _ in range(2):
        bad = Request([0], failure)
        del bad.tensors[missing]
        Request.run(router, [bad])
        assert bad.response.error.message() == f"the request has no {missing}"
    assert router.waiting == 0
    good = Request([0], failure)
    Request.run(router, [good])
    assert good.answered()["STAGE"].tolist() == [[3]]
    assert not any(reason == "overloaded" for _, _, reason, *_ in (key for key in counted if "failed" in key[0]))


@pytest.mark.parametrize("stage", [-1, 0, 1.5, 4, 1e30, np.nan])
def test_details_of_no_stage_are_refused(make, stage):
    router, _ = make(Towers(np.zeros((3, 1), np.float32)))
    bad, good = Request.for_details([1, stage]), Request.for_details([3])
    Request.run(router, [bad, good])
    assert bad.response.error.message() == "ANSWERED is not what the router gave with an answer"
    assert good.answered()["ENTROPY"].tolist() == [[len("stage3_vilu_details")]]


def test_a_request_that_cannot_be_given_up_does_not_end_the_watch(make):
    failure = np.array([[0.8]] * 3, np.float32)
    towers = Towers(failure)
    towers.hold.clear()
    router, _ = make(towers, escalation_seconds="0.2")
    router.deadlines.put((0.0, None))
    request = Request([0], failure)
    Request.run(router, [request])
    assert request.answered()["ESCALATION_FAILED"].tolist() == [[True]]
    towers.hold.set()


def test_a_stage_whose_details_hang_holds_up_no_others_for_long(make):
    towers = Towers(np.zeros((3, 1), np.float32))
    towers.hold.clear()
    router, _ = make(towers, stages=2, escalation_seconds="1")
    hanging = [Request.for_details([1, 2]) for _ in range(8)]
    Request.run(router, hanging)
    first = Request.for_details([1, 1])
    Request.run(router, [first])
    assert first.answered()["ENTROPY"].tolist() == [[len("vilu_details")]] * 2
    assert not any(one.done.is_set() for one in hanging)
    for one in hanging:
        assert one.done.wait(10)
        assert one.response.error.message() == "stage 2 gave no details in 1 s"
    towers.hold.set()  # late details change nothing: a request has one response
    again = Request.for_details([2])
    Request.run(router, [again])
    assert again.answered()["ENTROPY"].tolist() == [[len("stage2_vilu_details")]]
