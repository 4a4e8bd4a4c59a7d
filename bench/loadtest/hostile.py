"""Hostile requests sent to a server, and what counts as a refusal.

Each must be refused with an error of the 4xx class, within seconds. A damaged image that still decodes may instead be
answered, and must be where `vilu.preprocess.image.decode` reads it here.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc
import numpy as np

from bench.loadtest.wire import INFER, PATIENCE, Tensor, message, over_tcp, pack_strings

# gRPC's codes that say "your request", as HTTP's 4xx do.
REFUSED = {"INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "OUT_OF_RANGE", "FAILED_PRECONDITION",
           "UNIMPLEMENTED", "PERMISSION_DENIED", "UNAUTHENTICATED"}  # fmt: skip
_PARSER = "tritonserver's HTTP parser calls what it cannot read an internal error, before any code of ours"
_LINK = "tritonserver's HTTP library hangs up on it"
# What tritonserver 2.51 itself answers instead, by request and protocol: (codes, why). No setting changes it.
KNOWN: dict[str, tuple[set[str], str]] = {
    f"JSON, {what}, HTTP": ({"500"}, _PARSER)
    for what in ("not JSON", "cut", "deep", "no object", "inputs is a string", "shape of strings", "negative shape",
                 "fraction in a shape", "data is an object", "data of numbers", "binary size negative")
} | {
    f"parameters, {what}, HTTP": ({"500"}, _PARSER)
    for what in ("surrogate", "priority a word", "timeout negative", "large")
} | {
    f"HTTP, {what}, HTTP": ({"closed"}, _LINK)
    for what in ("chunks of garbage", "declared -1", "header of 1 MB", "path of 100 kB")
} | {
    "HTTP, line of garbage, HTTP": ({"closed", "no answer"}, "tritonserver's HTTP library hangs up, or waits for more"),
    "HTTP, declared 8 TB, HTTP": ({"no answer", "closed"}, "it waits for the body; nothing is allocated beforehand"),
    "HTTP, encoding unknown, HTTP": ({"501"}, "HTTP's own code for it"),
    "HTTP, register memory, HTTP": ({"500"}, "shm_open refuses a name with a slash; the server calls that internal"),
    "gRPC, garbage, gRPC": ({"INTERNAL"}, "gRPC's library: no protobuf message"),
    "gRPC, cut message, gRPC": ({"INTERNAL"}, "gRPC's library: no protobuf message"),
    "tensor's shape, HTTP": ({"500"}, _PARSER),  # a negative one
    "no such model, NUL after the name, gRPC": ({"OK"}, "it reads the name up to the NUL"),
    "no such model, NUL after the name, HTTP": ({"200"}, "it reads the name up to the NUL"),
    "no such version, 1e3, gRPC": ({"OK"}, "it reads the number before the letter: version 1"),
}  # fmt: skip


@dataclass(frozen=True)
class Attack:
    """name: what is wrong; wire: a serialised ModelInferRequest, or a whole HTTP request where `http`.

    decodes: whether an answer is right, or an error is; None: an error is.
    """

    name: str
    wire: bytes
    http: bool = False
    decodes: bool | None = None


@dataclass
class Tally:
    """What came back: (attack's name, code) -> number.

    bad: those that should not have, with the first message; known: those in KNOWN.
    """

    codes: Counter[tuple[str, str]] = field(default_factory=Counter)
    bad: Counter[tuple[str, str]] = field(default_factory=Counter)
    messages: dict[tuple[str, str], str] = field(default_factory=dict)
    known: Counter[tuple[str, str]] = field(default_factory=Counter)

    def enter(self, attack: Attack, protocol: str, code: str, message: str) -> None:
        key = f"{attack.name}, {protocol}", code
        self.codes[key] += 1
        answered = code in ("OK", "200")
        refused = code in REFUSED or (code.isdigit() and 400 <= int(code) < 500)
        fine = refused if attack.decodes is None else answered if attack.decodes else refused
        if not fine and code in KNOWN.get(key[0], ((), ""))[0]:
            self.known[key] += 1
        elif not fine:
            self.bad[key] += 1
            self.messages.setdefault(key, message[:200])

    @property
    def sent(self) -> int:
        return self.codes.total()


def poison(image: bytes, dim: int) -> list[Attack]:
    """Requests that pass tritonserver's own checks and then spoil the batch they ride in, with all who are in it."""
    cut: Tensor = ("IMAGE", "BYTES", (1, 1), pack_strings(image)[:-1])
    row = np.ones(dim, np.float32).tobytes()
    cases: dict[str, tuple[str, Tensor]] = {
        "a string longer than its bytes": ("vilu", cut),
        "no images in a shape, and the bytes of one": ("vilu_embeddings", ("IMAGE_EMBEDDING", "FP32", (0, dim), row)),
        "2^40 images in a shape": ("vilu_embeddings", ("IMAGE_EMBEDDING", "FP32", (1 << 40, dim), row)),
    }
    return [Attack(name, message(model, [tensor]).SerializeToString()) for name, (model, tensor) in cases.items()]


def deadly(image: bytes) -> Attack:
    """One request that ends tritonserver 2.51 (mended in July 2025): it divides by the size of a string."""
    asked = message("vilu", [("IMAGE", "BYTES", (1, 1), pack_strings(image))])
    asked.outputs.add(name="LABEL").parameters["classification"].int64_param = 1
    return Attack("a string output as classes", asked.SerializeToString())


async def attack(grpc_url: str, http_url: str, attacks: Iterator[Attack], concurrency: int = 4) -> Tally:
    """Send them all; what came back."""
    tally = Tally()
    host, _, port = http_url.removeprefix("http://").rpartition(":")
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(grpc_url, options=options) as channel:
        call = channel.unary_unary(INFER)

        async def worker() -> None:
            for one in attacks:
                if one.http:
                    code, text = await over_tcp(host, int(port), one.wire)
                else:
                    code, text = "OK", ""
                    try:
                        await call(one.wire, timeout=PATIENCE)
                    except grpc.aio.AioRpcError as error:
                        code, text = error.code().name, str(error.details())
                tally.enter(one, "HTTP" if one.http else "gRPC", code, text)

        await asyncio.gather(*(worker() for _ in range(concurrency)))
    return tally


def in_flight(log: str) -> dict[str, int]:
    """Model -> requests that a stopped server's log counts as still in flight."""
    found = re.findall(r"Model '(\w+)' \(version \d+\) has (\d+) in-flight", log)
    return {model: int(number) for model, number in found}
