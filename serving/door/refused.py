"""A request that the door does not let through: one line, and what each protocol calls it."""

from __future__ import annotations

from typing import NamedTuple

import grpc


class Kind(NamedTuple):
    """grpc: the status code. http: the status. reason: the label of the metric."""

    grpc: grpc.StatusCode
    http: int
    reason: str


MALFORMED = Kind(grpc.StatusCode.INVALID_ARGUMENT, 400, "malformed")
NOT_FOUND = Kind(grpc.StatusCode.NOT_FOUND, 404, "not_found")
UNAUTHENTICATED = Kind(grpc.StatusCode.UNAUTHENTICATED, 401, "token")
TOO_LARGE = Kind(grpc.StatusCode.RESOURCE_EXHAUSTED, 413, "too_large")
LONG_HEADERS = Kind(grpc.StatusCode.RESOURCE_EXHAUSTED, 431, "too_large")
TOO_SLOW = Kind(grpc.StatusCode.DEADLINE_EXCEEDED, 408, "too_slow")
BUSY = Kind(grpc.StatusCode.UNAVAILABLE, 503, "busy")
UNAVAILABLE = Kind(grpc.StatusCode.UNAVAILABLE, 503, "no_server")
STOPPING = Kind(grpc.StatusCode.UNAVAILABLE, 503, "stopping")
NOT_NOW = Kind(grpc.StatusCode.FAILED_PRECONDITION, 409, "no_server")
NO_ANSWER = Kind(grpc.StatusCode.DEADLINE_EXCEEDED, 504, "no_answer")
UNSUPPORTED = Kind(grpc.StatusCode.UNIMPLEMENTED, 415, "unsupported")
FAILED = Kind(grpc.StatusCode.INTERNAL, 500, "failed")
_BY_CODE = {kind.grpc: kind for kind in (MALFORMED, NOT_FOUND, UNAUTHENTICATED, NO_ANSWER, UNAVAILABLE, FAILED)}
RETRY_SECONDS = 1  # that a client who was refused for an overload is asked to wait


class Refused(Exception):  # noqa: N818  it becomes an answer, nobody catches it
    """A request that is not let through, or that the server behind did not answer: one line for the client."""

    def __init__(self, message: str, kind: Kind = MALFORMED) -> None:
        super().__init__(message)
        self.kind = kind

    @classmethod
    def of(cls, error: grpc.aio.AioRpcError) -> Refused:
        """What a server behind the door said, in its own words."""
        kind = _BY_CODE.get(error.code(), FAILED)
        return cls(error.details() or "", kind._replace(grpc=error.code(), reason="server"))
