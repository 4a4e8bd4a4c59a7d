"""How a graph is opened on a CPU: what serves it and what the export measures it with are this one file.

ONNX Runtime's own CPU provider; or OpenVINO, as ONNX Runtime's provider plugin where that offers a device (it lists
Intel's alone), else through the package `openvino`, which runs on every x86-64. It imports nothing of this project: the
server's Python has its own packages.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

TYPES = {
    "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(float16)": np.float16,
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(string)": np.object_,
}


@cache
def openvino_cpu() -> list[Any]:
    """The CPU as a device of OpenVINO's provider plugin; empty where the plugin is absent or offers no such device."""
    try:
        plugin = importlib.import_module("onnxruntime_ep_openvino")
    except ImportError:
        return []
    name = plugin.get_ep_name()
    onnxruntime.register_execution_provider_library(name, plugin.get_library_path())
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
    return [device for device in devices if device.ep_metadata.get("ov_device") == "CPU"][:1]


@cache
def openvino_package() -> Any:
    """The module `openvino`, or None."""
    try:
        return importlib.import_module("openvino")
    except ImportError:
        return None


def has_openvino() -> bool:
    return bool(openvino_cpu()) or openvino_package() is not None


@cache
def cpu_flags() -> frozenset[str]:
    """What this CPU can do, as /proc/cpuinfo names it; empty where there is no such file."""
    try:
        return frozenset(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return frozenset()


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware: AMX or AVX512-BF16."""
    return not cpu_flags().isdisjoint({"amx_bf16", "avx512_bf16"})


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class OnnxRuntime:
    """A graph in ONNX Runtime: `inputs` name -> NumPy type, `outputs` names, `run` as InferenceSession's."""

    def __init__(
        self, path: str | os.PathLike[str], threads: int = 0, openvino: Mapping[str, Any] | None = None
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        if openvino is None:
            self.provider = "ONNX Runtime, CPU provider"
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        else:
            self.provider = f"ONNX Runtime, OpenVINO provider, {openvino['INFERENCE_PRECISION_HINT']}"
            options.add_provider_for_devices(openvino_cpu(), {"load_config": json.dumps({"CPU": dict(openvino)})})
            self.session = onnxruntime.InferenceSession(path, options)
        self.inputs = {tensor.name: TYPES[tensor.type] for tensor in self.session.get_inputs()}
        self.outputs = [tensor.name for tensor in self.session.get_outputs()]

    def run(self, names: Sequence[str], feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return self.session.run(list(names), dict(feed))


class OpenVino:
    """The same graph through the package `openvino`."""

    def __init__(self, path: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
        self.provider = f"OpenVINO, {options['INFERENCE_PRECISION_HINT']}"
        model = openvino_package().Core().compile_model(str(path), "CPU", dict(options))
        self.request = model.create_infer_request()
        self.inputs = {port.any_name: port.element_type.to_dtype().type for port in model.inputs}
        self.outputs = [port.any_name for port in model.outputs]

    def run(self, names: Sequence[str], feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        results = self.request.infer(dict(feed))
        return [results[name] for name in names]


def open_session(
    path: str | os.PathLike[str],
    provider: str = "cpu",
    precision: str = "float32",
    threads: int = 0,
    *,
    pin: bool = True,
) -> OnnxRuntime | OpenVino:
    """A graph without strings on `provider` ("cpu" or "openvino"), or on ONNX Runtime's CPU provider where that is
    absent here. bfloat16 is OpenVINO's, on a CPU that has it; else such a graph is computed in float32.
    `threads` 0: as many as there are cores. `pin` False: the cores are shared with other graphs.
    """
    if provider != "openvino" or not has_openvino():
        return OnnxRuntime(path, threads)
    hint = "bf16" if precision == "bfloat16" and has_bfloat16() else "f32"  # OpenVINO's own choice would be bf16
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        # OpenVINO would pin the threads to the first cores, in each process to the same ones.
        options |= {"INFERENCE_NUM_THREADS": threads}
        options |= {"ENABLE_CPU_PINNING": "YES" if pin and threads >= cores() else "NO"}
    return OnnxRuntime(path, threads, options) if openvino_cpu() else OpenVino(path, options)
