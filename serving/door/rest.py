"""KServe v2's REST messages, made into the messages of gRPC and back: JSON, with tensors in it or as bytes after it.

A string of the tensor IMAGE in JSON is base64 or a data URL; any other string is text.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from tritonclient.grpc import InferResult
from tritonclient.grpc import service_pb2 as pb

from vilu.serving.door.refused import MALFORMED, Refused

IMAGE = "IMAGE"
NUMPY = {"BOOL": "?", "UINT8": "u1", "INT8": "i1", "UINT16": "<u2", "INT16": "<i2", "FP16": "<f2", "INT32": "<i4",
         "UINT32": "<u4", "FP32": "<f4", "INT64": "<i8", "UINT64": "<u8", "FP64": "<f8"}  # fmt: skip
MOST_VALUES = 1 << 22  # of a tensor in JSON, and of all its nesting


def packed(strings: Sequence[bytes]) -> bytes:
    """Triton's layout of BYTES: every string after its length, 4 bytes little endian.

    Example:
        >>> packed([b"a", b"bc"])
        b'\\x01\\x00\\x00\\x00a\\x02\\x00\\x00\\x00bc'
    """
    return b"".join(part for string in strings for part in (struct.pack("<I", len(string)), string))


def image_question(
    model: str, image: bytes, outputs: Sequence[str], labels: Sequence[bytes] = (), class_set: str | None = None
) -> tuple[pb.ModelInferRequest, list[bytes]]:
    """A question about one encoded image, without its tensors' bytes, and those."""
    request = pb.ModelInferRequest(model_name=model)
    request.inputs.add(name=IMAGE, datatype="BYTES", shape=[1, 1])
    raw = [packed([image])]
    if labels:
        request.inputs.add(name="LABELS", datatype="BYTES", shape=[1, len(labels)])
        raw.append(packed(labels))
    if class_set is not None:
        request.parameters["class_set"].string_param = class_set
    for name in outputs:
        request.outputs.add(name=name)
    return request, raw


def read_request(
    model: str, version: str, body: bytes, header_length: int | None
) -> tuple[pb.ModelInferRequest, list[bytes], set[str] | None]:
    """A body of POST /v2/models/MODEL/infer.

    Args:
        header_length: bytes of the JSON, where tensors' bytes follow it; 0: the body is the one image.

    Returns:
        (the request without its tensors' bytes, those, names of the outputs that are wanted as bytes; None: all of
        them).

    Raises:
        Refused: what is wrong with it.
    """
    if header_length == 0:
        request, raw = image_question(model, body, ())
        request.model_version = version
        return request, raw, set()
    if header_length is not None and not 0 < header_length <= len(body):
        raise Refused("Inference-Header-Content-Length is not a length within the body")
    try:
        given = json.loads(body if header_length is None else body[:header_length])
    except (ValueError, RecursionError):
        raise Refused("the body is not JSON (an image alone goes to /ask)") from None
    rest = memoryview(body)[len(body) if header_length is None else header_length :]
    request = pb.ModelInferRequest(model_name=model, model_version=version)
    raw = []
    at = 0
    parameters = dict(_object(_object(given, "the body").get("parameters", {}), "parameters"))
    all_binary = parameters.pop("binary_data_output", False) is True
    _set_parameters(request.parameters, parameters)
    request.id = _text(given.get("id", ""), "id")
    for tensor in _objects(given.get("inputs"), "inputs"):
        name, kind = _text(tensor.get("name"), "an input's name"), _text(tensor.get("datatype"), "datatype")
        shape = tensor.get("shape")
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in shape):
            raise Refused(f"input {name[:64]}: shape must be a list of whole numbers")
        more = dict(_object(tensor.get("parameters", {}), "an input's parameters"))
        size = more.pop("binary_data_size", None)
        more.pop("content_type", None)
        added = request.inputs.add(name=name, datatype=kind, shape=shape)
        _set_parameters(added.parameters, more)
        if size is None:
            raw.append(_values(name, kind, tensor.get("data")))
            continue
        if type(size) is not int or not 0 <= size <= len(rest) - at:
            raise Refused(f"input {name[:64]}: binary_data_size is not a length within the body")
        raw.append(bytes(rest[at : at + size]))
        at += size
    if at != len(rest):
        raise Refused(f"{len(rest) - at} bytes follow the inputs' own")
    binary: set[str] | None = None if all_binary else set()
    for output in _objects(given.get("outputs", []), "outputs"):
        name = _text(output.get("name"), "an output's name")
        more = dict(_object(output.get("parameters", {}), "an output's parameters"))
        if more.pop("binary_data", False) is True and binary is not None:
            binary.add(name)
        _set_parameters(request.outputs.add(name=name).parameters, more)
    return request, raw, binary


def write_reply(reply: pb.ModelInferResponse, binary: set[str] | None) -> tuple[bytes, int | None]:
    """The body of an answer, and the bytes of its JSON where tensors' bytes follow it."""
    result, tail, outputs = InferResult(reply), [], []
    for i, output in enumerate(reply.outputs):
        described: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": list(output.shape)}
        if binary is None or output.name in binary:
            data = reply.raw_output_contents[i]
            described["parameters"] = {"binary_data_size": len(data)}
            tail.append(data)
        else:
            described["data"] = plain(result.as_numpy(output.name)).ravel().tolist()
        outputs.append(described)
    said: dict[str, Any] = {"model_name": reply.model_name, "model_version": reply.model_version, "outputs": outputs}
    if reply.id:
        said["id"] = reply.id
    text = json.dumps(said).encode()
    return (text + b"".join(tail), len(text)) if tail else (text, None)


def read_generate(
    model: str, version: str, body: bytes, config: Mapping[str, Any]
) -> tuple[pb.ModelInferRequest, list[bytes]]:
    """A body of POST /v2/models/MODEL/generate (tritonserver's generate extension): a flat JSON object.

    A field with an input's name is that input: a value, or a list of them. `id` is the request's. Any other field is a
    parameter.

    Args:
        config: what `check.tensors` made of the model's configuration.

    Returns:
        (the request without its tensors' bytes, those).

    Raises:
        Refused: what is wrong with it.
    """
    try:
        given = _object(json.loads(body), "the body")
    except (ValueError, RecursionError):
        raise Refused("the body is not JSON") from None
    request = pb.ModelInferRequest(model_name=model, model_version=version, id=_text(given.pop("id", ""), "id"))
    raw = []
    for name, (kind, dims, _) in config["inputs"].items():
        if name not in given:
            continue
        flat = _flat(name, given.pop(name))
        known = prod(n for n in dims if n > 0)
        if len(flat) % known or dims.count(-1) > 1:
            raise Refused(f"input {name}: {len(flat)} values do not fill the shape {list(dims)}")
        shape = [len(flat) // known if n == -1 else n for n in dims]
        if config["batch"]:
            shape.insert(0, 1 if -1 in dims else len(flat) // known)
        request.inputs.add(name=name, datatype=kind, shape=shape)
        raw.append(_values(name, kind, flat))
    _set_parameters(request.parameters, given)
    return request, raw


def write_generated(reply: pb.ModelInferResponse) -> dict[str, Any]:
    """An answer as a flat object: values, or lists of them, without dimensions of one."""
    result = InferResult(reply)
    found: dict[str, Any] = {"model_name": reply.model_name, "model_version": reply.model_version}
    if reply.id:
        found["id"] = reply.id
    for output in reply.outputs:
        found[output.name] = plain(result.as_numpy(output.name)).squeeze().tolist()
    return found


def plain(values: np.ndarray) -> np.ndarray:
    """Values as JSON can hold them: bytes as text, and no number that is none."""
    if values.dtype == object:
        texts = [
            value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in values.ravel()
        ]
        return np.array(texts, dtype=object).reshape(values.shape)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        finite = values.astype(object)
        finite[~np.isfinite(values)] = None
        return finite
    return values


def image_bytes(text: str) -> bytes:
    """The bytes of an image that stands in JSON: base64 or a data URL. Raises Refused."""
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise Refused("a data URL must be data:...;base64,...")
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise Refused("an image in JSON must be base64 or a data URL") from None


def _flat(name: str, data: Any) -> list[Any]:
    """The values of nested lists, in order. Raises Refused where they are too many."""
    flat: list[Any] = []
    stack = [data]
    while stack:
        value = stack.pop()
        if isinstance(value, list):
            stack.extend(reversed(value))
        else:
            flat.append(value)
        if len(flat) + len(stack) > MOST_VALUES:
            raise Refused(f"input {name[:64]}: too many values for JSON")
    return flat


def _values(name: str, kind: str, data: Any) -> bytes:
    flat = _flat(name, data)
    if data is None:
        raise Refused(f"input {name[:64]}: has neither data nor binary_data_size")
    if kind == "BYTES":
        if not all(isinstance(value, str) for value in flat):
            raise Refused(f"input {name[:64]}: its data must be strings")
        if name == IMAGE:
            return packed([image_bytes(value) for value in flat])
        try:
            return packed([value.encode() for value in flat])
        except UnicodeEncodeError:
            raise Refused(f"input {name[:64]}: a string is not UTF-8") from None
    if kind not in NUMPY:
        raise Refused(f"input {name[:64]}: there is no datatype {kind[:64]!r}")
    if not all(isinstance(value, bool) if kind == "BOOL" else type(value) in (int, float) for value in flat):
        raise Refused(f"input {name[:64]}: its data must be {'true or false' if kind == 'BOOL' else 'numbers'}")
    if NUMPY[kind][-2] in "iu" and not all(type(value) is int for value in flat):
        raise Refused(f"input {name[:64]}: its data must be whole numbers")
    try:
        with np.errstate(over="ignore"):
            return np.array(flat, dtype=NUMPY[kind]).tobytes()
    except (OverflowError, ValueError):
        raise Refused(f"input {name[:64]}: a number is too large for {kind}") from None


def _set_parameters(parameters: Any, given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        if isinstance(value, bool):
            parameters[key].bool_param = value
        elif isinstance(value, int) and -(1 << 63) <= value < 1 << 63:
            parameters[key].int64_param = value
        elif isinstance(value, float):
            parameters[key].double_param = value
        elif isinstance(value, str):
            parameters[key].string_param = _text(value, key)
        else:
            raise Refused(f"parameter {key[:64]!r}: must be a string, a number, true or false")


def _text(value: Any, what: str) -> str:
    try:
        if isinstance(value, str):
            value.encode()
            return value
    except UnicodeEncodeError:
        pass
    raise Refused(f"{what} must be text", MALFORMED)


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refused(f"{what} must be a JSON object")
    for key in value:
        _text(key, "a name")
    return value


def _objects(value: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise Refused(f"{what} must be a list")
    return [_object(one, f"each of {what}") for one in value]
