"""This Triton Python model turns strings into the token ids of CLIP's text tower. It needs no torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import text  # the export copies vilu/preprocess/text.py beside this file
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        here = Path(args["model_repository"]) / args["model_version"]
        transform = text.TextTransform(**json.loads(parameters["text_transform"]["string_value"]))
        self.tokenizer = text.Tokenizer(here / "tokenizer.json", transform)
        self.max_text_bytes = int(parameters["max_text_bytes"]["string_value"])

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy()) for request in requests]

    def _answer(self, strings: np.ndarray) -> Any:
        texts = []
        for data in strings.reshape(-1):
            data = data if isinstance(data, bytes) else str(data).encode()
            if len(data) > self.max_text_bytes:
                return self._error(f"a text has {len(data)} bytes, the limit is {self.max_text_bytes}")
            try:
                texts.append(data.decode("utf-8"))
            except UnicodeDecodeError:
                return self._error("a text is not UTF-8")
        return pb_utils.InferenceResponse([pb_utils.Tensor("TOKENS", np.asarray(self.tokenizer.encode(texts)))])

    def _error(self, message: str) -> Any:
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
