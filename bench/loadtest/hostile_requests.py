"""Hostile requests from a seeded generator: damaged images, wrong tensors, and bytes that are hardly gRPC or HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from bench.loadtest.damaged_images import Mutator, bombs
from bench.loadtest.hostile import Attack
from bench.loadtest.wire import Tensor, message, over_binary, pack_strings, post
from vilu.preprocess.image import ImageError, Transform, decode

FLOATS = {"NaN": np.nan, "inf": np.inf, "-inf": -np.inf, "zero": 0.0}
SHAPES = ((), (1,), (1, 2, 3), (-1, 1), (1, -1), (1, 1 << 62), (1 << 32, 1 << 32), (3,) * 60)


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
        tensors: list[Tensor] = [("IMAGE", "BYTES", (1, 1), pack_strings(data))]
        if model == "vilu_open":
            tensors.append(("LABELS", "BYTES", (1, 2), pack_strings(b"a cat", b"a dog")))
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
            "labels, too many": ((1, 1001), pack_strings(*(b"%d" % i for i in range(1001)))),
            "labels, far too many": ((1, 100_000), pack_strings(*[b"x"] * 100_000)),
            "labels, long": ((1, 2), pack_strings(b"a", draw.bytes(10).hex().encode() * 500)),
            "labels, huge": ((1, 1), pack_strings(b"x" * (8 << 20))),
            "labels, not UTF-8": (
                (1, 2),
                pack_strings(b"a", draw.choice([b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"a\x80"])),
            ),
            "labels, empty": ((1, 2), pack_strings(b"a", b"  ")),
            "labels, twice": ((1, 2), pack_strings(b"a", b"a")),
            "labels, one alone": ((1, 1), pack_strings(b"a")),
            "labels, for other images": ((2, 2), pack_strings(b"a", b"b", b"c", b"d")),
            "labels, rank 1": ((2,), pack_strings(b"a", b"b")),
            "labels, rank 3": ((1, 2, 1), pack_strings(b"a", b"b")),
            "labels, lengths cut": ((1, 2), pack_strings(b"a") + b"\x05\0"),
            "labels, fewer than declared": ((1, 3), pack_strings(b"a", b"b")),
            "labels, more than declared": ((1, 1), pack_strings(b"a", b"b")),
            "labels, no candidate is one": ((1, 1), pack_strings(b"")),
        }
        name = str(draw.choice(list(cases)))
        shape, data = cases[name]
        first: Tensor = ("IMAGE", "BYTES", (1, 1), pack_strings(self.image(draw)))
        model = "vilu_open"
        if draw.random() < 0.5:
            first, model = self.embedding(), "vilu_embeddings"
        return self.infer(draw, name, model, [first, ("LABELS", "BYTES", shape, data)])

    def embeddings(self, draw: np.random.Generator) -> Attack:
        case = str(draw.choice(["value", "text value", "none", "many", "width", "both", "rank", "batch", "bytes"]))
        name, value = f"embeddings, {case}", str(draw.choice(list(FLOATS)))
        rows = np.ones((1, 3, self.dim), np.float32)
        tensors: list[Tensor] = [self.embedding()]
        if case == "value":
            vector = draw.normal(size=(1, self.dim)).astype(np.float32)
            vector[:, slice(None) if value == "zero" else int(draw.integers(self.dim))] = FLOATS[value]
            return self.infer(
                draw,
                f"{name} {value}",
                "vilu_embeddings",
                [("IMAGE_EMBEDDING", "FP32", vector.shape, vector.tobytes())],
            )
        if case == "text value":
            rows[0, 1, slice(None) if value == "zero" else 5] = FLOATS[value]
            name = f"{name} {value}"
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
            tensors.append(("LABELS", "BYTES", (1, 1), pack_strings(b"a")))
        return self.infer(draw, name, "vilu_embeddings", tensors)

    def tensors(self, draw: np.random.Generator) -> Attack:
        """Names, shapes, types and sizes that are not the model's."""
        model, good = {
            0: ("vilu", ("IMAGE", "BYTES", (1, 1), pack_strings(self.image(draw)))),
            1: ("vilu_embeddings", self.embedding()),
            2: ("vilu_full", self.pixels()),
            3: ("clip_image", self.pixels()),
            4: ("preprocess", ("IMAGE", "BYTES", (1, 1), pack_strings(self.image(draw)))),
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
            "IMAGE", "BYTES", (1, 1), pack_strings(self.image(draw)))  # fmt: skip
        sent = [first, ("LABELS", "BYTES", (1, 2), pack_strings(b"a", b"b"))] if model == "vilu_open" else [first]
        if draw.random() >= self.http:
            asked = message(model, sent)
            case = str(draw.choice(["stranger", "path", "number", "float", "unsigned", "none", "NUL", "reserved"]))
            parameter = asked.parameters["triton_x" if case == "reserved" else "class_set"]
            if case == "number":
                parameter.int64_param = 5
            elif case == "float":
                parameter.double_param = float("nan")
            elif case == "unsigned":
                parameter.uint64_param = 2**64 - 1
            elif case == "none":
                parameter.SetInParent()
            else:
                parameter.string_param = {"path": "../../etc/passwd", "NUL": "x\0y"}.get(case, "nobody" * 1000)
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
            good.raw_input_contents.extend([pack_strings(b"x")] * 3)
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

        def body(first: Any, **more: Any) -> bytes:
            return json.dumps({"inputs": [first], **more}).encode()

        cases: dict[str, bytes] = {
            "not JSON": b"\xff" + draw.bytes(200),
            "cut": body(tensor)[: int(draw.integers(1, 80))],
            "deep": b'{"inputs":' + deep,
            "deep and closed": b'{"inputs":' + deep + b"]" * 100_000 + b"}",
            "no object": b"[]",
            "nothing": b"",
            "inputs is a string": b'{"inputs": "IMAGE"}',
            "inputs of null": body(None),
            "shape of strings": body(tensor | {"shape": ["1", "1"]}),
            "negative shape": body(tensor | {"shape": [-1, -1]}),
            "huge shape": body(tensor | {"shape": [1 << 62, 4]}),
            "fraction in a shape": body(tensor | {"shape": [1.5, 1]}),
            "data is an object": body(tensor | {"data": {"a": 1}}),
            "data of numbers": body(tensor | {"data": [1e400, 2]}),
            "data too many": body(tensor | {"data": ["x"] * 1000}),
            "binary size negative": body(bare | {"parameters": {"binary_data_size": -5}}),
            "binary size huge": body(bare | {"parameters": {"binary_data_size": 1 << 50}}),
            "shared memory of nobody": body(bare | {"parameters": nobody}),
            "outputs of a stranger": body(tensor, outputs=[{"name": "NOBODY"}]),
            "not an image": body(tensor),
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
