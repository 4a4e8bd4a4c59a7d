"""What a request must look like to be let through to tritonserver.

tritonserver trusts its clients in ways that no setting changes: a request that asks for a string output as classes ends
it (2.51; mended in July 2025), a batch dimension of 0 or a string longer than its bytes fails the whole batch it rides
in (every version), and all models can be asked, those inside an ensemble, too. So a request is read, held against the
model's own configuration, and only then sent on, byte for byte.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import Any

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

from vilu.serving.answers import OUTLIER, STAGE
from vilu.serving.door.refused import NOT_FOUND, Refused

# What people ask; the models within the ensembles are not among them.
MODELS = (
    "vilu", "vilu_open", "vilu_cascade", "vilu_cascade_open", "vilu_embeddings", "vilu_text", "vilu_full", "class_sets",
)  # fmt: skip
STAGE_TEXT = re.compile(
    r"stage(?:[2-9]|[1-9][0-9])_vilu_text"
)  # who puts a class set has its names embedded by every stage
# Bytes of an element, and the field of typed contents (where a client sends no raw ones).
BYTES_OF = {"BOOL": 1, "UINT8": 1, "INT8": 1, "UINT16": 2, "INT16": 2, "FP16": 2, "INT32": 4, "UINT32": 4, "FP32": 4,
            "INT64": 8, "UINT64": 8, "FP64": 8}  # fmt: skip
CONTENTS = {"BOOL": "bool", "UINT8": "uint", "UINT16": "uint", "UINT32": "uint", "INT8": "int", "INT16": "int",
            "INT32": "int", "UINT64": "uint64", "INT64": "int64", "FP32": "fp32", "FP64": "fp64",
            "BYTES": "bytes"}  # fmt: skip
MOST_ELEMENTS = 1 << 26  # of one tensor; also keeps every product of dimensions small
MOST_STRINGS = 200_000  # of one tensor: 100 images with 1,000 labels each, and as many again
LONGEST_NAME = 256  # bytes of a request's id and of what it names


def check(request: pb.ModelInferRequest, raw: Sequence[bytes | memoryview], model: Mapping[str, Any]) -> None:
    """Let only what the model can take pass, whatever else is in the batch.

    Args:
        request, raw: what `parsed_question` returned.
        model: what `tensors` made of the asked model's configuration.

    Raises:
        Refused: what is wrong with the request, in one line.
    """
    if len(request.id.encode()) > LONGEST_NAME or "\0" in request.id:
        raise Refused(f"the request's id is longer than {LONGEST_NAME} bytes or holds a NUL")
    if "class_set" in request.parameters and "CLASS_SET" not in model["outputs"]:
        raise Refused("class_set: this model has the exported classes alone")
    _parameters(request.parameters)
    _inputs(request, raw, model)
    asked = [output.name for output in request.outputs]
    for output in request.outputs:
        if output.name not in model["outputs"]:
            raise Refused(f"there is no output {output.name[:64]!r}{_why(output.name, model['outputs'])}")
        if output.parameters:
            raise Refused(f"output {output.name}: parameters (classes, shared memory) are not taken here")
    if len(set(asked)) < len(asked):
        raise Refused("an output is asked for twice")


def _why(name: str, outputs: Collection[str]) -> str:
    """Why a model with these outputs lacks this one, for an output that other exports have; else nothing."""
    if name in STAGE:
        return ": the model is no cascade; where the server has one, it is vilu_cascade"
    if name in ("IMAGE_EMBEDDING", OUTLIER) and "STAGE" in outputs:
        return ": a cascade gives none, since those of two CLIPs cannot be compared"
    if name == OUTLIER and "LABEL" in outputs:
        return ": the exported checkpoint has no outlier score"
    return ""


def parsed(kind: Any, data: bytes) -> Any:
    """A message of gRPC. Raises Refused where the bytes are none."""
    try:
        return kind.FromString(data)
    except DecodeError:
        raise Refused(f"not a {kind.DESCRIPTOR.name}") from None


RAW_TAG = 7 << 3 | 2  # of ModelInferRequest.raw_input_contents on the wire


def parsed_question(data: bytes) -> tuple[pb.ModelInferRequest, list[memoryview]]:
    """A question without its tensors' bytes, and those as views into `data`: a large image is not copied to be checked.

    Raises:
        Refused: not a ModelInferRequest.
    """
    view, at, rest, raw = memoryview(data), 0, [], []
    try:
        while at < len(data):
            start = at
            tag, at = _varint(data, at)
            kind = tag & 7
            if kind == 2:
                length, at = _varint(data, at)
                at += length
                if tag == RAW_TAG:
                    if at > len(data):
                        raise IndexError
                    raw.append(view[at - length : at])
                    continue
            elif kind == 0:
                _, at = _varint(data, at)
            else:
                at += {1: 8, 5: 4}[kind]
            rest.append(view[start:at])
        if at != len(data):
            raise IndexError
    except (IndexError, KeyError):
        raise Refused("not a ModelInferRequest") from None
    return parsed(pb.ModelInferRequest, b"".join(rest)), raw


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise IndexError


def named(request: Any) -> str:
    """The model a request names. Raises Refused: none that may be asked, or a version that is no number."""
    name = request.model_name if hasattr(request, "model_name") else request.name
    version = request.model_version if hasattr(request, "model_version") else request.version
    if name not in MODELS and not STAGE_TEXT.fullmatch(name):
        raise Refused(f"there is no model {name[:64]!r} here", NOT_FOUND)
    if version and not (version.isascii() and version.isdecimal() and len(version) <= 9):
        raise Refused(f"a version is a number, not {version[:64]!r}")
    return str(name)


def _parameters(parameters: Mapping[str, Any]) -> None:
    for key, value in parameters.items():
        kind = value.WhichOneof("parameter_choice")
        if key == "class_set" and kind == "string_param":
            if len(value.string_param) > LONGEST_NAME or "\0" in value.string_param:
                raise Refused("class_set: not a name")
        elif key == "timeout" and kind == "int64_param":
            if value.int64_param < 0:
                raise Refused("timeout: microseconds, not below 0")
        else:
            raise Refused(f"parameter {key[:64]!r}: only class_set (a string) and timeout (an int64) are taken here")


def _inputs(request: pb.ModelInferRequest, raw: Sequence[bytes | memoryview], model: Mapping[str, Any]) -> None:
    given = [tensor.name for tensor in request.inputs]
    if len(set(given)) < len(given):
        raise Refused("an input is there twice")
    missing = [name for name, (*_, optional) in model["inputs"].items() if not optional and name not in given]
    if missing:
        raise Refused(f"input {missing[0]} is missing")
    if raw and len(raw) != len(given):
        raise Refused(f"{len(given)} inputs, but the contents of {len(raw)}")
    images = set()
    for i, tensor in enumerate(request.inputs):
        if tensor.name not in model["inputs"]:
            raise Refused(f"there is no input {tensor.name[:64]!r}")
        if tensor.parameters:
            raise Refused(f"input {tensor.name}: parameters (shared memory) are not taken here")
        kind, dims, _ = model["inputs"][tensor.name]
        if tensor.datatype != kind:
            raise Refused(f"input {tensor.name}: {kind} is wanted, not {tensor.datatype[:64]!r}")
        shape = list(tensor.shape)
        if model["batch"]:
            dims = [-1, *dims]
            if shape and not 1 <= shape[0] <= model["batch"]:
                raise Refused(f"input {tensor.name}: 1 to {model['batch']} rows are taken, not {shape[0]}")
            images.update(shape[:1])
        if len(shape) != len(dims) or not all(n >= 1 and d in (-1, n) for n, d in zip(shape, dims, strict=True)):
            raise Refused(f"input {tensor.name}: shape {shape[:8]} is not {dims} (-1: any, but not none)")
        elements = prod(shape)
        if elements > MOST_ELEMENTS:
            raise Refused(f"input {tensor.name}: more than {MOST_ELEMENTS} elements")
        typed = {field.name: len(values) for field, values in tensor.contents.ListFields()}
        if raw:
            if typed:
                raise Refused(f"input {tensor.name}: raw contents and typed ones")
            _raw(tensor, elements, raw[i])
        elif typed != {f"{CONTENTS.get(kind)}_contents": elements}:
            raise Refused(f"input {tensor.name}: its contents are not {elements} values of {kind}")
    if len(images) > 1:
        raise Refused("the inputs have different numbers of rows")


def _raw(tensor: Any, elements: int, data: bytes | memoryview) -> None:
    """Refuse raw contents that are not so many elements."""
    if tensor.datatype != "BYTES":
        if len(data) != elements * BYTES_OF[tensor.datatype]:
            raise Refused(f"input {tensor.name}: {len(data)} bytes are not {elements} values of {tensor.datatype}")
        return
    if elements > MOST_STRINGS:
        raise Refused(f"input {tensor.name}: more than {MOST_STRINGS} strings")
    at = 0
    for _ in range(elements):
        if at + 4 > len(data):
            break
        at += 4 + struct.unpack_from("<I", data, at)[0]
    else:
        if at == len(data):
            return
    raise Refused(f"input {tensor.name}: its bytes are not {elements} whole strings")


def tensors(config: Any) -> dict[str, Any]:
    """What is needed of a ModelConfig: batch (0: none), inputs -> (type, dims, optional), outputs, parameters."""
    kind = type(config).DESCRIPTOR.fields_by_name["input"].message_type.fields_by_name["data_type"].enum_type
    short = {number: value.name.removeprefix("TYPE_") for number, value in kind.values_by_number.items()}
    inputs = {
        one.name: ("BYTES" if short[one.data_type] == "STRING" else short[one.data_type], list(one.dims), one.optional)
        for one in config.input
    }
    return {
        "batch": config.max_batch_size,
        "inputs": inputs,
        "outputs": {one.name for one in config.output},
        "parameters": {name: value.string_value for name, value in config.parameters.items()},
    }
