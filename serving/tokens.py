"""Secrets: the headers that carry them, where they are read from, and what they must look like.

An empty or malformed secret is an error wherever it is read: it never stands for "no secret".
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from vilu.errors import UserError

# The headers' names; in gRPC's metadata tritonserver puts a prefix before them.
TOKEN, CONTROL = "vilu-token", "vilu-control"
GRPC_PREFIX = "triton-grpc-protocol-"
_SECRET = re.compile(r"[A-Za-z0-9._~-]{16,256}")  # no comma, = or space: it stands in a flag and in a header


def check_secret(value: str, name: str) -> str:
    """The secret itself. Raises UserError where a server may not be opened by it: too short, or unfit for a header."""
    if not _SECRET.fullmatch(value):
        raise UserError(f"{name}: 16 to 256 letters, digits or ._~- are needed")
    return value


def check_header_value(value: str, name: str) -> str:
    """The value itself. Raises UserError where no header can carry it: empty, with spaces, line ends or beyond ASCII.

    Example:
        >>> check_header_value("correct-horse-battery", "token")
        'correct-horse-battery'
    """
    if not value.strip("\ufeff \t\r\n"):
        raise UserError(f"{name}: is empty; leave it out to use none")
    if value.startswith("\ufeff"):
        raise UserError(f"{name}: begins with a byte order mark; save it as UTF-8 without one")
    if len(value.splitlines()) > 1:
        raise UserError(f"{name}: holds more than one line")
    if not re.fullmatch(r"[!-~]+", value):
        raise UserError(f"{name}: holds a space or a character that is not printable ASCII")
    return value


def token_from(option: str | None, variable: str) -> str | None:
    """A token from an option's value, from a file where the value starts with @, else from an environment variable.

    Returns:
        None where neither is given.

    Raises:
        UserError: a file that cannot be read, or a token that is empty or malformed.
    """
    value, source = (os.environ.get(variable), f"${variable}") if option is None else (option, "token")
    if value is None:
        return None
    if value.startswith("@"):
        source = value[1:]
        if not source:
            raise UserError("token: the name of a file is missing after @")
        try:
            value = Path(source).read_text("utf-8-sig").strip(" \t\r\n")
        except (OSError, ValueError) as error:
            raise UserError(f"{source}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    return check_header_value(value, source)
