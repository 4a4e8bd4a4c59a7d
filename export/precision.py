"""What a precision is: its budget, how a tower's graph is rewritten to it, and which servers can run it.

Logits, softmax, LayerNorm statistics, the last normalisation and the whole head are float32 in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from vilu.errors import UserError


@dataclass(frozen=True)
class Budget:
    """What an export may lose against the eager float32 model; None: not asked.

    error: largest difference of any number. cosine: the least mean cosine of embeddings. agreement: the least share
    of inputs with the same argmax. auc_loss: the most that the AUC of failure_probability may fall.
    """

    error: float | None
    cosine: float | None
    agreement: float
    auc_loss: float | None = None

    def as_dict(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}


BUDGETS = {
    "float32": Budget(error=1e-4, cosine=None, agreement=1.0),
    "float16": Budget(error=None, cosine=0.999, agreement=0.995),
    "bfloat16": Budget(error=None, cosine=0.999, agreement=0.995),
    "int8": Budget(error=None, cosine=0.99, agreement=0.985, auc_loss=0.003),
}
# The head is float32 in every precision, and so is the joined graph against its own parts.
HEAD = BUDGETS["float32"]
# How far failure_probability may move with the batch an image rode in before the report calls it out.
BATCH_MOVE = 1e-6

PROVIDERS = {"cpu": ("openvino", "cpu"), "gpu": ("cuda", "tensorrt")}


def check(precision: str, device: str, provider: str, *, has_openvino: bool, has_bfloat16: bool) -> None:
    """Raises UserError for a precision that these servers cannot run, or that cannot be proven on this machine."""
    if precision not in BUDGETS:
        raise UserError(f"precision must be one of {', '.join(BUDGETS)}, got {precision!r}")
    if provider not in PROVIDERS[device]:
        raise UserError(f"provider {provider!r} is not for --device {device}: use {' or '.join(PROVIDERS[device])}")
    if provider == "openvino" and not has_openvino:
        raise UserError("provider openvino: OpenVINO is not installed here: pip install openvino")
    if precision == "float16" and device == "cpu":
        raise UserError("float16 is for GPU servers (--device gpu); a CPU has bfloat16 and int8")
    if precision == "bfloat16" and device == "gpu":
        raise UserError("bfloat16 on a GPU: ONNX operator set 20 has no bfloat16 convolution or GELU; use float16")
    if precision == "bfloat16" and provider != "openvino":
        raise UserError("bfloat16 on a CPU is OpenVINO's, which is not in use: pip install openvino")
    if precision == "bfloat16" and not has_bfloat16:
        raise UserError("bfloat16: this CPU has neither AMX nor AVX512-BF16, so nothing can be proven here")
    if precision == "int8" and provider == "cuda":
        raise UserError("int8 on a GPU is TensorRT's: add --provider tensorrt")


# ------------------------------------------------------------------------------------------------------------ float16

# Sums over many terms and ratios of them: statistics, softmax, norms.
_WIDE = {"LayerNormalization", "SimplifiedLayerNormalization", "GroupNormalization", "InstanceNormalization", "Softmax"}
_WIDE |= {"LogSoftmax", "LpNormalization", "ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare", "Pow", "Sqrt"}


_PRODUCTS = ("MatMul", "Gemm", "Conv", "MultiHeadAttention")


def to_float16(path: Path) -> None:
    """Rewrite a tower's graph in place: float16 weights and products; float32 inputs, outputs and statistics.

    A cast stands only where a value crosses from one kind of node to the other.
    """
    model = ir.load(path)
    graph = model.graph
    wide = {id(node) for node in graph if node.op_type in _WIDE} | {id(node) for node in _after_last_product(graph)}
    half, single = ir.DataType.FLOAT16, ir.DataType.FLOAT
    casts: dict[tuple[int, ir.DataType], ir.Value] = {}
    for node in list(graph):
        # What is cast to float comes from whole numbers (pixels, token ids): the next node says what it wants.
        narrow = id(node) not in wide and node.op_type not in ("Cast", "Constant", "ConstantOfShape")
        want = half if narrow else single
        for i, value in enumerate(node.inputs):
            if value is None or value.dtype not in (half, single) or value.dtype == want:
                continue
            if (id(value), want) not in casts:
                casts[id(value), want] = _as_type(graph, value, want, node)
            node.replace_input_with(i, casts[id(value), want])
        for value in node.outputs if narrow else ():
            if value.dtype == single:
                value.dtype = half
    for i, value in enumerate(graph.outputs):
        if value.dtype == half:
            graph.outputs[i] = _as_type(graph, value, single, None)
            graph.outputs[i].name, value.name = value.name, f"{value.name}_half"
            graph.outputs[i].shape = value.shape
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    save(ir.to_proto(model), path)
    onnx.checker.check_model(str(path))


def _as_type(graph: ir.Graph, value: ir.Value, kind: ir.DataType, before: ir.Node | None) -> ir.Value:
    if value.is_initializer():
        assert value.const_value is not None
        limit = np.finfo(np.float16).max
        array = value.const_value.numpy().astype(np.float32)
        array = np.where(np.isfinite(array), np.clip(array, -limit, limit), array).astype(np.float16)
        name = f"{value.name}_half"
        new = ir.Value(name=name, shape=value.shape, type=ir.TensorType(kind), const_value=ir.tensor(array, name=name))
        graph.register_initializer(new)
        return new
    node = ir.node("Cast", [value], {"to": kind}, name=f"{value.name}_to_{kind.name.lower()}")
    (new,) = node.outputs
    new.name, new.shape, new.dtype = f"{value.name}_{kind.name.lower()}", value.shape, kind
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, node)
    elif before is not None:
        graph.insert_before(before, node)
    else:
        graph.append(node)
    return new


def _after_last_product(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes between the last matrix product and the graph's outputs: the embedding's normalisation."""
    waiting, seen = list(graph.outputs), set()
    while waiting:
        node = waiting.pop().producer()
        if node is None or id(node) in seen or node.op_type in _PRODUCTS:
            continue
        seen.add(id(node))
        yield node
        waiting += [value for value in node.inputs if value is not None]


# --------------------------------------------------------------------------------------------------------------- int8

CALIBRATION_BATCH = 8
SAMPLE = 1 << 14  # values of one tensor and batch that its range is chosen from
SHRINK = np.linspace(1.0, 0.2, 33)


def quantise(
    path: Path,
    feed: Mapping[str, np.ndarray],
    *,
    symmetric: bool = False,
    clip: bool = True,
    tick: Callable[[], None] = lambda: None,
) -> int:
    """Rewrite a tower's graph in place: int8 products of weights (one scale a channel) and activations (one a tensor).

    Products of two activations (attention), LayerNorm, softmax and GELU stay float32.

    Args:
        feed: input name -> (N, ...) inputs to calibrate on; none of them may be measured on afterwards.
        symmetric: signed activations around zero. TensorRT takes no other; OpenVINO does, but its padded convolutions
            are then wrong (mean cosine 0.989 on the embedded CLIP, against 0.9996 in ONNX Runtime, whose CPU provider
            gains from the zero point). Else unsigned, with a zero point.
        clip: choose each range by the least squared error over a sample of its values, not by its extremes.

    Returns:
        The number of products that are now int8.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    model = onnx.load(path)
    nodes = list(_weighted(model.graph))
    tensors = list(dict.fromkeys(t for n in nodes for t in (n.input[0], *(n.output if n.op_type == "Conv" else ()))))
    ranges = calibrate(path, model, tensors, feed, symmetric=symmetric, clip=clip, tick=tick)
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
    save(quantizer.model.model, path)
    onnx.checker.check_model(str(path))
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
        if node is not None and node.op_type in _PRODUCTS:
            last.add(node.name)
        elif node is not None:
            waiting += node.input
    for node in graph.node:
        product = node.op_type in ("MatMul", "Gemm", "Conv") and node.name not in last
        if product and node.input[1] in weights and node.input[0] not in weights and not of_pixels(node.input[0]):
            yield node


def calibrate(
    path: Path,
    model: onnx.ModelProto,
    tensors: list[str],
    feed: Mapping[str, np.ndarray],
    *,
    symmetric: bool,
    clip: bool,
    tick: Callable[[], None],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """tensor -> (low, high) over the feed, narrowed where fewer levels lost at the ends cost less than they give."""
    known = {value.name for value in model.graph.output}
    own = len(known)
    for name in tensors:
        if name not in known:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    beside = path.with_name("calibrate.onnx")
    save(model, beside)
    del model.graph.output[own:]
    session = onnxruntime.InferenceSession(beside, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    low, high = dict.fromkeys(tensors, np.inf), dict.fromkeys(tensors, -np.inf)
    samples: dict[str, list[np.ndarray]] = {name: [] for name in tensors}
    (count,) = {len(rows) for rows in feed.values()}
    for start in range(0, count, CALIBRATION_BATCH):
        batch = {name: rows[start : start + CALIBRATION_BATCH] for name, rows in feed.items()}
        for name, value in zip(tensors, session.run(tensors, batch), strict=True):
            flat = value.reshape(-1)
            low[name], high[name] = min(low[name], float(flat.min())), max(high[name], float(flat.max()))
            samples[name].append(flat[random.integers(0, flat.size, min(flat.size, SAMPLE))])
        tick()
    del session
    for file in path.parent.glob("calibrate.onnx*"):
        file.unlink()
    found = {}
    for name in tensors:
        ends = _range(np.concatenate(samples[name]), low[name], high[name], symmetric, clip)
        found[name] = (np.float32(ends[0]), np.float32(ends[1]))
    return found  # type: ignore[return-value]


def _range(sample: np.ndarray, low: float, high: float, symmetric: bool, clip: bool) -> tuple[float, float]:
    """The narrowing of (low, high), 0 always inside, with the least squared rounding and clipping error."""
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        high = max(-low, high)
        low = -high
    if not clip or high <= low:
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


def save(model: onnx.ModelProto, path: Path) -> None:
    """In the layout of `graphs.write_graph`: weights above MAX_INLINE in a file of their own."""
    from vilu.export.graphs import MAX_INLINE

    data = f"{path.name}.data"
    path.with_name(data).unlink(missing_ok=True)
    large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > MAX_INLINE
    onnx.save_model(model, path, save_as_external_data=large, location=data)
