"""A Python-based Triton backend named `onnxruntime`, for servers that carry no native one.

The same model repository then runs here and on the native backend of NVIDIA's container. What the model's parameters
ask for is what it gets where this machine has it: see session.py.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from session import open_session


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        return auto_complete_model_config  # `vilu export` writes every field

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        path = os.path.join(
            args["model_repository"], args["model_version"], config.get("default_model_filename") or "model.onnx"
        )
        asked = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        # A model that may wait for others. Before the session, whose threads take it over.
        os.nice(int(asked.get("nice", 0)))
        self.name = args["model_name"]
        self.session = open_session(
            path,
            asked.get("provider", "cpu"),
            asked.get("precision", "float32"),
            int(asked.get("intra_op_thread_count", 0)),  # the native backend's own parameter
            pin=asked.get("pin_threads", "yes") != "no",
        )
        pb_utils.Logger.log_info(f"{self.name}: {self.session.provider} (onnxruntime {onnxruntime.__version__})")
        self.inputs = self.session.inputs
        self.batched = config["max_batch_size"] > 0

    def _feed(self, request: Any) -> dict[str, np.ndarray]:
        feed = {}
        for name, kind in self.inputs.items():
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is None:
                raise ValueError(f"input {name} is missing")
            feed[name] = tensor.as_numpy().astype(kind, copy=False)
        return feed

    def _respond(self, names: list[str], values: list[np.ndarray]) -> Any:
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(n, np.asarray(v)) for n, v in zip(names, values, strict=True)]
        )

    def _alone(self, request: Any) -> Any:
        names = list(request.requested_output_names())
        try:
            return self._respond(names, self.session.run(names, self._feed(request)))
        except Exception as error:  # the runtimes have no common type; the client gets the message
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))

    def _together(self, requests: list[Any]) -> list[Any]:
        """One run of the graph over the rows of all requests. Raises what a bad request makes the graph raise."""
        feeds = [self._feed(request) for request in requests]
        names = sorted({name for request in requests for name in request.requested_output_names()})
        joined = {name: np.concatenate([feed[name] for feed in feeds]) for name in self.inputs}
        outputs = dict(zip(names, self.session.run(names, joined), strict=True))
        responses, start = [], 0
        for request, feed in zip(requests, feeds, strict=True):
            stop = start + len(next(iter(feed.values())))
            wanted = list(request.requested_output_names())
            responses.append(self._respond(wanted, [outputs[name][start:stop] for name in wanted]))
            start = stop
        return responses

    def execute(self, requests: list[Any]) -> list[Any]:
        if len(requests) > 1 and self.batched:
            try:
                return self._together(requests)
            except (
                Exception
            ) as error:  # one request spoils the batch: each is answered alone, the bad one with its error
                pb_utils.Logger.log_warn(f"{self.name}: a batch of {len(requests)} requests failed: {error}")
        return [self._alone(request) for request in requests]
