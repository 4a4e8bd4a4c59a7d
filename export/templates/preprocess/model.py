"""This Triton Python model turns encoded images into the uint8 pixels of CLIP's image tower. It needs no torch."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import image  # the export copies vilu/preprocess/image.py beside this file
import numpy as np
import triton_python_backend_utils as pb_utils
from PIL.Image import core

WORKERS = len(os.sched_getaffinity(0))  # CPU cores that this process may use


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters = {k: v["string_value"] for k, v in json.loads(args["model_config"])["parameters"].items()}
        fields = image.Transform.__dataclass_fields__
        self.transform = image.Transform(
            **{name: int(parameters[name]) if fields[name].type == "int" else parameters[name] for name in fields}
        )
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

    def _decode(self, data: Any) -> np.ndarray | Exception:
        """Return pixels (S, S, 3) uint8, or the error that says why there are none."""
        try:
            decoded: np.ndarray = image.decode(data, self.transform)
            return decoded
        except image.ImageError as error:
            refusal: Exception = error
            return refusal

    def execute(self, requests: list[Any]) -> list[Any]:
        batches = [pb_utils.get_input_tensor_by_name(r, "IMAGE").as_numpy().reshape(-1) for r in requests]
        decoded = self.pool.map(self._decode, [data for batch in batches for data in batch])
        responses = []
        for batch in batches:
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
                tensor = pb_utils.Tensor(
                    "PIXELS", np.stack([found for found in pixels if not isinstance(found, Exception)])
                )
                responses.append(pb_utils.InferenceResponse(output_tensors=[tensor]))
        return responses

    def finalize(self) -> None:
        self.pool.shutdown()
