"""The service: starting NVIDIA's tritonserver on a model repository, and asking it. No torch here."""

from vilu.serving.access import Access
from vilu.serving.answers import AccessDenied, Answer, DeadlineExceeded, RequestRefused, ServerUnavailable
from vilu.serving.async_client import AsyncClient
from vilu.serving.client import Client
from vilu.serving.server import Server
from vilu.serving.tritonserver import find_tritonserver

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
