"""Who may ask: tokens with names, compared in constant time, and certificates; both can be read anew."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import ssl
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import grpc

from vilu.errors import UserError
from vilu.serving.access import Access
from vilu.serving.tokens import check_secret


def read_tokens(path: Path) -> dict[str, str]:
    """A file of tokens, one a line: a name, a space, the token. Empty lines and lines that begin with # are skipped.

    Returns:
        name -> token.

    Raises:
        UserError: not such a file, no token in it, or one that is malformed or there twice.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or line.startswith("#"):
            continue
        if len(words) != 2:
            raise UserError(f"{path}: line {number} is not a name, a space and a token")
        name, token = words
        check_secret(token, f"{path}: line {number}")
        if name in found or token in found.values():
            raise UserError(f"{path}: line {number} has a name or a token that is there already")
        found[name] = token
    if not found:
        raise UserError(f"{path}: holds no token")
    return found


def bearer(headers: Mapping[str, str], name: str) -> str | None:
    """The token of a request: of its header `name`, else of `Authorization: Bearer TOKEN`."""
    if name in headers:
        return headers[name]
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


class Keys:
    """The tokens and certificates in force.

    Args:
        access: reads the single tokens and the paths of the TLS files; called again whenever a file has changed.
        tokens: a file of `read_tokens`.
        watched: files that single tokens are read from.

    Raises:
        UserError: a file that is not what it must be.
    """

    def __init__(self, access: Callable[[], Access], tokens: Path | None = None, watched: Sequence[Path] = ()) -> None:
        self._access, self._tokens, self._watched = access, tokens, list(watched)
        self.read()

    def read(self) -> None:
        """Read all files; on an error those in force stay. Raises UserError."""
        access = self._access()
        named = {} if self._tokens is None else read_tokens(self._tokens)
        if access.token is not None:
            named["token"] = access.token
        if access.control_token is not None and access.control_token in named.values():
            raise UserError("control token: must not be one for inference")
        context = _context(access)
        pems = tuple(path.read_bytes() if path else None for path in (access.tls_cert, access.tls_key, access.tls_ca))
        self._asking = {hashlib.sha256(token.encode()).digest(): name for name, token in named.items()}
        control = access.control_token
        self._control = None if control is None else hashlib.sha256(control.encode()).digest()
        self.access, self.context, self._pems = access, context, pems

    def stamp(self) -> tuple[tuple[int, int, int], ...]:
        """Changes when a file does, also where it is replaced by renaming, as Kubernetes does with its secrets."""
        access, found = self.access, []
        for path in (*self._watched, self._tokens, access.tls_cert, access.tls_key, access.tls_ca):
            with contextlib.suppress(OSError):  # absent for a moment: it is being replaced
                if path is not None:
                    stat = path.stat()
                    found.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
        return tuple(found)

    @property
    def open(self) -> bool:
        """Whether everybody may ask."""
        return not self._asking

    @property
    def controlled(self) -> bool:
        """Whether there is a control token; without one nobody may change anything."""
        return self._control is not None

    def name_of(self, token: str | None) -> str | None:
        """The name of a token for inference; None where it is none. Every token is compared, in constant time."""
        given = hashlib.sha256((token or "").encode("utf-8", "replace")).digest()
        names = [name for digest, name in self._asking.items() if hmac.compare_digest(digest, given)]
        return names[0] if names and token else None

    def may_change(self, token: str | None) -> bool:
        given = hashlib.sha256((token or "").encode("utf-8", "replace")).digest()
        return bool(token) and self._control is not None and hmac.compare_digest(self._control, given)

    def tls_for_http(self) -> ssl.SSLContext | None:
        """A context whose new connections use the certificates in force at that moment."""
        if self.context is None:
            return None
        front = _context(self.access)
        assert front is not None

        def choose(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
            if self.context is not None:
                connection.context = self.context

        front.sni_callback = choose
        return front

    def tls_for_grpc(self) -> grpc.ServerCredentials | None:
        """Credentials whose new connections use the certificates in force at that moment."""
        if self.context is None:
            return None
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(),
            self._configuration,
            require_client_authentication=self.access.tls_ca is not None,
        )

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        cert, key, ca = self._pems
        return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=ca)


def _context(access: Access) -> ssl.SSLContext | None:
    if access.tls_cert is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(access.tls_cert, access.tls_key)
        if access.tls_ca is not None:
            context.load_verify_locations(access.tls_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (ssl.SSLError, OSError) as error:
        raise UserError(f"{access.tls_cert}: certificate and key do not fit ({error})") from None
    return context
