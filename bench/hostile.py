"""Hostile requests from a seeded generator, over gRPC and raw HTTP: damaged images, wrong tensors, garbage on the wire.

Each must be refused with an error of the 4xx class, within seconds; a damaged image that still decodes may instead be
answered, and must be where `vilu.preprocess.image.decode` reads it here.
"""

from __future__ import annotations

import asyncio
import json
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from loadgen import INFER
from tritonclient.grpc import service_pb2 as pb

from vilu.preprocess.image import ImageError, Transform, decode

PATIENCE = 5.0  # seconds; longer is a hang
# gRPC's codes that say "your request", as HTTP's 4xx do.
REFUSED = {"INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "OUT_OF_RANGE", "FAILED_PRECONDITION",
           "UNIMPLEMENTED", "PERMISSION_DENIED", "UNAUTHENTICATED"}  # fmt: skip
FLOATS = {"NaN": np.nan, "inf": np.inf, "-inf": -np.inf, "zero": 0.0}


_PARSER = "tritonserver's HTTP parser calls what it cannot read an internal error, before any code of ours"
_LINK = "tritonserver's HTTP library hangs up on it"
# What tritonserver 2.51 itself tells otherwise, by request and protocol: (codes, why). No setting changes it.
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

    bad: those that should not have, with what was told; known: those in KNOWN.
    """

    codes: Counter[tuple[str, str]] = field(default_factory=Counter)
    bad: Counter[tuple[str, str]] = field(default_factory=Counter)
    told: dict[tuple[str, str], str] = field(default_factory=dict)
    known: Counter[tuple[str, str]] = field(default_factory=Counter)

    def enter(self, attack: Attack, protocol: str, code: str, told: str) -> None:
        key = f"{attack.name}, {protocol}", code
        self.codes[key] += 1
        answered = code in ("OK", "200")
        refused = code in REFUSED or (code.isdigit() and 400 <= int(code) < 500)
        fine = refused if attack.decodes is None else answered if attack.decodes else refused
        if not fine and code in KNOWN.get(key[0], ((), ""))[0]:
            self.known[key] += 1
        elif not fine:
            self.bad[key] += 1
            self.told.setdefault(key, told[:200])

    @property
    def sent(self) -> int:
        return self.codes.total()


class Mutator:
    """Damages encoded images: cut, bits flipped, bytes overwritten, pieces spliced or repeated, lengths that lie."""

    def __init__(self, corpus: Sequence[bytes]) -> None:
        self.corpus = list(corpus)

    def one(self, draw: np.random.Generator) -> tuple[str, bytes]:
        data = bytearray(self.corpus[int(draw.integers(len(self.corpus)))])
        way = str(draw.choice(["cut", "bits", "bytes", "splice", "repeat", "length", "head"]))
        at = int(draw.integers(len(data)))
        if way == "cut":
            del data[at:]
        elif way == "bits":
            for _ in range(int(draw.integers(1, 30))):
                data[int(draw.integers(len(data)))] ^= 1 << int(draw.integers(8))
        elif way == "bytes":
            size = int(draw.integers(1, 64))
            data[at : at + size] = draw.bytes(size)
        elif way == "splice":
            other = self.corpus[int(draw.integers(len(self.corpus)))]
            data[at:] = other[int(draw.integers(len(other))) :]
        elif way == "repeat":
            piece = data[at : at + int(draw.integers(1, 512))]
            data[at:at] = piece * int(draw.integers(1, 20))
        elif way == "length":
            data[at : at + 4] = struct.pack(
                ">I" if draw.random() < 0.5 else "<I", int(draw.choice([0, 1, 1 << 31, 2**32 - 1]))
            )
        else:
            at = int(draw.integers(min(len(data), 40)))
            data[at] = int(draw.integers(256))
        return f"image, {way}", bytes(data)


def bombs() -> dict[str, bytes]:
    """Small files that would decode to much, and files over the limits."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    def png(width: int, height: int, *more: bytes) -> bytes:
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IEND", b"")

    zeros = chunk(b"IDAT", zlib.compress(bytes(4 << 20), 9))
    size = struct.pack(">HH", 65500, 65500)
    jpeg = b"\xff\xd8\xff\xc0\x00\x11\x08" + size + b"\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01"
    webp = b"VP8X\x0a\x00\x00\x00\x10\x00\x00\x00\xff\xff\xff\xff\xff\xff"
    return {
        "bomb, PNG of 30000 x 30000": png(30000, 30000, zeros),
        "bomb, PNG of 2^31 - 1": png(2**31 - 1, 2**31 - 1, zeros),
        "bomb, PNG of no pixels": png(0, 0, zeros),
        "bomb, PNG of 30000 chunks": png(8, 8, *[chunk(b"tEXt", b"a\0b")] * 30000),
        "bomb, PNG text of 64 MB": png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(64 << 20), 9))),
        "bomb, JPEG of 65500 x 65500": jpeg + b"\xff\xda\x00\x0c\x03\x01\x00\x02\x11\x03\x11\x00\x3f\x00" + bytes(2000),
        "bomb, WebP of 2^24": b"RIFF" + struct.pack("<I", 4 + len(webp)) + b"WEBP" + webp,
        "bomb, 21 MB": b"\xff\xd8\xff\xe0" + bytes(21 << 20),
        "other format, GIF": b"GIF89a\x01\0\x01\0\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;",
        "other format, SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "other format, EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "empty image": b"",
    }


SHAPES = ((), (1,), (1, 2, 3), (-1, 1), (1, -1), (1, 1 << 62), (1 << 32, 1 << 32), (3,) * 60)
Tensor = tuple[str, str, tuple[int, ...], bytes]  # name, type, shape, bytes


def strings(*words: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(word)) + word for word in words)


class Generator:
    """Endless attacks.

    Args:
        corpus: good images, to be damaged and to be sent beside what is wrong.
        transform: the server's, for telling whether a damaged image decodes.
        dim: of an embedding. most: the models' largest batch.
        guarded: what is sent through `vilu guard`: gRPC alone, good images to the models that it offers.
    """

    def __init__(
        self, corpus: Sequence[bytes], transform: Transform, dim: int, most: int, guarded: bool = False
    ) -> None:  # fmt: skip
        self.corpus, self.transform, self.dim, self.most = list(corpus), transform, dim, most
        self.http = 0 if guarded else 0.4  # the share that goes over HTTP, where it could go over both
        self.decoders = ["vilu", "vilu_open"] if guarded else ["vilu", "vilu_open", "preprocess"]
        self.mutator, self.bombs = Mutator(corpus), bombs()
        self.families: dict[str, tuple[Callable[[np.random.Generator], Attack], int]] = {
            "damaged": (self.damaged, 50),
            "bomb": (self.bomb, 4),
            "labels": (self.labels, 10),
            "embeddings": (self.embeddings, 10),
            "tensors": (self.tensors, 14),
            "parameters": (self.parameters, 6),
            "wire": (self.wire, 4),
        }
        if not guarded:
            self.families |= {"json": (self.json, 8), "http": (self.garbage, 8)}

    def attacks(self, count: int, seed: int = 0) -> Iterator[Attack]:
        draw = np.random.default_rng(seed)
        weights = np.array([weight for _, weight in self.families.values()], float)
        for name in draw.choice(list(self.families), size=count, p=weights / weights.sum()):
            yield self.families[str(name)][0](draw)

    def image(self, draw: np.random.Generator) -> bytes:
        return self.corpus[int(draw.integers(len(self.corpus)))]

    def damaged(self, draw: np.random.Generator) -> Attack:
        name, data = self.mutator.one(draw)
        return self.asked(draw, name, data)

    def bomb(self, draw: np.random.Generator) -> Attack:
        name = str(draw.choice(list(self.bombs)))
        return self.asked(draw, name, self.bombs[name])

    def asked(self, draw: np.random.Generator, name: str, data: bytes) -> Attack:
        try:
            decode(data, self.transform)
            decodes = True
        except ImageError:
            decodes = False
        model = str(draw.choice(self.decoders))
        tensors: list[Tensor] = [("IMAGE", "BYTES", (1, 1), strings(data))]
        if model == "vilu_open":
            tensors.append(("LABELS", "BYTES", (1, 2), strings(b"a cat", b"a dog")))
        return self.infer(draw, name, model, tensors, decodes=decodes)

    def infer(
        self, draw: np.random.Generator, name: str, model: str, tensors: Sequence[Tensor], decodes: bool | None = None,
        **more: Any,
    ) -> Attack:  # fmt: skip
        """The request over either protocol; over HTTP with binary tensors."""
        if draw.random() >= self.http:
            return Attack(name, message(model, tensors, **more).SerializeToString(), decodes=decodes)
        version = f"/versions/{more['model_version']}" if "model_version" in more else ""
        return Attack(name, over_binary(f"{model}{version}", tensors), True, decodes)

    def embedding(self, images: int = 1) -> Tensor:
        return "IMAGE_EMBEDDING", "FP32", (images, self.dim), np.ones((images, self.dim), np.float32).tobytes()

    def labels(self, draw: np.random.Generator) -> Attack:
        cases: dict[str, tuple[tuple[int, ...], bytes]] = {
            "labels, none": ((1, 0), b""),
            "labels, too many": ((1, 1001), strings(*(b"%d" % i for i in range(1001)))),
            "labels, far too many": ((1, 100_000), strings(*[b"x"] * 100_000)),
            "labels, long": ((1, 2), strings(b"a", draw.bytes(10).hex().encode() * 500)),
            "labels, huge": ((1, 1), strings(b"x" * (8 << 20))),
            "labels, not UTF-8": (
                (1, 2),
                strings(b"a", draw.choice([b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"a\x80"])),
            ),
            "labels, empty": ((1, 2), strings(b"a", b"  ")),
            "labels, twice": ((1, 2), strings(b"a", b"a")),
            "labels, for other images": ((2, 2), strings(b"a", b"b", b"c", b"d")),
            "labels, rank 1": ((2,), strings(b"a", b"b")),
            "labels, rank 3": ((1, 2, 1), strings(b"a", b"b")),
            "labels, lengths cut": ((1, 2), strings(b"a") + b"\x05\0"),
            "labels, fewer than told": ((1, 3), strings(b"a", b"b")),
            "labels, more than told": ((1, 1), strings(b"a", b"b")),
            "labels, no candidate is one": ((1, 1), strings(b"")),
        }
        name = str(draw.choice(list(cases)))
        shape, data = cases[name]
        first: Tensor = ("IMAGE", "BYTES", (1, 1), strings(self.image(draw)))
        model = "vilu_open"
        if draw.random() < 0.5:
            first, model = self.embedding(), "vilu_embeddings"
        return self.infer(draw, name, model, [first, ("LABELS", "BYTES", shape, data)])

    def embeddings(self, draw: np.random.Generator) -> Attack:
        case = str(draw.choice(["value", "text value", "none", "many", "width", "both", "rank", "batch", "bytes"]))
        name, told = f"embeddings, {case}", str(draw.choice(list(FLOATS)))
        rows = np.ones((1, 3, self.dim), np.float32)
        tensors: list[Tensor] = [self.embedding()]
        if case == "value":
            vector = draw.normal(size=(1, self.dim)).astype(np.float32)
            vector[:, slice(None) if told == "zero" else int(draw.integers(self.dim))] = FLOATS[told]
            return self.infer(
                draw, f"{name} {told}", "vilu_embeddings", [("IMAGE_EMBEDDING", "FP32", vector.shape, vector.tobytes())]
            )
        if case == "text value":
            rows[0, 1, slice(None) if told == "zero" else 5] = FLOATS[told]
            name = f"{name} {told}"
        elif case == "none":
            rows = rows[:, :0]
        elif case == "many":
            rows = np.ones((1, 1001, self.dim), np.float32)
        elif case == "width":
            rows = np.ones((1, 3, self.dim + int(draw.choice([-1, 1, 7]))), np.float32)
        elif case == "rank":
            rows = rows[0]
        elif case == "batch":
            rows = np.ones((3, 3, self.dim), np.float32)
        tensors.append(("TEXT_EMBEDDINGS", "FP32", rows.shape, rows.tobytes()[: -4 if case == "bytes" else None]))
        if case == "both":
            tensors.append(("LABELS", "BYTES", (1, 1), strings(b"a")))
        return self.infer(draw, name, "vilu_embeddings", tensors)

    def tensors(self, draw: np.random.Generator) -> Attack:
        """Names, shapes, types and sizes that are not the model's."""
        model, good = {
            0: ("vilu", ("IMAGE", "BYTES", (1, 1), strings(self.image(draw)))),
            1: ("vilu_embeddings", self.embedding()),
            2: ("vilu_full", self.pixels()),
            3: ("clip_image", self.pixels()),
            4: ("preprocess", ("IMAGE", "BYTES", (1, 1), strings(self.image(draw)))),
            5: ("clip_text", ("TOKENS", "INT64", (1, 77), np.full((1, 77), 1 << 40, np.int64).tobytes())),
        }[int(draw.integers(6))]  # fmt: skip
        name, kind, shape, data = good
        many = self.most + 1
        # A string that is cut within is `poison`'s: it hurts others.
        some = int(draw.integers(4 if kind == "BYTES" else len(data)))
        stranger = str(draw.choice(["absent", "../vilu", "vilu/1", "x" * 5000, "%00", "."]))
        version = str(draw.choice(["99", "-2", "x", "9" * 40]))
        other = str(draw.choice(["FP16", "BOOL", "INT8", "FP64", "BF16", "NONE", ""]))
        cases: dict[str, tuple[str, list[Tensor], dict[str, Any]]] = {
            "tensor missing": (model, [], {}),
            "tensor more": (model, [good, ("MORE", "FP32", (1, 1), bytes(4))], {}),
            "tensor twice": (model, [good, good], {}),
            "tensor's name": (model, [("image" * int(draw.integers(1, 2000)), *good[1:])], {}),
            "tensor's type": (model, [(name, other, shape, data)], {}),
            "tensor's shape": (model, [(name, kind, SHAPES[int(draw.integers(len(SHAPES)))], data)], {}),
            "no images": (model, [(name, kind, (0, *shape[1:]), b"")], {}),
            "too many images": (model, [(name, kind, (many, *shape[1:]), data * many)], {}),
            "bytes missing": (model, [(name, kind, shape, data[:some])], {}),
            "bytes more": (model, [(name, kind, shape, data + b"12345678")], {}),
            "no such model": (stranger, [good], {}),
            "no such model, NUL after the name": (f"{model}\0", [good], {}),
            "no such version": (model, [good], {"model_version": version}),
            "no such version, 1e3": (model, [good], {"model_version": "1e3"}),
        }
        if model == "clip_text":
            cases["tokens out of range"] = model, [good], {}
        case = str(draw.choice(list(cases)))
        asked, tensors, more = cases[case]
        return self.infer(draw, case, asked, tensors, **more)

    def parameters(self, draw: np.random.Generator) -> Attack:
        """Parameters of a request that name nothing, or are of another type."""
        model = str(draw.choice(["vilu", "vilu_open", "vilu_embeddings"]))
        first = self.embedding() if model == "vilu_embeddings" else (
            "IMAGE", "BYTES", (1, 1), strings(self.image(draw)))  # fmt: skip
        sent = [first, ("LABELS", "BYTES", (1, 2), strings(b"a", b"b"))] if model == "vilu_open" else [first]
        if draw.random() >= self.http:
            asked = message(model, sent)
            case = str(draw.choice(["stranger", "path", "number", "float", "unsigned", "none", "NUL", "reserved"]))
            told = asked.parameters["triton_x" if case == "reserved" else "class_set"]
            if case == "number":
                told.int64_param = 5
            elif case == "float":
                told.double_param = float("nan")
            elif case == "unsigned":
                told.uint64_param = 2**64 - 1
            elif case == "none":
                told.SetInParent()
            else:
                told.string_param = {"path": "../../etc/passwd", "NUL": "x\0y"}.get(case, "nobody" * 1000)
            return Attack(f"parameters, {case}", asked.SerializeToString())
        cases = {
            "stranger": b'"class_set":"nobody"', "number": b'"class_set":5', "null": b'"class_set":null',
            "object": b'"class_set":{"a":1}', "not UTF-8": b'"class_set":"\xff\xfe"', "other not UTF-8": b'"\xff":"a"',
            "quotes": b'"class_set":"\\"},{\\""', "surrogate": b'"class_set":"\\ud800"', "reserved": b'"triton_x":"x"',
            "priority a word": b'"priority":"x"', "timeout negative": b'"timeout":-5', "large": b'"x":1e999',
        }  # fmt: skip
        case = str(draw.choice(list(cases)))
        wire = over_binary(model, sent, b'"parameters":{' + cases[case] + b"},")
        return Attack(f"parameters, {case}", wire, True)

    def pixels(self) -> Tensor:
        size = self.transform.size
        return "PIXELS", "UINT8", (1, size, size, 3), bytes(size * size * 3)

    def wire(self, draw: np.random.Generator) -> Attack:
        """gRPC messages that are no ModelInferRequest, or a lying one."""
        good = pb.ModelInferRequest(model_name="vilu")
        good.inputs.add(name="IMAGE", datatype="BYTES", shape=[1, 1])
        whole = good.SerializeToString()
        case = int(draw.integers(6))
        if case == 0:
            # A first byte of wire type 7, which protobuf has not.
            return Attack("gRPC, garbage", b"\xff" + draw.bytes(int(draw.integers(1, 3000))))
        if case == 1:
            return Attack("gRPC, cut message", whole[: int(draw.integers(len(whole)))])
        if case == 2:
            return Attack("gRPC, nothing", b"")
        if case == 3:
            return Attack("gRPC, no contents", whole)
        if case == 4:
            good.raw_input_contents.extend([strings(b"x")] * 3)
            return Attack("gRPC, contents for no input", bytes(good.SerializeToString()))
        good.inputs[0].contents.bytes_contents.append(b"no image")
        good.parameters["timeout"].string_param = "soon"
        return Attack("gRPC, parameter of another type", bytes(good.SerializeToString()))

    def json(self, draw: np.random.Generator) -> Attack:
        """HTTP bodies in JSON that say something else."""
        bare = {"name": "IMAGE", "datatype": "BYTES", "shape": [1, 1]}
        tensor = bare | {"data": ["no image"]}
        nobody = {"shared_memory_region": "/etc/passwd", "shared_memory_byte_size": 10}
        deep = b"[" * 100_000

        def told(first: Any, **more: Any) -> bytes:
            return json.dumps({"inputs": [first], **more}).encode()

        cases: dict[str, bytes] = {
            "not JSON": b"\xff" + draw.bytes(200),
            "cut": told(tensor)[: int(draw.integers(1, 80))],
            "deep": b'{"inputs":' + deep,
            "deep and closed": b'{"inputs":' + deep + b"]" * 100_000 + b"}",
            "no object": b"[]",
            "nothing": b"",
            "inputs is a string": b'{"inputs": "IMAGE"}',
            "inputs of null": told(None),
            "shape of strings": told(tensor | {"shape": ["1", "1"]}),
            "negative shape": told(tensor | {"shape": [-1, -1]}),
            "huge shape": told(tensor | {"shape": [1 << 62, 4]}),
            "fraction in a shape": told(tensor | {"shape": [1.5, 1]}),
            "data is an object": told(tensor | {"data": {"a": 1}}),
            "data of numbers": told(tensor | {"data": [1e400, 2]}),
            "data too many": told(tensor | {"data": ["x"] * 1000}),
            "binary size negative": told(bare | {"parameters": {"binary_data_size": -5}}),
            "binary size huge": told(bare | {"parameters": {"binary_data_size": 1 << 50}}),
            "shared memory of nobody": told(bare | {"parameters": nobody}),
            "outputs of a stranger": told(tensor, outputs=[{"name": "NOBODY"}]),
            "not an image": told(tensor),
        }
        name = str(draw.choice(list(cases)))
        return Attack(f"JSON, {name}", post("/v2/models/vilu/infer", cases[name]), True)

    def garbage(self, draw: np.random.Generator) -> Attack:
        """What is hardly HTTP."""
        good = json.dumps({"inputs": []}).encode()
        path = "/v2/models/vilu/infer"
        region = json.dumps({"key": "/../../etc/passwd", "offset": 0, "byte_size": 10}).encode()
        cases: dict[str, bytes] = {
            "path of nothing": post("/" + draw.bytes(20).hex(), good),
            "path out of the tree": post("/v2/models/../../../etc/passwd/infer", good),
            "path of 100 kB": post("/" + "a" * 100_000, good),
            "method": b"DELETE " + post(path, good)[5:],
            "GET of an inference": f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
            "JSON length negative": post(path, good, {"Inference-Header-Content-Length": "-1"}),
            "JSON length beyond the body": post(path, good, {"Inference-Header-Content-Length": "99999999"}),
            "JSON length a word": post(path, good, {"Inference-Header-Content-Length": "many"}),
            "JSON length 2^64": post(path, good, {"Inference-Header-Content-Length": str(1 << 64)}),
            "encoding unknown": post(path, good, {"Content-Encoding": "br"}),
            "encoding gzip of no gzip": post(path, draw.bytes(100), {"Content-Encoding": "gzip"}),
            "encoding deflate of no deflate": post(path, draw.bytes(100), {"Content-Encoding": "deflate"}),
            "declared 8 TB": f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {1 << 43}\r\n\r\n".encode() + good,
            "declared -1": f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n".encode() + good,
            "chunks of garbage": f"POST {path} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n".encode(),
            "header of 1 MB": post(path, good, {"X-Long": "a" * (1 << 20)}),
            "10000 headers": post(path, good, {f"X-{i}": "a" for i in range(10_000)}),
            "line of garbage": draw.bytes(100).replace(b"\n", b"") + b"\r\n\r\n",
            "load a model": post("/v2/repository/models/vilu/load", b"{}"),
            "register memory": post("/v2/systemsharedmemory/region/a/register", region),
        }  # fmt: skip
        name = str(draw.choice(list(cases)))
        return Attack(f"HTTP, {name}", cases[name], True)


def poison(image: bytes, dim: int) -> list[Attack]:
    """Requests that pass tritonserver's own checks and then spoil the batch they ride in, with all who are in it."""
    cut: Tensor = ("IMAGE", "BYTES", (1, 1), strings(image)[:-1])
    row = np.ones(dim, np.float32).tobytes()
    cases: dict[str, tuple[str, Tensor]] = {
        "a string longer than its bytes": ("vilu", cut),
        "no images in a shape, and the bytes of one": ("vilu_embeddings", ("IMAGE_EMBEDDING", "FP32", (0, dim), row)),
        "2^40 images in a shape": ("vilu_embeddings", ("IMAGE_EMBEDDING", "FP32", (1 << 40, dim), row)),
    }
    return [Attack(name, message(model, [tensor]).SerializeToString()) for name, (model, tensor) in cases.items()]


def deadly(image: bytes) -> Attack:
    """One request that ends tritonserver 2.51 (mended in July 2025): it divides by the size of a string."""
    asked = message("vilu", [("IMAGE", "BYTES", (1, 1), strings(image))])
    asked.outputs.add(name="LABEL").parameters["classification"].int64_param = 1
    return Attack("a string output as classes", asked.SerializeToString())


def message(model: str, tensors: Sequence[Tensor], **more: Any) -> pb.ModelInferRequest:
    """The request for gRPC, with raw contents."""
    made = pb.ModelInferRequest(model_name=model, **more)
    for tensor, kind, shape, data in tensors:
        made.inputs.add(name=tensor, datatype=kind, shape=shape)
        made.raw_input_contents.append(data)
    return made


def over_binary(model: str, tensors: Sequence[Tensor], before: bytes = b"") -> bytes:
    """The request for HTTP, with binary tensors; before: what the JSON holds before its inputs."""
    inputs = [
        {"name": t, "datatype": k, "shape": shape, "parameters": {"binary_data_size": len(data)}}
        for t, k, shape, data in tensors
    ]
    head = b"{" + before + b'"inputs": ' + json.dumps(inputs).encode() + b"}"
    body = head + b"".join(data for *_, data in tensors)
    return post(f"/v2/models/{model}/infer", body, {"Inference-Header-Content-Length": str(len(head))})


def post(path: str, body: bytes, headers: dict[str, str] | None = None) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
    lines += [f"{key}: {value}" for key, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


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
                    code, told = await over_tcp(host, int(port), one.wire)
                else:
                    code, told = "OK", ""
                    try:
                        await call(one.wire, timeout=PATIENCE)
                    except grpc.aio.AioRpcError as error:
                        code, told = error.code().name, str(error.details())
                tally.enter(one, "HTTP" if one.http else "gRPC", code, told)

        await asyncio.gather(*(worker() for _ in range(concurrency)))
    return tally


def in_flight(log: str) -> dict[str, int]:
    """Model -> requests that a stopped server's log counts as still in flight."""
    found = re.findall(r"Model '(\w+)' \(version \d+\) has (\d+) in-flight", log)
    return {model: int(number) for model, number in found}


async def over_tcp(host: str, port: int, wire: bytes, patience: float = PATIENCE) -> tuple[str, str]:
    """(status, body) of what a server sends back to these bytes; "closed" where it hangs up, "no answer" where not."""
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), patience)
    except (OSError, asyncio.TimeoutError):
        return "no connection", ""
    reply = b""
    try:
        try:
            writer.write(wire)
            await asyncio.wait_for(writer.drain(), patience)
        except OSError:
            pass  # it may have answered before it read everything
        reply = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), patience)
        length = [line for line in reply.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        body = await asyncio.wait_for(reader.readexactly(int(length[0].split(b":")[1])), patience) if length else b""
        return reply.split(b" ", 2)[1].decode(errors="replace"), body.decode(errors="replace")
    except asyncio.TimeoutError:
        return "no answer", ""
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, IndexError, ValueError):
        return "closed", ""
    finally:
        writer.close()
