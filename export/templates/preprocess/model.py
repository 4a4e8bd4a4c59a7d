"""This Triton Python model turns encoded images into the uint8 pixels of CLIP's image tower. It needs no torch.

For a cascade it makes the pixels of several towers: PIXELS of every image, and PIXELS_2, ... when a later stage asks
for them. It keeps the latest decoded images meanwhile, so that an image that goes on is decoded once.
"""

import json
import os
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import image  # the export copies vilu/preprocess/image.py beside this file
import numpy as np
import triton_python_backend_utils as pb_utils
from PIL.Image import core

WORKERS = len(os.sched_getaffinity(0))  # CPU cores that this process may use
KEPT_BYTES = 64 * 1024 * 1024  # of decoded images whose later sizes nobody has asked for yet


class Kept:
    """The latest decoded images by their encoded bytes, up to KEPT_BYTES."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.images: OrderedDict[bytes, Any] = OrderedDict()
        self.bytes = 0

    def put(self, data: bytes, picture: Any) -> None:
        with self.lock:
            self._drop(data)
            self.images[data] = picture
            self.bytes += _bytes(data, picture)
            while self.bytes > KEPT_BYTES:
                self._drop(next(iter(self.images)))

    def take(self, data: bytes) -> Any:
        """Return the decoded image, no longer kept; None if it is not here."""
        with self.lock:
            return self._drop(data)

    def _drop(self, data: bytes) -> Any:
        picture = self.images.pop(data, None)
        if picture is not None:
            self.bytes -= _bytes(data, picture)
        return picture


def _bytes(data: bytes, picture: Any) -> int:
    return len(data) + 4 * picture.width * picture.height  # Pillow takes four bytes for a pixel


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters = {k: v["string_value"] for k, v in json.loads(args["model_config"])["parameters"].items()}
        os.nice(int(parameters.get("nice", 0)))
        self.transforms = {"PIXELS": _transform(parameters)}
        for name, given in json.loads(parameters.get("more", "{}")).items():
            self.transforms[name] = _transform(given)
        self.kept = Kept()
        self.last = max(self.transforms)  # no later stage asks for more
        self.exact = self.transforms["PIXELS"].mode == "exact"  # else a decoded image is reduced for its own size
        # Pillow keeps this many freed blocks of 16 MiB, as new pages are slow. A photo of 12 megapixels needs three.
        core.set_blocks_max(4 * WORKERS)
        # Pillow releases the interpreter's lock while it decodes and resizes.
        self.pool = ThreadPoolExecutor(max_workers=WORKERS)
        self.errors: Any = None  # counts images that could not be decoded; None if the server keeps no metrics
        try:
            self.family = pb_utils.MetricFamily(
                name="vilu_decode_errors_total",
                description="Images that could not be decoded",
                kind=pb_utils.MetricFamily.COUNTER,
            )
            self.errors = self.family.Metric(labels={"model": args["model_name"], "version": args["model_version"]})
        except pb_utils.TritonModelException:
            pass  # the server keeps no metrics

    def _decode(self, asked: tuple[Any, list[str]]) -> list[np.ndarray] | Exception:
        """Return pixels (S, S, 3) uint8 for each name, or the error that says why there are none."""
        data, names = asked
        try:
            # A first stage does not look: it is to cost the same for an image that was asked about before.
            picture = None if "PIXELS" in names else self.kept.take(data)
            decoded = []
            for name in names:
                if picture is None or not self.exact:
                    picture = image.opened(data, self.transforms[name])
                decoded.append(image.resized(picture, self.transforms[name]))
            if self.exact and self.last not in names:
                self.kept.put(data, picture)
            return decoded
        except image.ImageError as error:
            refusal: Exception = error
            return refusal

    def execute(self, requests: list[Any]) -> list[Any]:
        batches = [pb_utils.get_input_tensor_by_name(r, "IMAGE").as_numpy().reshape(-1) for r in requests]
        wanted = [sorted(request.requested_output_names()) for request in requests]
        asked = [(data, names) for batch, names in zip(batches, wanted, strict=True) for data in batch]
        decoded = self.pool.map(self._decode, asked)
        responses = []
        for batch, names in zip(batches, wanted, strict=True):
            pixels = [next(decoded) for _ in batch]
            bad = [(i, found) for i, found in enumerate(pixels) if isinstance(found, Exception)]
            if bad:
                if self.errors is not None:
                    self.errors.increment(len(bad))
                index, error = bad[0]
                text = f"image {index}: {error}" if len(batch) > 1 else str(error)
                failure = pb_utils.TritonError(text, pb_utils.TritonError.INVALID_ARG)
                responses.append(pb_utils.InferenceResponse(error=failure))
            else:
                good = [found for found in pixels if not isinstance(found, Exception)]
                tensors = [pb_utils.Tensor(name, np.stack([one[i] for one in good])) for i, name in enumerate(names)]
                responses.append(pb_utils.InferenceResponse(output_tensors=tensors))
        return responses

    def finalize(self) -> None:
        self.pool.shutdown()


def _transform(parameters: dict[str, str]) -> Any:
    """Return the Transform that parameters, all strings, describe."""
    fields = image.Transform.__dataclass_fields__
    return image.Transform(
        **{name: int(parameters[name]) if fields[name].type == "int" else parameters[name] for name in fields}
    )
