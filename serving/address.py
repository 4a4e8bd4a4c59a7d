"""Addresses: URLs of a server, loopback, IPv6 in brackets, listening sockets, and HTTP without a proxy."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import random
import re
import socket
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from vilu.errors import UserError

DEFAULT_URL = "127.0.0.1:8001"
SCHEMES = ("grpc", "grpcs", "http", "https")


_NETLOC = re.compile(r"(\[[0-9A-Fa-f:.%\w]+\]|[^:/\[\]]+)(?::([0-9]{1,5}))?(/.*)?")


@dataclass(frozen=True)
class ServerUrl:
    """A server's URL in parts. `target` is HOST:PORT, an IPv6 address in brackets; over HTTP a path may follow."""

    target: str
    host: str
    http: bool
    tls: bool


def parse_url(url: str) -> ServerUrl:
    """The parts of "HOST:PORT" or "grpc://HOST:PORT" (gRPC), "http://HOST:PORT" (HTTP), "grpcs://..." and
    "https://..." (with TLS), or "unix:PATH" (gRPC).

    Raises:
        UserError: another scheme, no host, or a port that is none.

    Example:
        >>> parse_url("https://[::1]:8000/")
        ServerUrl(target='[::1]:8000', host='::1', http=True, tls=True)
        >>> parse_url("127.0.0.1:8001").http
        False
    """
    if url.startswith("unix:"):
        return ServerUrl(url, "localhost", False, False)
    scheme, _, rest = url.rpartition("://")
    if scheme not in ("", *SCHEMES):
        raise UserError(f"{url}: the scheme must be grpc://, grpcs://, http:// or https://")
    target, http = rest.rstrip("/"), scheme.startswith("http")
    found = _NETLOC.fullmatch(target)
    if found is None or int(found[2] or 1) not in range(1, 65536) or (found[3] and not http):
        raise UserError(f"{url}: expected HOST:PORT, an IPv6 address in brackets: [::1]:8001")
    return ServerUrl(target, found[1].strip("[]"), http, scheme in ("grpcs", "https"))


def is_loopback(host: str) -> bool:
    """Whether a host's name is this machine's own: localhost, 127.x.x.x or ::1."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_this_machine(host: str) -> bool:
    """Whether an address, not a name, is one of this machine's own: only those can be bound."""
    if is_loopback(host):
        return True
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((str(ipaddress.ip_address(host)), 0))
    except (OSError, ValueError):
        return False
    return True


def join_host_port(host: str, port: int) -> str:
    """HOST:PORT, an IPv6 address in brackets.

    Example:
        >>> join_host_port("::1", 8001)
        '[::1]:8001'
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def reachable_host(host: str) -> str:
    """Where a process of this machine reaches a server that listens on `host`, which may be every address."""
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 picks a free one.

    Raises:
        UserError: the address cannot be listened on.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None)  # the text of create_server's own error repeats the address
        reason = os.strerror(number) if number and number > 0 else error
        raise UserError(f"cannot listen on {join_host_port(host, port)} ({reason})") from None


_CHOICE = random.SystemRandom()
_offered: set[int] = set()


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port of `host` that nobody listens on now, and that this process has not been offered before.

    It lies below the range that the system takes the ports of outgoing connections from: until the caller listens on
    it, no client of any process can be given it.
    """
    try:
        lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        lowest = 32768
    for _ in range(100):
        port = _CHOICE.randrange(10_000, lowest) if lowest > 12_000 else 0
        with contextlib.suppress(UserError), listen(host, port) as probe:
            port = int(probe.getsockname()[1])
            if port not in _offered:
                _offered.add(port)
                return port
    raise UserError(f"found no free port on {host}")


# Requests to this machine must not go to a proxy: http_proxy is set in most company networks.
open_directly = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def grpc_options(host: str) -> list[tuple[str, int]]:
    """Options of a gRPC channel to `host`: messages of any length, and no proxy to this machine."""
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    return [*options, ("grpc.enable_http_proxy", 0)] if is_this_machine(host) else options
