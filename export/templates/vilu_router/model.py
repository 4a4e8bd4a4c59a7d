"""This Triton Python model is the rule of a cascade: an image goes on to a larger CLIP where the answer is in doubt.

The first stage's answer over a class set comes from the head beside this file, in the same step; for a request's own
labels, and on a GPU, the ensemble has asked that stage's own head before. An image whose failure probability is above
the cascade's threshold is asked of the next stage, by calls that wait in threads: the model answers all other images at
once, and later requests do not wait for those that go on. One call asks the next stage's ensemble for all of its steps,
and the batchers of these steps join the images of many calls.

Where a stage does not answer (it is overloaded, down, or out of time), the image gets the answer of the stage before,
rejected and marked with ESCALATION_FAILED. The file needs no torch.
"""

import contextlib
import json
import queue
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import head  # the export copies it and sets.py beside this file
import numpy as np
import sets
import triton_python_backend_utils as pb_utils

COLUMNS = ("LABEL", "CLASS_INDEX", "CONFIDENCE", "FAILURE_PROBABILITY", "ACCEPT", "CLASS_SET")
ASKED = [*COLUMNS, "CLASS_SET_VERSION"]
WORKERS = 32  # calls to later stages at a time
LOG_SECONDS = 1.0  # between two lines about failed calls


class Question:
    """One request, which is answered once every image of it has its answer.

    Attributes:
        columns: output name -> the best answers so far, (B, 1).
        stage: (B, 1), the stage that gave each answer, from 1.
        failed: (B, 1), whether the image was to go on and could not.
        answered: (B, 2 + D): the stage, the class set's version and the stage's image embedding, for the details. D is
            the largest stage's, and shorter embeddings end in zeros.
        open: the images that are going on.
        going: how many images the calls to later stages are about.
        sender: of the response, for a request with such images; set once nothing of the request can be wrong.
    """

    sender: Any

    def __init__(self, request: Any, columns: dict[str, Any], first: np.ndarray, dim: int, threshold: float) -> None:
        self.wanted = list(request.requested_output_names())
        self.columns = {name: columns[name] for name in COLUMNS}
        rows = len(first)
        self.stage = np.ones((rows, 1), np.int32)
        self.failed = np.zeros((rows, 1), bool)
        self.answered = np.zeros((rows, 2 + dim), np.float32)
        self.answered[:, 0] = 1
        self.answered[:, 1] = columns["CLASS_SET_VERSION"][:, 0]
        self.answered[:, 2 : 2 + first.shape[1]] = first
        doubt = self.columns["FAILURE_PROBABILITY"].reshape(-1).astype(np.float64)
        self.open = set(np.flatnonzero(doubt > threshold).tolist())
        self.going = 0
        self.lock = threading.Lock()

    def name(self, row: int) -> str:
        """Return the name of the class set in the metrics."""
        return self.columns["CLASS_SET"][row, 0].decode().rpartition("@")[0] or sets.OPEN

    def put(self, row: int, stage: int, answer: dict[str, Any], *, final: bool) -> None:
        """Take a later stage's answer for an image, unless the image was given up meanwhile."""
        with self.lock:
            if row not in self.open:
                return
            for name in COLUMNS:
                self.columns[name][row] = answer[name]
            found = answer["IMAGE_EMBEDDING"]
            self.answered[row] = 0
            self.answered[row, :2] = stage, answer["CLASS_SET_VERSION"][0]
            self.answered[row, 2 : 2 + len(found)] = found
            self.stage[row] = stage
            if final:
                self._close([row])

    def give_up(self, rows: Any) -> int:
        """Answer images with what the stages before said, rejected and marked. Return how many were still open."""
        with self.lock:
            given = [row for row in rows if row in self.open]
            self.failed[given] = True
            self.columns["ACCEPT"][given] = False
            self._close(given)
            return len(given)

    def _close(self, rows: list[int]) -> None:
        self.open.difference_update(rows)
        if rows and not self.open:
            _send(self.sender, self.response())

    def response(self) -> Any:
        own = {"STAGE": self.stage, "ESCALATION_FAILED": self.failed, "ANSWERED": self.answered}
        found = self.columns | own
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(name, found[name]) for name in self.wanted])


class Going:
    """An image that goes on: its place in its question, and what later stages need of it.

    data: input -> the image: IMAGE, its file, and PIXELS, where a later stage has the pixels of the first.
    """

    def __init__(self, question: Question, row: int, data: dict[str, Any], labels: Any) -> None:
        self.question, self.row, self.data, self.labels = question, row, data, labels


class Escalations:
    """Counts images that went on, by class set and stage. It does nothing if the server keeps no metrics."""

    FAMILIES = (
        ("vilu_escalated_total", "Images that were to go on to this stage"),
        ("vilu_escalation_failed_total", "Images that could not go on to this stage, by reason"),
    )

    def __init__(self, args: dict[str, str]) -> None:
        self.labels = {"model": args["model_name"], "version": args["model_version"]}
        self.lock = threading.Lock()
        self.families: dict[str, Any] = {}
        self.metrics: dict[tuple[str, ...], Any] = {}
        with contextlib.suppress(pb_utils.TritonModelException):
            for name, description in self.FAMILIES:
                kind = pb_utils.MetricFamily.COUNTER
                self.families[name] = pb_utils.MetricFamily(name=name, description=description, kind=kind)

    def count(self, name: str, by: int, **labels: str) -> None:
        if not by or name not in self.families:
            return
        with self.lock:
            key = (name, *labels.values())
            if key not in self.metrics:
                if len(self.metrics) >= 4 * sets.COUNTED:
                    del self.metrics[next(iter(self.metrics))]
                self.metrics[key] = self.families[name].Metric(labels=self.labels | labels)
            self.metrics[key].increment(by)


class Details:
    """The response to a request for details, which a thread sends, or the deadline in its place."""

    def __init__(self, sender: Any, stage: int) -> None:
        self.sender, self.stage = sender, stage  # the last stage that is asked
        self.lock = threading.Lock()

    def send(self, response: Any) -> None:
        """Send a response, unless one was sent."""
        with self.lock:
            sender, self.sender = self.sender, None
        if sender is not None:
            _send(sender, response)

    def expire(self, seconds: float) -> None:
        text = f"stage {self.stage} gave no details in {seconds:g} s"
        self.send(sets.error_response(sets.RequestError(text, pb_utils.TritonError.UNAVAILABLE)))


class TritonPythonModel(head.Head):
    def initialize(self, args: dict[str, str]) -> None:
        super().initialize(args)
        self.threshold = float(self.parameters["cascade_threshold"])
        # Of each stage: prefix of its models, its pixels and dim; of a later one also `model`, the ensemble to ask.
        self.stages = json.loads(self.parameters["stages"])
        self.given = {_given(stage) for stage in self.stages[1:]}
        self.dim = max(stage["dim"] for stage in self.stages)
        self.most = int(self.parameters["max_waiting"])
        self.seconds = float(self.parameters["escalation_seconds"])
        self.batch = max(1, json.loads(args["model_config"])["max_batch_size"])
        self.pool = ThreadPoolExecutor(WORKERS)
        # One for each stage: a stage that hangs does not hold up the details of those before it.
        self.details_pools = [ThreadPoolExecutor(4) for _ in self.stages]
        self.counters = Escalations(args)
        self.lock = threading.Lock()
        self.waiting = 0  # requests that wait for later stages
        self.logged = float("-inf")
        self.deadlines: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._watch, daemon=True).start()

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return the responses, with None for a request whose response a thread sends later."""
        responses: list[Any] = [None] * len(requests)
        groups: dict[Any, list[Going]] = {}
        firsts: dict[int, dict[str, Any]] = {}
        parts: list[Any] = []
        for place, request in enumerate(requests):
            try:
                if pb_utils.get_input_tensor_by_name(request, "ANSWERED") is not None:
                    self._detail(request)
                elif pb_utils.get_input_tensor_by_name(request, "FAILURE_PROBABILITY") is not None:
                    firsts[place] = {name: np.array(_input(request, name)) for name in ASKED}
                else:
                    rows = self.embeddings(request)
                    parts.append(head.Part(place, set(COLUMNS), rows, [self.class_set(request)] * len(rows)))
            except Exception as error:
                responses[place] = sets.error_response(error)
        if parts:
            firsts |= {part.place: {} for part in parts}
            self._answer(parts, firsts)
            for part in parts:
                firsts[part.place] |= _class_sets(part.candidates)
        for place, columns in firsts.items():
            try:
                request = requests[place]
                first = _input(request, "IMAGE_EMBEDDING")
                question = Question(request, columns, first, self.dim, self.threshold)
                if not question.open:
                    responses[place] = question.response()
                    continue
                name, going = sets.requested_set(request), self._going(request, question)
                question.sender = request.get_response_sender()
                if not self._enter(question):
                    self._count("vilu_escalated_total", going, stage="2")
                    self._give_up(going, 2, "overloaded", f"{self.most} requests wait already")
                    continue
                for one in going:
                    width = 0 if one.labels is None else len(one.labels)
                    groups.setdefault((name, width), []).append(one)
                self.deadlines.put((time.monotonic() + self.seconds, question))
            except Exception as error:
                responses[place] = sets.error_response(error)
        for (name, _), images in groups.items():
            for start in range(0, len(images), self.batch):
                self._go_on(name, images[start : start + self.batch])
        return responses

    def _going(self, request: Any, question: Question) -> list[Going]:
        labels = pb_utils.get_input_tensor_by_name(request, "LABELS")
        own = None if labels is None else labels.as_numpy()
        rows = sorted(question.open)
        # Indexing copies: a request's memory is the server's again once `execute` has returned.
        given = {name: _input(request, name)[rows] for name in self.given}
        return [
            Going(question, row, {name: values[i] for name, values in given.items()}, None if own is None else own[row])
            for i, row in enumerate(rows)
        ]

    def _go_on(self, class_set: str, images: list[Going]) -> None:
        self._count("vilu_escalated_total", images, stage="2")
        self.pool.submit(self._ask, class_set, images)

    def _enter(self, question: Question) -> bool:
        """Count a request among those that wait for later stages, unless these are too many."""
        question.going = len(question.open)
        with self.lock:
            if self.most and self.waiting >= self.most:
                return False
            self.waiting += 1
            return True

    def _ask(self, class_set: str, images: list[Going]) -> None:
        """Ask the later stages, one after another, about images of one class set or with equally many labels."""
        every = images
        try:
            for stage in range(1, len(self.stages)):
                images = [image for image in images if image.row in image.question.open]  # not given up meanwhile
                if images:
                    images = self._ask_stage(stage, class_set, images)
        finally:
            with self.lock:  # a request whose time is over waits on until the calls about it have ended
                for image in every:
                    image.question.going -= 1
                    self.waiting -= image.question.going == 0

    def _ask_stage(self, stage: int, class_set: str, images: list[Going]) -> list[Going]:
        """Ask one stage, `stage` counted from 0. Return the images that go on."""
        last = stage == len(self.stages) - 1
        try:
            found = self._answers(self.stages[stage], class_set, images)
        except Exception as error:
            self._give_up(images, stage + 1, "error", str(error) or type(error).__name__)
            return []
        on = []
        for i, image in enumerate(images):
            doubtful = not last and bool(found["FAILURE_PROBABILITY"][i, 0].astype(np.float64) > self.threshold)
            answer = {name: column[i] for name, column in found.items()}
            image.question.put(image.row, stage + 1, answer, final=not doubtful)
            if doubtful:
                on.append(image)
        self._count("vilu_escalated_total", on, stage=str(stage + 2))
        return on

    def _count(self, metric: str, images: list[Going], **labels: str) -> None:
        for name, number in Counter(image.question.name(image.row) for image in images).items():
            self.counters.count(metric, number, class_set=name, **labels)

    def _answers(self, stage: dict[str, Any], class_set: str, images: list[Going]) -> dict[str, np.ndarray]:
        """Return a stage's answers and embeddings for these images, from one call of its ensemble."""
        name = _given(stage)
        inputs, model = {name: np.stack([image.data[name] for image in images])}, stage["model"]
        if images[0].labels is not None:
            inputs["LABELS"] = np.array([image.labels.tolist() for image in images], object)
            model += "_open"
        return self._call(model, inputs, [*ASKED, "IMAGE_EMBEDDING"], class_set)

    def _call(
        self, model: str, inputs: dict[str, np.ndarray], outputs: list[str], class_set: str = ""
    ) -> dict[str, np.ndarray]:
        """Ask a model of this server. Raises RequestError with its message."""
        response = pb_utils.InferenceRequest(
            model_name=model,
            inputs=[pb_utils.Tensor(name, value) for name, value in inputs.items()],
            requested_output_names=outputs,
            parameters={"class_set": class_set} if class_set else {},
            timeout=round(1e6 * self.seconds),
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU),
        ).exec()
        if response.has_error():
            # A call does not pass on the error's code.
            raise sets.RequestError(f"{model}: {response.error().message()}", pb_utils.TritonError.UNAVAILABLE)
        return {name: pb_utils.get_output_tensor_by_name(response, name).as_numpy().copy() for name in outputs}

    def _give_up(self, images: list[Going], stage: int, reason: str, message: str) -> None:
        given = [image for image in images if image.question.give_up([image.row])]
        self._count("vilu_escalation_failed_total", given, stage=str(stage), reason=reason)
        self._log(f"stage {stage} gave no answer for {len(images)} images ({message})")

    def _log(self, text: str) -> None:
        if time.monotonic() - self.logged > LOG_SECONDS:
            self.logged = time.monotonic()
            pb_utils.Logger.log_warn(text)

    def _watch(self) -> None:
        """Give up the images whose time is over. All have the same time, so they come in the order of their ends."""
        while (item := self.deadlines.get()) is not None:
            end, late = item
            time.sleep(max(0.0, end - time.monotonic()))
            try:
                self._expire(late)
            except Exception as error:  # one request does not end the thread that watches all
                pb_utils.Logger.log_error(f"a request was not given up: {error}")

    def _expire(self, late: Any) -> None:
        if isinstance(late, Details):
            late.expire(self.seconds)
            return
        for row in sorted(late.open):
            name, stage = late.name(row), int(late.stage[row, 0]) + 1
            given = late.give_up([row])
            by = {"class_set": name, "stage": str(stage), "reason": "timeout"}
            self.counters.count("vilu_escalation_failed_total", given, **by)
            if given:
                self._log(f"stage {stage} gave no answer in {self.seconds:g} s")

    def _detail(self, request: Any) -> None:
        """Ask the stages that answered for the details of their answers, in a thread."""
        name = sets.requested_set(request)
        answered = np.array(_input(request, "ANSWERED"))
        known = np.isin(answered[:, 0], np.arange(1, len(self.stages) + 1))
        if not (known & np.isfinite(answered[:, 1])).all():
            raise sets.RequestError("ANSWERED is not what the router gave with an answer")
        labels = pb_utils.get_input_tensor_by_name(request, "LABELS")
        own = None if labels is None else labels.as_numpy()
        wanted = list(request.requested_output_names())
        reply = Details(request.get_response_sender(), int(answered[:, 0].max()))
        self.deadlines.put((time.monotonic() + self.seconds, reply))
        pool = self.details_pools[reply.stage - 1]
        pool.submit(self._send_details, reply, name, answered, own, wanted)

    def _send_details(self, reply: Any, class_set: str, answered: np.ndarray, own: Any, wanted: list[str]) -> None:
        try:
            columns: dict[str, np.ndarray] = {}
            for number in sorted(set(answered[:, 0].astype(int).tolist())):
                stage, mine = self.stages[number - 1], answered[:, 0] == number
                inputs = {"IMAGE_EMBEDDING": np.ascontiguousarray(answered[mine, 2 : 2 + stage["dim"]])}
                model = "vilu_details"
                if own is None:
                    inputs["CLASS_SET_VERSION"] = answered[mine, 1:2].astype(np.int32)
                else:
                    inputs["LABELS"], model = own[mine], "vilu_embeddings"
                for name, rows in self._call(stage["prefix"] + model, inputs, wanted, class_set).items():
                    whole = columns.setdefault(name, np.empty((len(answered), *rows.shape[1:]), rows.dtype))
                    whole[mine] = rows
            tensors = [pb_utils.Tensor(name, columns[name]) for name in wanted]
            reply.send(pb_utils.InferenceResponse(output_tensors=tensors))
        except Exception as error:
            reply.send(sets.error_response(error))

    def finalize(self) -> None:
        self.deadlines.put(None)
        for pool in (self.pool, *self.details_pools):
            pool.shutdown(wait=False, cancel_futures=True)


def _class_sets(candidates: list[Any]) -> dict[str, np.ndarray]:
    return {
        "CLASS_SET": np.array([[one.qualified_name.encode()] for one in candidates], object),
        "CLASS_SET_VERSION": np.array([[one.version] for one in candidates], np.int32),
    }


def _given(stage: dict[str, Any]) -> str:
    """The input of a later stage: the first stage's pixels, or the file, of which it makes its own."""
    return "PIXELS" if stage["pixels"] == "PIXELS" else "IMAGE"


def _input(request: Any, name: str) -> np.ndarray:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        raise sets.RequestError(f"the request has no {name}")
    values: np.ndarray = tensor.as_numpy()
    return values


def _send(sender: Any, response: Any) -> None:
    try:
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
    except Exception as error:  # one response that cannot be sent does not end the thread that sends all of them
        pb_utils.Logger.log_error(f"a response was not sent: {error}")
