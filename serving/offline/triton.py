"""A model repository's own Python models, run in this process: what Triton's Python backend gives them, and no more.

The offline answers come from the files that the server runs. These models import `triton_python_backend_utils`, which
exists only inside the server; this module stands in for it. They keep no metrics here.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import threading
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vilu.data.tables import first_line
from vilu.errors import UserError
from vilu.serving.about import CONFIG, load_config

BACKEND = "triton_python_backend_utils"
_loading = threading.Lock()  # a load changes sys.path and sys.modules for a moment


class ModelError(Exception):
    """A model answered a request with this error."""


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self._name, self._array = name, np.asarray(array)

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = UNKNOWN) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class InferenceResponse:
    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
        self._tensors, self._error = list(output_tensors), error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors


class InferenceRequest:
    """A request to one model. `models` holds those that `exec` can reach, by name."""

    models: Mapping[str, Any] = {}

    def __init__(
        self,
        model_name: str = "",
        inputs: Sequence[Tensor] = (),
        requested_output_names: Sequence[str] = (),
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        self.model_name, self.tensors = model_name, {tensor.name(): tensor for tensor in inputs}
        self._wanted, self._parameters = list(requested_output_names), parameters

    def requested_output_names(self) -> list[str]:
        return self._wanted

    def parameters(self) -> str:
        return json.dumps(dict(self._parameters)) if self._parameters else ""

    def exec(self) -> InferenceResponse:
        (response,) = self.models[self.model_name].execute([self])
        found: InferenceResponse = response
        return found


class TritonModelException(Exception):  # noqa: N818 (the backend's own name)
    pass


class MetricFamily:
    COUNTER, GAUGE, HISTOGRAM = range(3)

    def __init__(self, **_: Any) -> None:
        raise TritonModelException("no metrics are kept here")


class Logger:
    log_error = log_warn = log_info = staticmethod(logging.getLogger(__name__).debug)


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return request.tensors.get(name)


def get_output_tensor_by_name(response: InferenceResponse, name: str) -> Tensor | None:
    return next((tensor for tensor in response.output_tensors() if tensor.name() == name), None)


def read_config(folder: Path) -> dict[str, Any]:
    """Return a model's config.pbtxt as the dictionary that Triton gives its Python models.

    Raises:
        UserError: the file is missing or no Triton model configuration.
    """
    from google.protobuf import json_format

    message = load_config(folder / CONFIG)
    config: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    # The message leaves an empty string out; tritonserver hands it on.
    given = {key: {"string_value": "", **value} for key, value in config.get("parameters", {}).items()}
    return {"max_batch_size": 0, **config, "parameters": given}


def version_folder(folder: Path, config: Mapping[str, Any]) -> Path:
    """Return the folder of the version that a server would serve: the config's choice, else the highest number.

    Raises:
        UserError: there is none.
    """
    chosen = config.get("version_policy", {}).get("specific", {}).get("versions", [])
    there = [int(path.name) for path in folder.iterdir() if path.is_dir() and path.name.isdigit()]
    found = [version for version in there if not chosen or version in map(int, chosen)]
    if not found:
        raise UserError(f"{folder}: has no version folder to serve")
    return folder / str(max(found))


def load_model(folder: Path, models: Mapping[str, Any]) -> Any:
    """Load one Python model of a repository.

    Args:
        folder: the model's folder.
        models: the models that its own requests can reach; it may be filled later.

    Returns:
        The initialised TritonPythonModel.

    Raises:
        UserError: the model does not load.
    """
    config = read_config(folder)
    config["parameters"].pop("nice", None)  # this process is the caller's: no model of it lowers its priority
    version = version_folder(folder, config)
    backend = types.ModuleType(BACKEND)
    request = type("InferenceRequest", (InferenceRequest,), {"models": models})
    for part in (Tensor, TritonError, InferenceResponse, TritonModelException, MetricFamily, Logger):
        setattr(backend, part.__name__, part)
    vars(backend).update(
        InferenceRequest=request,
        get_input_tensor_by_name=get_input_tensor_by_name,
        get_output_tensor_by_name=get_output_tensor_by_name,
    )
    arguments = {
        "model_config": json.dumps(config),
        "model_repository": str(folder),
        "model_name": folder.name,
        "model_version": version.name,
        "model_instance_device_id": "0",
    }
    try:
        model = _import(version, backend).TritonPythonModel()
        model.initialize(arguments)
    except ModuleNotFoundError:
        raise  # a package of this environment: the command says which extra has it
    except Exception as error:  # a damaged repository raises anything; the user gets one line
        raise UserError(f"{version}: does not load ({type(error).__name__}: {first_line(error)})") from None
    return model


def _import(version: Path, backend: types.ModuleType) -> Any:
    """Import model.py with the files beside it, under names that no other model's files can take."""
    own = {path.stem for path in version.glob("*.py")} | {p.name for p in version.iterdir() if p.is_dir()} | {BACKEND}
    with _loading:
        before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in own}
        written, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # the repository stays as it was
        sys.modules[BACKEND] = backend
        sys.path.insert(0, str(version))
        try:
            importlib.invalidate_caches()
            return importlib.import_module("model")
        finally:
            sys.path.remove(str(version))
            sys.dont_write_bytecode = written
            for name in [name for name in sys.modules if name.partition(".")[0] in own]:
                del sys.modules[name]
            sys.modules.update(before)
