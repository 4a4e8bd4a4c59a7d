"""Who may ask tritonserver what: tokens, TLS, and the protocols that are closed to everybody.

tritonserver can restrict each of its protocols by one header. What runs or changes the server (loading models, trace
and log settings, shared memory from other machines) is therefore always closed by a secret: the operator's, or a random
one that nobody knows.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from vilu.errors import UserError
from vilu.serving.address import is_loopback
from vilu.serving.tokens import CONTROL, TOKEN, check_secret


@dataclass(frozen=True)
class Access:
    """Who may ask a server.

    Attributes:
        token: every inference must carry it. None: everybody may ask.
        control_token: opens loading and unloading of models. None: nobody may.
        tls_cert, tls_key: PEM files; gRPC then speaks TLS only, and HTTP stays on loopback, as tritonserver's HTTP has
            no TLS.
        tls_ca: PEM file; clients must show a certificate that it signed.

    Raises:
        UserError: a token that is short, equal to the other or unfit for a header; half a pair of TLS files, or an
            unreadable one.

    Example:
        >>> Access(token="0123456789abcdef").flags("127.0.0.1")[1]
        '--grpc-restricted-protocol=inference,shared-memory:vilu-token=0123456789abcdef'
    """

    token: str | None = None
    control_token: str | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None

    def __post_init__(self) -> None:
        for name in ("token", "control_token"):
            value = getattr(self, name)
            if value is not None:
                check_secret(value, name.replace("_", " "))
        if self.token is not None and self.token == self.control_token:
            raise UserError("control token: must not be the one for inference")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UserError("TLS needs both a certificate and its key")
        if self.tls_ca is not None and self.tls_cert is None:
            raise UserError("TLS: client certificates can be asked for only with a certificate of the server's own")
        for path in (self.tls_cert, self.tls_key, self.tls_ca):
            if path is not None:
                try:
                    text = path.read_bytes()
                except OSError as error:
                    raise UserError(f"{path}: cannot be read ({error.strerror})") from None
                if b"-----BEGIN " not in text:
                    raise UserError(f"{path}: not a PEM file")

    def http_host(self, host: str) -> str:
        """Where HTTP listens when gRPC listens on `host`."""
        return host if self.tls_cert is None else "127.0.0.1"

    def flags(self, host: str) -> list[str]:
        """tritonserver's flags; the tokens stand in its command line, which users of this machine can read."""
        closed = ["model-repository", "trace", "logging"]
        asked = []
        if self.token is not None:
            asked += ["inference", "shared-memory"]
        elif not is_loopback(host):
            closed.append("shared-memory")  # it names memory of this machine
        control = self.control_token or secrets.token_urlsafe(32)
        flags = []
        for protocol in ("grpc-restricted-protocol", "http-restricted-api"):
            flags.append(f"--{protocol}={','.join(closed)}:{CONTROL}={control}")
            if asked:
                flags.append(f"--{protocol}={','.join(asked)}:{TOKEN}={self.token}")
        if self.control_token is not None:
            flags += ["--model-control-mode=explicit", "--load-model=*"]
        if self.tls_cert is not None:
            kind = "--grpc-use-ssl-mutual=true" if self.tls_ca else "--grpc-use-ssl=true"
            flags += [kind, f"--grpc-server-cert={self.tls_cert}", f"--grpc-server-key={self.tls_key}"]
            if self.tls_ca:
                flags.append(f"--grpc-root-cert={self.tls_ca}")
        return flags
