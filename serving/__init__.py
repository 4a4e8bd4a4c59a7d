"""The service: starting NVIDIA's tritonserver on a model repository, and asking it. No torch here."""

from vilu.serving.access import Access
from vilu.serving.client import (
    AccessDenied,
    Answer,
    AsyncClient,
    Client,
    DeadlineExceeded,
    RequestRefused,
    ServerUnavailable,
)
from vilu.serving.server import Server, find_tritonserver

__all__ = [
    "Access",
    "AccessDenied",
    "Answer",
    "AsyncClient",
    "Client",
    "DeadlineExceeded",
    "RequestRefused",
    "Server",
    "ServerUnavailable",
    "find_tritonserver",
]
