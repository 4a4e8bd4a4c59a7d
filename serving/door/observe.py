"""What an operator sees: Prometheus metrics, and an access log of JSON lines without images or tokens."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vilu.serving.door.access_log import AccessLog

# Reasons whose messages hold nothing that a client wrote: the others can quote a label.
LOGGED = {"token", "too_large", "too_slow", "busy", "no_server", "no_answer", "stopping", "unsupported"}
SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """The door's metrics, each in a registry of its own so that several doors may live in one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "vilu_door_requests", "Requests by outcome.", ("protocol", "model", "outcome"), registry=registry
        )
        self.refusals = Counter("vilu_door_refusals", "Requests not let through.", ("reason",), registry=registry)
        self.seconds = Histogram(
            "vilu_door_seconds", "From headers to answer.", ("protocol",), buckets=SECONDS, registry=registry
        )
        self.in_flight = Gauge("vilu_door_in_flight", "Questions waiting and under way.", ("model",), registry=registry)
        self.connections = Gauge("vilu_door_connections", "Open connections.", ("protocol",), registry=registry)
        self.restarts = Counter("vilu_door_upstream_restarts", "Restarts of tritonserver.", registry=registry)
        self.retries = Counter("vilu_door_retries", "Questions asked again after a server failed.", registry=registry)
        self.upstreams = Gauge("vilu_door_upstream_well", "1 where a server answers.", ("url",), registry=registry)
        self.reloads = Counter("vilu_door_reloads", "Readings of secrets anew.", ("result",), registry=registry)
        self.lines_dropped = Counter(
            "vilu_door_log_lines_dropped", "Lines of the access log that were not written.", registry=registry
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)


@dataclass
class Seen:
    """One request, as the access log and the metrics tell it."""

    protocol: str
    peer: str
    what: str  # gRPC's method, or HTTP's method and path
    model: str = ""
    token: str = ""  # its name, never the token
    trace: str = ""
    answer_id: str = ""  # of the recorded answers
    in_reply: bool = False  # the reply itself has it
    bytes_in: int = 0
    started: float = field(default_factory=time.monotonic)


_TRACE = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


def trace_id(traceparent: str) -> str:
    """The trace's id in a W3C traceparent header; "" where there is none.

    Example:
        >>> trace_id("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
        '0af7651916cd43dd8448eb211c80319c'
    """
    found = _TRACE.fullmatch(traceparent)
    return found[1] if found else ""


class Observer:
    """Counts every request and, where there is a log, writes a line about it.

    Args:
        log: a file that lines are appended to, "-" for standard output, None for no access log.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, metrics: Metrics, log: str | None = None) -> None:
        self.metrics = metrics
        self.log = None if log is None else AccessLog(log, metrics.lines_dropped)

    def done(self, seen: Seen, outcome: str, reason: str = "", message: str = "") -> None:
        """One request has ended. outcome: "ok", or gRPC's code or HTTP's status. reason: why it was not let through."""
        seconds = time.monotonic() - seen.started
        self.metrics.requests.labels(seen.protocol, seen.model, outcome).inc()
        self.metrics.seconds.labels(seen.protocol).observe(seconds)
        if reason:
            self.metrics.refusals.labels(reason).inc()
        if self.log is None:
            return
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "protocol": seen.protocol,
            "peer": seen.peer,
            "request": seen.what,
            "model": seen.model,
            "outcome": outcome,
            "reason": reason,
            "message": message[:200] if reason in LOGGED else "",
            "seconds": round(seconds, 6),
            "bytes": seen.bytes_in,
            "token": seen.token,
            "trace": seen.trace,
            "answer": seen.answer_id,
        }
        self.log.write(json.dumps({key: value for key, value in line.items() if value != ""}))
