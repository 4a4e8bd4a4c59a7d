"""How far the written graphs are from the eager model, measured with the runtime that serves them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

TOLERANCE = 1e-4  # float32, on failure_probability, confidence and embeddings


@dataclass(frozen=True)
class Reference:
    """A graph's inputs and what the eager model answers.

    feed: (N, ...) inputs; outputs: name -> (N, ...) eager outputs; predict: IMAGE/TEXT embeddings (N, D) to the
    class index, for graphs that give no CLASS_INDEX of their own.
    """

    input_name: str
    feed: np.ndarray
    outputs: Mapping[str, np.ndarray]
    predict: Callable[[np.ndarray], np.ndarray] | None = None


@cache
def openvino_cpu() -> list[Any]:
    """The CPU as a device of OpenVINO's provider plugin; empty where the plugin is absent or knows no such device."""
    try:
        plugin = importlib.import_module("onnxruntime_ep_openvino")
    except ModuleNotFoundError:
        return []
    name = plugin.get_ep_name()
    onnxruntime.register_execution_provider_library(name, plugin.get_library_path())
    devices = [d for d in onnxruntime.get_ep_devices() if d.ep_name == name]
    return [d for d in devices if d.ep_metadata.get("ov_device") == "CPU"][:1]


def sessions(path: Path) -> Iterator[tuple[str, onnxruntime.InferenceSession]]:
    """(provider, session) for every provider a CPU server here would use for this graph."""
    yield "cpu", onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    if openvino_cpu():
        options = onnxruntime.SessionOptions()
        # bfloat16 is OpenVINO's own choice on a CPU with AMX; float32 was promised here.
        precision = {"load_config": '{"CPU": {"INFERENCE_PRECISION_HINT": "f32"}}'}
        options.add_provider_for_devices(openvino_cpu(), precision)
        yield "openvino", onnxruntime.InferenceSession(path, options)


def measure(path: Path, reference: Reference, batches: tuple[int, ...], tick: Callable[[], None]) -> dict[str, Any]:
    """Max absolute error per output and argmax agreement of one graph, by provider and batch size."""
    result: dict[str, Any] = {}
    for provider, session in sessions(path):
        names = [output.name for output in session.get_outputs()]
        if provider != "cpu" and "LABEL" in names:
            continue  # strings keep a graph on the CPU provider
        for batch in batches:
            parts = [
                session.run(names, {reference.input_name: reference.feed[i : i + batch]})
                for i in range(0, len(reference.feed), batch)
            ]
            outputs = {n: np.concatenate([p[k] for p in parts]) for k, n in enumerate(names)}
            result.setdefault(provider, {})[str(batch)] = compare(outputs, reference)
            tick()
    return result


def measure_head(
    head: torch.nn.Module, labels: Sequence[str], reference: Reference, batches: tuple[int, ...]
) -> dict[str, Any]:
    """The same rows for a head that is served by the fused kernel: of the folded module it is compiled from."""
    result = {}
    for batch in batches:
        with torch.no_grad():
            parts = [head(chunk) for chunk in torch.from_numpy(reference.feed).split(batch)]
        columns = [torch.cat(column).numpy() for column in zip(*parts, strict=True)]
        outputs = dict(zip(("CLASS_INDEX", "CONFIDENCE", "FAILURE_PROBABILITY", "ACCEPT"), columns, strict=True))
        outputs["LABEL"] = np.array(labels, dtype=object)[outputs["CLASS_INDEX"]]
        result[str(batch)] = compare(outputs, reference)
    return result


def compare(outputs: Mapping[str, np.ndarray], reference: Reference) -> dict[str, Any]:
    """Errors of one run; a value that is not finite counts as an infinite error."""
    errors, agreement = {}, []
    for name, expected in reference.outputs.items():
        actual = outputs[name]
        if expected.dtype.kind == "f":
            error = np.abs(actual.astype(np.float64) - expected).max()
            errors[name] = float(error) if np.isfinite(error) else float("inf")
        else:
            agreement.append((actual == expected).reshape(len(expected), -1).all(axis=1))
        if reference.predict is not None:
            agreement.append(reference.predict(actual) == reference.predict(expected))
    return {
        "max_abs_error": errors,
        "argmax_agreement": float(np.mean(np.logical_and.reduce(agreement))),
        "inputs": len(reference.feed),
    }


def failures(report: Mapping[str, Any]) -> Iterator[str]:
    """One line for each graph that is over the budget."""
    for graph, providers in report.items():
        for provider, by_batch in providers.items():
            for batch, row in by_batch.items():
                where = f"{graph} ({provider}, batch {batch})"
                for name, error in row["max_abs_error"].items():
                    if not error <= TOLERANCE:
                        yield f"{where}: {name} differs by {error:.2e}, the limit is {TOLERANCE:.0e}"
                if row["argmax_agreement"] < 1:
                    yield f"{where}: {1 - row['argmax_agreement']:.2%} of the answers differ"
