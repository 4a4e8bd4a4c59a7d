"""What both protocols do with a request: admit it or refuse it, check it, have it answered."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from tritonclient.grpc import service_pb2 as pb

from vilu.serving.door.check import check, named, parsed, parsed_question
from vilu.serving.door.keys import Keys, bearer
from vilu.serving.door.limits import Limits
from vilu.serving.door.observe import Observer, Seen, trace_id
from vilu.serving.door.refused import BUSY, NOT_FOUND, UNAUTHENTICATED, Refused
from vilu.serving.door.upstream import Metadata, Upstreams
from vilu.serving.tokens import CONTROL, GRPC_PREFIX, TOKEN

CHANGES = {
    "RepositoryModelLoad": pb.RepositoryModelLoadRequest,
    "RepositoryModelUnload": pb.RepositoryModelUnloadRequest,
}
QUESTIONS = {
    "ModelReady": pb.ModelReadyRequest,
    "ModelMetadata": pb.ModelMetadataRequest,
    "ModelConfig": pb.ModelConfigRequest,
}


class Core:
    """The door without a protocol.

    Args:
        hand_on: whether clients' tokens are passed to the servers behind: where the door has none of its own.
        before_load: called with a model's name before it is loaded, in a thread's or the loop's own time.
    """

    def __init__(
        self, upstreams: Upstreams, keys: Keys, limits: Limits, observer: Observer, *, hand_on: bool = False,
        before_load: Any = None,
    ) -> None:  # fmt: skip
        self.upstreams, self.keys, self.limits, self.observer = upstreams, keys, limits, observer
        self.metrics = observer.metrics
        self.hand_on, self.before_load = hand_on, before_load
        self.in_flight: Counter[str] = Counter()
        self.reading = 0  # requests whose bodies are arriving
        self.held = 0  # bytes of requests

    @property
    def ready(self) -> bool:
        return self.upstreams.well

    def seen(self, protocol: str, peer: str, what: str, headers: Mapping[str, str]) -> Seen:
        return Seen(protocol, peer, what, trace=trace_id(headers.get("traceparent", "")))

    def authenticate(self, seen: Seen, headers: Mapping[str, str], prefix: str = "") -> None:
        """Let a client ask. Raises Refused where the token is missing or wrong."""
        if self.keys.open:
            return
        name = self.keys.name_of(bearer(headers, prefix + TOKEN))
        if name is None:
            raise Refused("a token is missing or wrong", UNAUTHENTICATED)
        seen.token = name

    def authorize_change(self, headers: Mapping[str, str], prefix: str = "") -> None:
        """Let a client load or unload models. Raises Refused."""
        token = bearer(headers, prefix + CONTROL)
        if self.keys.controlled and not self.keys.may_change(token):
            raise Refused("a change needs the control token", UNAUTHENTICATED)
        if not self.keys.controlled and not self.hand_on:
            raise Refused("changes are closed: this server has no control token", UNAUTHENTICATED)

    def metadata(self, headers: Mapping[str, str], prefix: str = "") -> list[tuple[str, str]]:
        """What of a request's headers goes to the servers behind."""
        traceparent = headers.get("traceparent", "")
        passed = [("traceparent", traceparent)] if trace_id(traceparent) else []
        if self.hand_on:
            for key in (TOKEN, CONTROL):
                if value := headers.get(prefix + key):
                    passed.append((GRPC_PREFIX + key, value))
        return passed

    def end(self, seconds: float | None = None) -> float:
        """When a question that came now is given up (time.monotonic)."""
        return time.monotonic() + min(self.limits.timeout, self.limits.timeout if seconds is None else seconds)

    @contextlib.contextmanager
    def arriving(self) -> Iterator[None]:
        """A body is read inside. Raises Refused where too many are being read."""
        if self.reading >= self.limits.in_flight:
            raise Refused(f"{self.reading} requests are arriving", BUSY)
        self.reading += 1
        try:
            yield
        finally:
            self.reading -= 1

    @contextlib.contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """So many bytes are held inside. Raises Refused where that would be too many."""
        if self.held and self.held + size > self.limits.held_bytes:
            raise Refused("the requests under way are too large together", BUSY)
        self.held += size
        try:
            yield
        finally:
            self.held -= size

    async def infer(self, data: bytes, seen: Seen, end: float, metadata: Metadata) -> bytes:
        """A ModelInferRequest's reply, both as they are on the wire. Raises Refused."""
        request, raw = parsed_question(data)
        return await self.infer_parsed(request, raw, data, seen, end, metadata)

    async def infer_parsed(
        self, request: pb.ModelInferRequest, raw: Any, data: bytes, seen: Seen, end: float, metadata: Metadata
    ) -> bytes:
        """`infer` for a request that is parsed already."""
        seen.model = name = named(request)
        if self.in_flight[name] >= self.limits.in_flight:
            raise Refused(f"{self.in_flight[name]} requests for {name} are under way", BUSY)
        self.in_flight[name] += 1
        self.metrics.in_flight.labels(name).set(self.in_flight[name])
        try:
            with self.holding(len(data)):
                check(request, raw, await self.upstreams.config(name, end, metadata))
                if "timeout" in request.parameters:
                    end = min(end, time.monotonic() + request.parameters["timeout"].int64_param / 1e6)
                return await self.upstreams.ask("ModelInfer", data, end, metadata)
        finally:
            self.in_flight[name] -= 1
            self.metrics.in_flight.labels(name).set(self.in_flight[name])

    async def describe(self, method: str, data: bytes, seen: Seen, end: float, metadata: Metadata) -> bytes:
        """The reply to one of QUESTIONS, for the models that people ask. Raises Refused."""
        seen.model = named(parsed(QUESTIONS[method], data))
        return await self.upstreams.ask(method, data, end, metadata)

    async def change(self, method: str, data: bytes, seen: Seen, end: float, metadata: Metadata) -> bytes:
        """The reply to one of CHANGES, made by every server behind. Raises Refused."""
        name = parsed(CHANGES[method], data).model_name
        if not name or "/" in name or name.startswith("."):
            raise Refused("not a model's name", NOT_FOUND)
        seen.model = name
        if self.before_load is not None:
            self.before_load(name)
        return await self.upstreams.change(method, data, end, metadata)
