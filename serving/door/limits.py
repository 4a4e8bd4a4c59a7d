"""The numbers that bound what clients can cost."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from vilu.errors import UserError


@dataclass(frozen=True)
class Limits:
    """The door's limits; each is the largest that is still taken.

    Attributes:
        in_flight: questions to one model, waiting and under way; more are refused at once (UNAVAILABLE, 503).
        sent: questions under way at one tritonserver; the others wait in the door.
        body_bytes: of one request.
        held_bytes: of all requests that the door holds.
        header_bytes: of a request's line and headers.
        body_seconds: for a request's whole body to arrive.
        header_seconds: for a request's headers to arrive.
        idle_seconds: that a connection may be silent between requests.
        connections, connections_per_address: open at a time, for each of the two protocols.
        per_connection: requests in flight on one connection.
        timeout: seconds until a question is given up whose client names no earlier deadline.

    Raises:
        UserError: a limit that is not positive.
    """

    in_flight: int = 256
    sent: int = 64
    body_bytes: int = 64 << 20
    held_bytes: int = 1 << 30
    header_bytes: int = 16 << 10
    body_seconds: float = 30.0
    header_seconds: float = 10.0
    idle_seconds: float = 75.0
    connections: int = 2048
    connections_per_address: int = 512
    per_connection: int = 256
    timeout: float = 60.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (value > 0 and isfinite(value)):
                raise UserError(f"{name.replace('_', ' ')}: must be a number above 0, not {value:g}")
