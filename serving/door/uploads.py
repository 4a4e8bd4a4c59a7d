"""What `POST /ask` brings: an image as the body, in a form or in JSON, and the question's parameters."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterable
from typing import Any

from python_multipart.exceptions import MultipartParseError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from vilu.preprocess.class_names import names_problem
from vilu.serving.answers import Question
from vilu.serving.door.check import LONGEST_NAME
from vilu.serving.door.refused import MALFORMED, Refused
from vilu.serving.door.rest import image_bytes

FLAGS = ("details", "embedding", "outlier_score", "cascade")
PARAMETERS = ("labels", "class_set", *FLAGS)


async def read_upload(request: Request, body: bytes) -> tuple[bytes, Question]:
    """The encoded image of a request to /ask, and what is asked about it; `stage`: of the cascade. Raises Refused."""
    given = request.query_params.multi_items()
    added: list[tuple[str, str]] = []
    image = await _uploaded(request, body, added)
    check_parameters(dict(added))
    twice = sorted({key for key, _ in given} & {key for key, _ in added})
    if twice:
        raise Refused(f"{twice[0]}: is in the address and in the body")
    given += added
    for key, value in given:
        utf8(value, key)
    labels = [value for key, value in given if key == "labels"]
    class_sets = [value for key, value in given if key == "class_set"]
    if len(class_sets) > 1 or (labels and class_sets):
        raise Refused("give labels, or one class_set")
    if labels and (problem := names_problem(labels, "label")):
        raise Refused(f"labels: {problem}")
    flags = {key: _flag(given, key) for key in FLAGS}
    stage = flags.pop("cascade")
    return image, Question(labels or None, class_sets[0] if class_sets else None, **flags, stage=stage)


async def _uploaded(request: Request, body: bytes, given: list[tuple[str, str]]) -> bytes:
    """The image of a body: the body itself, the file `image` of a form, or the string `image` of a JSON object. The
    form's and the object's other fields are added to `given`. Raises Refused."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _form(request, body, given)
    if kind == "application/json":
        try:
            fields = json.loads(body, object_pairs_hook=_once)
            image = fields.pop("image")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise Refused("the JSON must be an object with the image in base64 as `image`") from None
        for key, value in fields.items():
            if value == []:
                raise Refused(f"{key[:64]!r}: the list is empty")
            for one in value if isinstance(value, list) else [value]:
                given.append((key, str(one).lower() if isinstance(one, bool) else one))
        check_parameters(fields)
        if not isinstance(image, str) or not all(isinstance(value, str) for _, value in given):
            raise Refused("the JSON's fields must be strings, lists of strings, true or false")
        return image_bytes(image)
    if not body:
        raise Refused("the body is empty: an image is wanted")
    return body


async def _form(request: Request, body: bytes, given: list[tuple[str, str]]) -> bytes:
    async def chunks() -> AsyncGenerator[bytes, None]:
        yield body
        yield b""

    try:
        size = 4 * LONGEST_NAME
        form = await MultiPartParser(
            request.headers, chunks(), max_files=1, max_fields=1100, max_part_size=size
        ).parse()
        images = [await value.read() for value in form.values() if isinstance(value, UploadFile)]
        given.extend((key, value) for key, value in form.multi_items() if isinstance(value, str))
        await form.close()
    except (MultiPartException, MultipartParseError, UnicodeDecodeError, KeyError) as error:
        raise Refused(f"the form cannot be read ({getattr(error, 'message', error)})") from None
    if len(images) != 1:
        raise Refused("the form must hold one file, the image")
    return images[0]


def check_parameters(names: Iterable[str]) -> None:
    """Raises Refused where a name is none of PARAMETERS."""
    unknown = sorted(set(names) - set(PARAMETERS))
    if unknown:
        raise Refused(f"there is no parameter {unknown[0][:64]!r}: {', '.join(PARAMETERS)}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Refused("a field of the JSON is there twice")
    return found


def _flag(given: list[tuple[str, str]], name: str) -> bool:
    values = [value.lower() for key, value in given if key == name]
    if len(values) > 1:
        raise Refused(f"{name}: is given twice")
    if values and values[0] not in ("", "true", "false", "1", "0"):
        raise Refused(f"{name}: must be true or false")
    return values[:1] in (["true"], ["1"])


def utf8(text: str, name: str) -> bytes:
    """The text's bytes. Raises Refused where it has none (a lone surrogate)."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise Refused(f"{name}: is not UTF-8", MALFORMED) from None
