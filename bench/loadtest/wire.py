"""Requests as bytes, for gRPC and for raw HTTP: also those that no client library would make."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Sequence
from typing import Any

from tritonclient.grpc import service_pb2 as pb

SERVICE = "/inference.GRPCInferenceService"
INFER, STREAM = f"{SERVICE}/ModelInfer", f"{SERVICE}/ModelStreamInfer"
PATIENCE = 5.0  # seconds; longer is a hang
Tensor = tuple[str, str, tuple[int, ...], bytes]  # name, type, shape, bytes


def pack_strings(*words: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(word)) + word for word in words)


def unpack_strings(value: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(value):
        size = int.from_bytes(value[at : at + 4], "little")
        found.append(value[at + 4 : at + 4 + size])
        at += 4 + size
    return found


def message(model: str, tensors: Sequence[Tensor], outputs: Sequence[str] = (), **more: Any) -> pb.ModelInferRequest:
    """The request for gRPC, with raw contents; more: other fields of it."""
    made = pb.ModelInferRequest(model_name=model, **more)
    for tensor, kind, shape, data in tensors:
        made.inputs.add(name=tensor, datatype=kind, shape=shape)
        made.raw_input_contents.append(data)
    for name in outputs:
        made.outputs.add(name=name)
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
