"""The OpenAPI description of the door's HTTP, and a page that shows it without a script."""

from __future__ import annotations

from html import escape
from typing import Any

from vilu import __version__
from vilu.serving.door.check import MODELS
from vilu.serving.door.limits import Limits
from vilu.serving.door.uploads import FLAGS

Json = dict[str, Any]
IMAGE_TYPES = ("image/jpeg", "image/png", "image/webp")
_NUMBER, _TEXT, _BOOL = {"type": "number"}, {"type": "string"}, {"type": "boolean"}
_PAIRS: Json = {
    name: {
        "type": "array",
        "items": {"type": "object", "required": ["label", number], "properties": {"label": _TEXT, number: _NUMBER}},
    }
    for name, number in (("top", "probability"), ("concepts", "weight"))
}
ANSWER: Json = {
    "type": "object",
    "required": ["label", "class_index", "confidence", "failure_probability", "accept"],
    "properties": {
        "label": _TEXT | {"description": "The class that CLIP chose."},
        "class_index": {"type": "integer"},
        "confidence": _NUMBER | {"description": "CLIP's softmax probability of the label, in [0, 1]."},
        "failure_probability": _NUMBER | {"description": "ViLU's probability that the label is wrong, in [0, 1]."},
        "accept": _BOOL
        | {
            "description": "Whether failure_probability is below the class set's threshold, and the image "
            "is no outlier where the checkpoint has a threshold for that."
        },
        "class_set": _TEXT | {"description": "NAME@VERSION; with `class_set` or `details`."},
        "stage": {"type": "integer", "description": "The stage of a cascade that answered, from 1."},
        "escalation_failed": _BOOL | {"description": "Whether a later stage was to answer and could not."},
        **_PAIRS,
        "entropy": _NUMBER,
        "doctor": _NUMBER,
        "outlier_score": _NUMBER | {"description": "How unlike the training images the image is, in [0, 2]."},
        "embedding": {"type": "array", "items": _NUMBER},
    },
}
ERROR: Json = {"type": "object", "required": ["error"], "properties": {"error": _TEXT}}
TENSOR: Json = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {
        "name": _TEXT,
        "datatype": _TEXT,
        "shape": {"type": "array", "items": {"type": "integer"}},
        "parameters": {"type": "object"},
        "data": {"type": "array", "items": {}, "description": "An image in the tensor IMAGE: base64 or a data URL."},
    },
}
_STATUS = {
    400: "The request is malformed, or the image cannot be read.",
    401: "The token is missing or wrong.",
    404: "There is no such model or path.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is compressed.",
    431: "The address and the headers are too large.",
    500: "The server failed.",
    501: "The server does not offer this.",
    503: "Busy, or no server answers; see Retry-After.",
    504: "No answer in time.",
}


def description(limits: Limits) -> Json:
    """The OpenAPI 3.1 description of a door with these limits."""
    infer = {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["inputs"],
                    "properties": {
                        "id": _TEXT,
                        "parameters": {"type": "object"},
                        "inputs": {"type": "array", "items": {"$ref": "#/components/schemas/Tensor"}},
                        "outputs": {"type": "array", "items": {"type": "object", "required": ["name"], "properties": {
                            "name": _TEXT, "parameters": {"type": "object"}}}},
                    },
                }
            },
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }  # fmt: skip
    generate = {"required": True, "content": {"application/json": {"schema": {
        "type": "object",
        "properties": {
            "IMAGE": _TEXT | {"description": "base64, or a data URL"},
            "LABELS": {"type": "array", "items": _TEXT, "description": "Candidate labels, for vilu_open."},
            "class_set": _TEXT,
            "id": _TEXT,
        },
    }}}}  # fmt: skip
    image = {"type": "string", "format": "binary"}
    labels = {"type": "array", "items": _TEXT, "minItems": 1}
    fields = {"labels": labels, "class_set": _TEXT, **dict.fromkeys(FLAGS, _BOOL)}
    closed = {"type": "object", "required": ["image"], "additionalProperties": False}
    ask = {
        "required": True,
        "content": {
            **{kind: {"schema": image} for kind in (*IMAGE_TYPES, "application/octet-stream")},
            "multipart/form-data": {
                "schema": closed | {"properties": {"image": image, **fields}}
            },
            "application/json": {"schema": closed | {"properties": {
                "image": _TEXT | {"description": "base64, or a data URL"}, **fields}}},
        },
    }  # fmt: skip
    query = [
        _parameter("labels", "query", {"type": "array", "items": _TEXT}, "Candidate labels; repeat."),
        _parameter("class_set", "query", _TEXT, "A class set that the server has."),
        _parameter("details", "query", _BOOL, "Also the likeliest labels, concepts and other scores."),
        _parameter("embedding", "query", _BOOL, "Also the image embedding."),
        _parameter("outlier_score", "query", _BOOL, "Also the outlier score, where the checkpoint has one."),
        _parameter("cascade", "query", _BOOL, "Ask the server's cascade, `vilu_cascade`."),
    ]
    model = _parameter("model", "path", {"type": "string", "enum": list(MODELS)}, "The model.")
    version = _parameter("version", "path", {"type": "string", "pattern": "^[0-9]{1,9}$"}, "Its version.")
    length = _parameter(
        "Inference-Header-Content-Length", "header", {"type": "integer", "minimum": 0},
        "Bytes of the JSON where tensors follow it; 0: the body is one image.",
    )  # fmt: skip
    free = {"type": "object"}
    tensors = {"type": "object", "required": ["outputs"], "properties": {
        "outputs": {"type": "array", "items": {"$ref": "#/components/schemas/Tensor"}}}}  # fmt: skip
    paths: Json = {
        "/ask": {"post": _operation("Ask about one image", {"$ref": "#/components/schemas/Answer"}, query, ask)},
        "/healthz": {"get": _operation("Whether the process runs", free, open_to_all=True)},
        "/readyz": {"get": _operation("Whether questions are answered", free, open_to_all=True)},
        "/v2": {"get": _operation("The server's name and version", free, open_to_all=True)},
        "/v2/health/live": {"get": _operation("As /healthz", free, open_to_all=True)},
        "/v2/health/ready": {"get": _operation("As /readyz", free, open_to_all=True)},
    }
    for path, given in (("/v2/models/{model}", [model]), ("/v2/models/{model}/versions/{version}", [model, version])):
        paths[path] = {"get": _operation("A model's tensors", free, given, open_to_all=True)}
        paths[path + "/config"] = {"get": _operation("A model's configuration", free, given, open_to_all=True)}
        paths[path + "/ready"] = {"get": _operation("Whether a model is ready", free, given, open_to_all=True)}
        paths[path + "/infer"] = {"post": _operation("Ask a model (KServe v2)", tensors, [*given, length], infer)}
        paths[path + "/generate"] = {"post": _operation("Ask a model with a flat JSON object", free, given, generate)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ViLU",
            "version": __version__,
            "description": "CLIP's answer for an image, and the probability that it is wrong. "
            f"A body has at most {limits.body_bytes} bytes and {limits.body_seconds:g} s to arrive.",
        },
        "paths": paths,
        "components": {
            "schemas": {"Answer": ANSWER, "Error": ERROR, "Tensor": TENSOR},
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _parameter(name: str, place: str, schema: Json, text: str) -> Json:
    return {"name": name, "in": place, "required": place == "path", "schema": schema, "description": text}


def _operation(
    summary: str,
    answer: Json,
    parameters: list[Json] | None = None,
    body: Json | None = None,
    *,
    open_to_all: bool = False,
) -> Json:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    answers = {"application/json": {"schema": answer}}
    if body is not None and "application/octet-stream" in body["content"] and "image/jpeg" not in body["content"]:
        answers["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
    return {
        "summary": summary,
        "parameters": parameters or [],
        **({"requestBody": body} if body else {}),
        "security": [{}] if open_to_all else [{"bearer": []}, {}],
        "responses": {
            "200": {"description": "The answer.", "content": answers},
            **{str(status): {"description": text, "content": error} for status, text in _STATUS.items()},
        },
    }


def _page() -> str:
    rows = []
    for path, methods in description(Limits())["paths"].items():
        for method, operation in methods.items():
            given = ", ".join(f"{one['name']} ({one['in']})" for one in operation["parameters"])
            cells = (f"{method.upper()} {path}", operation["summary"], given)
            rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>ViLU over HTTP</title><style>"
        "body{font:16px sans-serif;margin:2em}td{padding:.3em 1em .3em 0;vertical-align:top}"
        "td:first-child{font-family:monospace}</style>"
        "<h1>ViLU over HTTP</h1><p>curl --data-binary @photo.jpg http://HOST:8000/ask</p><table>"
        + "".join(rows)
        + "</table><p>The same for programs: <a href=openapi.json>openapi.json</a> (OpenAPI 3.1).</p></html>"
    )


DOCS = _page()
