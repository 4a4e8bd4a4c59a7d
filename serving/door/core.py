"""What both protocols do with a request: admit it or refuse it, check it, have it answered."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tritonclient.grpc import service_pb2 as pb

from vilu.serving.door.check import check, named, parsed, parsed_question
from vilu.serving.door.keys import Keys, bearer
from vilu.serving.door.limits import Limits
from vilu.serving.door.observe import Observer, Seen, trace_id
from vilu.serving.door.refused import BUSY, NOT_FOUND, UNAUTHENTICATED, Refused
from vilu.serving.door.upstream import Metadata, Upstreams
from vilu.serving.tokens import CONTROL, GRPC_PREFIX, TOKEN

if TYPE_CHECKING:
    from vilu.serving.record.recorder import Recorder, Recording

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
        recorder: records the answers.
    """

    def __init__(
        self, upstreams: Upstreams, keys: Keys, limits: Limits, observer: Observer, *, hand_on: bool = False,
        before_load: Any = None, recorder: Recorder | None = None,
    ) -> None:  # fmt: skip
        self.upstreams, self.keys, self.limits, self.observer = upstreams, keys, limits, observer
        self.metrics = observer.metrics
        self.hand_on, self.before_load, self.recorder = hand_on, before_load, recorder
        self.in_flight: Counter[str] = Counter()
        self.reading = 0  # requests whose bodies are arriving
        self.held = 0  # bytes of requests
        self.coming: Counter[str] = Counter()  # by address: requests whose bodies arrive or wait for a place
        self.places: dict[str, asyncio.Semaphore] = {}  # by address
        self.coming_bytes: Counter[str] = Counter()  # by address: held for bodies that arrive
        self.stopping = False

    @property
    def ready(self) -> bool:
        return self.upstreams.well and not self.stopping

    def seen(self, protocol: str, peer: str, what: str, headers: Mapping[str, str]) -> Seen:
        return Seen(protocol, peer, what, trace=trace_id(headers.get("traceparent", "")))

    def stop(self) -> None:
        """Refuse what comes from now on; what is under way may end."""
        self.stopping = True

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

    @contextlib.asynccontextmanager
    async def arriving(self, peer: str, size: int = 0) -> AsyncIterator[Arriving]:
        """A body is read inside; it waits while other bodies of its sender's address have a quarter of the places.

        Args:
            peer: the sender's address.
            size: bytes of the body, as far as they are known; they are held from now on.

        Raises:
            Refused: too many bodies are being read, or too many bytes are held.
        """
        if self.coming[peer] >= self.limits.in_flight:
            raise Refused(f"{self.coming[peer]} requests of this address are arriving", BUSY)
        self.coming[peer] += 1
        place = self.places.setdefault(peer, asyncio.Semaphore(max(1, self.limits.in_flight // 4)))
        try:
            async with place:
                if self.reading >= self.limits.in_flight:
                    raise Refused(f"{self.reading} requests are arriving", BUSY)
                self.reading += 1
                body = Arriving(self, peer)
                try:
                    if size:
                        body.hold(size)
                    yield body
                finally:
                    self.reading -= 1
                    body.release()
        finally:
            self.coming[peer] -= 1
            if not self.coming[peer]:
                del self.coming[peer], self.places[peer], self.coming_bytes[peer]

    @contextlib.contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """So many bytes are held inside. Raises Refused where that would be too many."""
        self.hold(size)
        try:
            yield
        finally:
            self.held -= size

    def hold(self, size: int) -> None:
        """Count bytes as held. Raises Refused where that would be too many."""
        if self.held and self.held + size > self.limits.held_bytes:
            raise Refused("the requests under way are too large together", BUSY)
        self.held += size

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
                model = await self.upstreams.config(name, end, metadata)
                check(request, raw, model)
                if "timeout" in request.parameters:
                    end = min(end, time.monotonic() + request.parameters["timeout"].int64_param / 1e6)
                recording = None if self.recorder is None else self.recorder.begin(request, raw, model)
                if recording is None:
                    return await self.upstreams.ask("ModelInfer", data, end, metadata)
                reply = await self.upstreams.ask("ModelInfer", data + recording.more, end, metadata)
                seen.answer_id = recording.id
                heads = ("vilu_router",) if "STAGE" in model["outputs"] else ("vilu_head", "vilu_embeddings")
                return await self._recorded(recording, reply, heads, seen, end, metadata)
        finally:
            self.in_flight[name] -= 1
            self.metrics.in_flight.labels(name).set(self.in_flight[name])

    async def _recorded(
        self, recording: Recording, data: bytes, heads: Sequence[str], seen: Seen, end: float, metadata: Metadata
    ) -> bytes:
        """Record a reply, and return what of it the client asked for, with the id of its answers.

        Args:
            heads: the models that say what answered; the first that the repository has.
        """
        assert self.recorder is not None
        reply = pb.ModelInferResponse.FromString(data)
        known: dict[str, str] = {}
        for head in heads:
            with contextlib.suppress(Refused):  # or a version that is gone already
                known = (await self.upstreams.config(head, end, metadata, reply.model_version))["parameters"]
                break
        self.recorder.add(data, recording, known.get("checkpoint", ""), known.get("calibration", ""))
        data = recording.stripped(reply, data)
        if not reply.id:
            data += pb.ModelInferResponse(id=recording.id).SerializeToString()  # the fields of a message add up
        seen.in_reply = reply.id in ("", recording.id)
        return data

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


class Arriving:
    """A body that is arriving, and how many bytes are held for it."""

    def __init__(self, core: Core, peer: str) -> None:
        self.core, self.peer = core, peer
        self.held = self.came = 0

    def hold(self, size: int) -> None:
        """Hold so many more bytes. Raises Refused where that would be too many, of this address or of all."""
        others = self.core.coming_bytes[self.peer] - self.held
        if others and others + self.held + size > self.core.limits.held_bytes // 4:
            raise Refused("the requests of this address that are arriving are too large together", BUSY)
        self.core.hold(size)
        self.core.coming_bytes[self.peer] += size
        self.held += size

    def add(self, size: int) -> None:
        """So many bytes have come; they are held if they were not known before. Raises Refused as `hold`."""
        self.came += size
        if self.came > self.held:
            self.hold(self.came - self.held)

    def release(self) -> None:
        self.core.held -= self.held
        self.core.coming_bytes[self.peer] -= self.held
