"""The service: starting NVIDIA's tritonserver on a model repository, asking it, and offline scoring. No torch here.

Names are resolved on first use. So a module of this package needs only the packages that it uses itself.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vilu.answers import Answer, RequestRefused
    from vilu.serving.access import Access
    from vilu.serving.answers import AccessDenied, DeadlineExceeded, ServerUnavailable
    from vilu.serving.async_client import AsyncClient
    from vilu.serving.client import Client
    from vilu.serving.offline import Scorer, score
    from vilu.serving.server import Server
    from vilu.serving.tritonserver import find_tritonserver

_HOME = {
    "Access": "vilu.serving.access",
    "AccessDenied": "vilu.serving.answers",
    "Answer": "vilu.answers",
    "AsyncClient": "vilu.serving.async_client",
    "Client": "vilu.serving.client",
    "DeadlineExceeded": "vilu.serving.answers",
    "RequestRefused": "vilu.answers",
    "Scorer": "vilu.serving.offline",
    "Server": "vilu.serving.server",
    "ServerUnavailable": "vilu.serving.answers",
    "find_tritonserver": "vilu.serving.tritonserver",
    "score": "vilu.serving.offline",
}
__all__ = [
    "Access",
    "AccessDenied",
    "Answer",
    "AsyncClient",
    "Client",
    "DeadlineExceeded",
    "RequestRefused",
    "Scorer",
    "Server",
    "ServerUnavailable",
    "find_tritonserver",
    "score",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'vilu.serving' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
