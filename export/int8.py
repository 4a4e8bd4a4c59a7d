"""Rewrite a tower's graph to int8: products of weights and activations, whose ranges are measured on real inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from vilu.export import onnx_file
from vilu.export.precision import PRODUCTS

CALIBRATION_BATCH = 8
VALUES_PER_BATCH = 1 << 14  # how many values of one tensor and batch are kept to choose its range from
SHRINK = np.linspace(1.0, 0.2, 33)  # parts of the full range that are tried


def quantise(
    path: Path,
    feed: Mapping[str, np.ndarray],
    *,
    symmetric: bool = False,
    narrow: bool = True,
    tick: Callable[[], None] = lambda: None,
) -> int:
    """Rewrite a tower's graph in place: int8 products of weights (one scale a channel) and activations (one a tensor).

    Products of two activations (attention), LayerNorm, softmax and GELU stay float32.

    Args:
        path: an ONNX file, its large weights in `path`.data or not; both are replaced.
        feed: input name -> (N, ...) inputs to calibrate on; none of them may be measured on afterwards.
        symmetric: make activations signed around zero; else unsigned, with a zero point. TensorRT takes signed alone.
            OpenVINO takes both, but computes padded convolutions wrongly from unsigned (mean cosine 0.989 on the
            embedded CLIP, against 0.9996 in ONNX Runtime, whose CPU provider gains from the zero point).
        narrow: choose each range by the least squared error over a sample of its values, not by its extremes.
        tick: called after each batch of calibration.

    Returns:
        The number of products that are now int8.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    model = onnx.load(path)
    nodes = list(_weighted(model.graph))
    tensors = list(dict.fromkeys(t for n in nodes for t in (n.input[0], *(n.output if n.op_type == "Conv" else ()))))
    ranges = calibrate(path, tensors, feed, symmetric=symmetric, narrow=narrow, tick=tick)
    quantizer = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8 if symmetric else QuantType.QUInt8,
        tensors_range=TensorsData(
            CalibrationMethod.MinMax,
            {name: TensorData(lowest=low, highest=high) for name, (low, high) in ranges.items()},
        ),
        nodes_to_quantize=[node.name for node in nodes],
        nodes_to_exclude=[],
        op_types_to_quantize=["MatMul", "Gemm", "Conv"],
        extra_options={
            "ActivationSymmetric": symmetric,
            "WeightSymmetric": True,
            # What follows a product of a transformer is float32 anyway; a convolution's runtime wants both ends.
            "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
        },
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    onnx_file.save(ir.from_proto(quantizer.model.model), path)
    return len(nodes)


def _weighted(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Products of an activation and a constant weight. The first, on pixels, and the last, whose rounding nothing
    averages out, stay float32.
    """
    weights = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    producers = {output: node for node in graph.node for output in node.output}
    entries = {value.name for value in graph.input}

    def of_pixels(name: str) -> bool:
        while (found := producers.get(name)) is not None and found.op_type in ("Cast", "Transpose", "Sub"):
            name = found.input[0]
        return name in entries

    waiting, last = [output.name for output in graph.output], set()
    while waiting:
        node = producers.get(waiting.pop())
        if node is not None and node.op_type in PRODUCTS:
            last.add(node.name)
        elif node is not None:
            waiting += node.input
    for node in graph.node:
        product = node.op_type in ("MatMul", "Gemm", "Conv") and node.name not in last
        if product and node.input[1] in weights and node.input[0] not in weights and not of_pixels(node.input[0]):
            yield node


def calibrate(
    path: Path,
    tensors: list[str],
    feed: Mapping[str, np.ndarray],
    *,
    symmetric: bool,
    narrow: bool,
    tick: Callable[[], None],
) -> dict[str, tuple[np.float32, np.float32]]:
    """Ranges of a graph's values over the feed: name -> (low, high), both float32.

    A range is narrowed where the finer steps gain more than the values beyond its ends lose.
    """
    model = onnx.load(path, load_external_data=False)  # the copy below refers to the same file of weights
    known = {value.name for value in model.graph.output}
    for name in tensors:
        if name not in known:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    beside = path.with_name("calibrate.onnx")
    onnx.save(model, beside)
    session = onnxruntime.InferenceSession(beside, providers=["CPUExecutionProvider"])
    beside.unlink()
    random = np.random.default_rng(0)
    low, high = dict.fromkeys(tensors, np.inf), dict.fromkeys(tensors, -np.inf)
    samples: dict[str, list[np.ndarray]] = {name: [] for name in tensors}
    (count,) = {len(rows) for rows in feed.values()}
    for start in range(0, count, CALIBRATION_BATCH):
        batch = {name: rows[start : start + CALIBRATION_BATCH] for name, rows in feed.items()}
        for name, value in zip(tensors, session.run(tensors, batch), strict=True):
            flat = value.reshape(-1)
            low[name], high[name] = min(low[name], float(flat.min())), max(high[name], float(flat.max()))
            samples[name].append(flat[random.integers(0, flat.size, min(flat.size, VALUES_PER_BATCH))])
        tick()
    found = {}
    for name in tensors:
        ends = _range(np.concatenate(samples[name]), low[name], high[name], symmetric=symmetric, narrow=narrow)
        found[name] = (np.float32(ends[0]), np.float32(ends[1]))
    return found


def _range(sample: np.ndarray, low: float, high: float, *, symmetric: bool, narrow: bool) -> tuple[float, float]:
    """The part of (low, high), always with 0 inside, whose 256 levels have the least squared error over `sample`."""
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        high = max(-low, high)
        low = -high
    if not narrow or high <= low:
        return low, high
    best, chosen = np.inf, (low, high)
    for shrink in SHRINK:
        a, b = low * shrink, high * shrink
        step = (b - a) / 255
        if not step:
            break  # too small for floating point to divide by
        rounded = np.clip(np.rint((sample - a) / step), 0, 255) * step + a
        error = float(np.square(rounded - sample, dtype=np.float64).sum())
        if error < best:
            best, chosen = error, (a, b)
    return chosen
