"""The monitor as a service: it reads a record again and again, takes feedback, and shows what it found."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import math
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from vilu.errors import UserError
from vilu.serving.address import join_host_port, listen, reachable_host
from vilu.serving.monitor import Report, Watcher
from vilu.serving.record import Record
from vilu.serving.record.feedback import give_feedback, read_feedback

MOST_BYTES = 4 << 20  # of feedback in one request
LABELS = ("class_set", "class_set_version", "model_version")


def as_plain(report: Report) -> dict[str, Any]:
    """A report as JSON can hold it: no NaN."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [plain(one) for one in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    found: dict[str, Any] = plain(asdict(report))
    return found


class Monitor:
    """The service's application and its state.

    Args:
        record: what is read; feedback goes there, too.
        every: seconds between two readings.
        token: what feedback must carry as `Authorization: Bearer TOKEN`; None: nothing.
        options: `Watcher`'s target_risk, level and window.
    """

    def __init__(self, record: Record, *, every: float = 60.0, token: str | None = None, **options: Any) -> None:
        self.record, self.every, self.token = record, every, token
        self.watcher = Watcher(record, **options)
        self.report: Report | None = None
        self.fault = ""
        self.busy = asyncio.Lock()  # a record is used by one thread at a time
        self._make_metrics()
        self.app = Starlette(
            routes=[
                Route("/feedback", self._feedback, methods=["POST"]),
                Route("/report.json", self._report),
                Route("/metrics", self._metrics),
                Route("/healthz", self._health),
            ],
            lifespan=self._lifespan,
        )

    def _make_metrics(self) -> None:
        self.registry = registry = CollectorRegistry()

        def gauge(name: str, text: str, labels: tuple[str, ...] = LABELS) -> Gauge:
            return Gauge(f"vilu_monitor_{name}", text, labels, registry=registry)

        self.gauges = {
            "answers": gauge("answers", "Recorded answers."),
            "accepted": gauge("accepted_answers", "Recorded answers that were accepted."),
            "labelled": gauge("labelled_answers", "Accepted answers with feedback that counts."),
            "risk": gauge("risk_ratio", "Error rate among the accepted answers."),
            "low": gauge("risk_low_ratio", "Lower bound on it, at all times at once."),
            "high": gauge("risk_high_ratio", "Upper bound on it, at all times at once."),
            "expected_risk": gauge("expected_risk_ratio", "Mean failure probability of the accepted answers."),
            "target_risk": gauge("target_risk_ratio", "Error rate that was promised."),
        }
        self.drift = gauge("drift_log_evidence", "Log of the evidence against no drift.", (*LABELS, "statistic"))
        self.stages = gauge("stage_answers", "Recorded answers by the stage of a cascade.", (*LABELS, "stage"))
        self.failed = gauge("escalation_failed_answers", "Answers that a later stage was to give and could not.")
        self.alarm = gauge("alarm", "1 where there is an alarm.", (*LABELS, "reason"))
        self.fed = Counter("vilu_monitor_feedback", "Feedback by what became of it.", ("result",), registry=registry)
        self.failures = Counter("vilu_monitor_read_failures", "Readings that failed.", registry=registry)
        self.seconds = gauge("read_seconds", "Time that the last reading took.", ())
        self.read_at = gauge("last_read_timestamp_seconds", "When the record was last read.", ())

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        reading = asyncio.create_task(self._read_again_and_again())
        try:
            yield
        finally:
            reading.cancel()

    async def _read_again_and_again(self) -> None:
        while True:
            await self.read()
            await asyncio.sleep(self.every)

    async def read(self) -> None:
        """Read the record now; on a failure the last report stays."""
        started = time.monotonic()
        try:
            async with self.busy:
                self.report = await asyncio.to_thread(self.watcher.read)
        except Exception as error:  # whatever a disk or a database raises, the service goes on
            if not self.fault:
                print(f"vilu: the record cannot be read: {error}", file=sys.stderr, flush=True)
            self.fault = str(error) or type(error).__name__
            self.failures.inc()
            return
        self.fault = ""
        self.seconds.set(time.monotonic() - started)
        self.read_at.set_to_current_time()
        self._show(self.report)

    def _show(self, report: Report) -> None:
        for one in (*self.gauges.values(), self.drift, self.alarm, self.stages, self.failed):
            one.clear()
        for watched in report.watched:
            labels = [str(getattr(watched, name)) for name in LABELS]
            for name, gauge in self.gauges.items():
                value = getattr(watched, name)
                if value is not None and math.isfinite(value):
                    gauge.labels(*labels).set(value)
            for statistic, evidence in watched.drift.items():
                self.drift.labels(*labels, statistic).set(evidence)
            for stage, number in watched.stages.items():
                self.stages.labels(*labels, stage).set(number)
            if watched.stages:
                self.failed.labels(*labels).set(watched.escalation_failed)
            for reason in ("risk", "drift"):
                self.alarm.labels(*labels, reason).set(reason in watched.alarms)

    async def _feedback(self, request: Request) -> Response:
        if self.token is not None:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self.token.encode()):
                return JSONResponse({"error": "a token is missing or wrong"}, 401, {"www-authenticate": "Bearer"})
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MOST_BYTES:
                return JSONResponse({"error": f"the body is larger than {MOST_BYTES} bytes"}, 413)
        try:
            feedback = read_feedback(body.decode(), "the body")
        except (UserError, UnicodeDecodeError) as error:
            self.fed.labels("refused").inc()
            return JSONResponse({"error": str(error) if isinstance(error, UserError) else "it is not UTF-8"}, 400)
        try:
            async with self.busy:
                taken = await asyncio.to_thread(give_feedback, self.record, feedback)
        except UserError as error:
            return JSONResponse({"error": str(error)}, 503, {"retry-after": "5"})
        for result, number in asdict(taken).items():
            self.fed.labels(result).inc(number)
        return JSONResponse(asdict(taken))

    async def _report(self, request: Request) -> Response:
        if self.report is None:
            return JSONResponse({"error": self.fault or "the record is being read"}, 503, {"retry-after": "1"})
        return JSONResponse(as_plain(self.report))

    async def _metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.registry), media_type="text/plain; version=0.0.4")

    async def _health(self, request: Request) -> Response:
        return PlainTextResponse(self.fault or "ok", 503 if self.fault else 200)


def serve(record: Record, *, host: str = "127.0.0.1", port: int = 8003, **options: Any) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code. options: as for `Monitor`.

    Raises:
        UserError: an address that cannot be listened on.
    """

    async def run() -> None:
        with listen(host, port) as listener:
            config = uvicorn.Config(
                Monitor(record, **options).app, log_level="warning", timeout_graceful_shutdown=5, limit_concurrency=64
            )
            server = uvicorn.Server(config)
            bound = join_host_port(reachable_host(host), listener.getsockname()[1])
            print(f"watching: http://{bound}/report.json, metrics http://{bound}/metrics", file=sys.stderr, flush=True)
            with contextlib.suppress(asyncio.CancelledError):
                await server.serve(sockets=[listener])

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run())
    return 0
