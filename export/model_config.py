"""config.pbtxt of one model, written through Triton's own ModelConfig protobuf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from vilu.export.limits import Limits
from vilu.serving.about import CONFIG

Tensors = Mapping[str, tuple[str, Sequence[int]]]  # name -> (Triton's type, shape without the batch; -1: any)

# How many cores one instance of a tower uses well; more cores get more instances.
CORES_PER_INSTANCE = 8
# Niceness of the text tower's process, since images want the same cores: names that nobody asked before are much work
# and can wait. 10 instead of 5 helped the images no further (`bench/new_names.py`).
TEXT_NICE = 5
# Bytes of memory that TensorRT may use beside the weights while it builds an engine and runs it.
TENSORRT_WORKSPACE = 4 << 30


@dataclass(frozen=True)
class Runtime:
    """What runs the repository's graphs.

    Attributes:
        device: "cpu" or "gpu".
        provider: "cpu", "openvino", "cuda" or "tensorrt".
        precision: of the towers; a name in `precision.BUDGETS`.
        cores: how many a CPU server may use.
        engines: folder on the server where TensorRT keeps its engines from one start to the next.
    """

    device: str
    provider: str
    precision: str
    cores: int
    engines: str = ""


@dataclass(frozen=True)
class Step:
    """A model of an ensemble.

    Attributes:
        model: its name.
        inputs: its inputs' names -> the ensemble's tensors that they read.
        outputs: its outputs' names -> the ensemble's tensors that they become.
    """

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


def write_config(
    folder: Path,
    *,
    backend: str,
    inputs: Tensors,
    outputs: Tensors,
    max_batch_size: int,
    limits: Limits,
    device: str = "cpu",
    parameters: Mapping[str, str] | None = None,
    queue_limit: bool = True,
    ragged: Sequence[str] = (),
    wait: int = 0,
) -> None:
    """Write one model's config.pbtxt: explicit batch size, one instance on `device`, dynamic batching.

    Args:
        folder: the model's; its name is the model's name.
        backend: "python" or "onnxruntime".
        device: "cpu" or "gpu".
        queue_limit: give its queue the size and the timeout of `limits`. With such a queue tritonserver (2.51) does not
            look at a request that came while its only instance was busy before the next one comes, or half a second
            has passed: the end of a batch wakes nobody. A model that ends an ensemble, and is faster than the steps
            before it, needs no limit of its own.
        ragged: optional inputs, of which the requests of one batch may have different numbers of rows.
        wait: microseconds that a request may wait for others to share its batch.
    """
    config = _model(folder.name, backend, inputs, outputs, max_batch_size, device, parameters or {})
    if queue_limit:
        _limit_queue(config, limits)
    for tensor in config.input:
        if tensor.name in ragged:
            tensor.optional = True
            tensor.allow_ragged_batch = True
    if wait:
        config.dynamic_batching.max_queue_delay_microseconds = wait
    save_config(folder, config)


def write_graph_config(
    folder: Path,
    *,
    inputs: Tensors,
    outputs: Tensors,
    max_batch_size: int,
    limits: Limits,
    runtime: Runtime,
    tower: bool,
) -> None:
    """Write config.pbtxt of an ONNX graph.

    Args:
        tower: the graph holds CLIP alone, so it may run in the reduced precision and on providers that know no strings;
            other graphs stay on ONNX Runtime's own providers.
    """
    parameters, instances = {}, 1
    if runtime.device == "cpu":
        instances = max(1, runtime.cores // CORES_PER_INSTANCE) if tower else 1
        # The native backend's names; it does not know `provider` and `precision`, which serving/backends reads.
        parameters = {
            "intra_op_thread_count": str(runtime.cores // instances),
            "inter_op_thread_count": "1",
            "execution_mode": "0",
            "provider": runtime.provider if tower else "cpu",
            "precision": runtime.precision if tower else "float32",
        }
        if folder.name == "clip_text":
            parameters["nice"] = str(TEXT_NICE)
    config = _model(folder.name, "onnxruntime", inputs, outputs, max_batch_size, runtime.device, parameters)
    config.instance_group[0].count = instances
    _limit_queue(config, limits)
    if runtime.device == "gpu":
        _add_gpu_options(config, inputs, runtime, tower)
    save_config(folder, config)


def write_ensemble(folder: Path, inputs: Tensors, outputs: Tensors, steps: Sequence[Step], max_batch_size: int) -> None:
    """Write an ensemble: its config.pbtxt, and the empty version folder that Triton wants."""
    config = _named(folder.name, inputs, outputs, max_batch_size)
    config.platform = "ensemble"
    for step in steps:
        config.ensemble_scheduling.step.add(
            model_name=step.model, model_version=-1, input_map=step.inputs, output_map=step.outputs
        )
    save_config(folder, config)
    (folder / "1").mkdir()
    (folder / "1" / ".gitkeep").touch()


def _named(name: str, inputs: Tensors, outputs: Tensors, max_batch_size: int) -> pb.ModelConfig:
    config = pb.ModelConfig(name=name, max_batch_size=max_batch_size)
    for tensors, target in ((inputs, config.input), (outputs, config.output)):
        for tensor, (kind, dims) in tensors.items():
            target.add(name=tensor, data_type=pb.DataType.Value(kind), dims=dims)
    return config


def _model(
    name: str,
    backend: str,
    inputs: Tensors,
    outputs: Tensors,
    max_batch_size: int,
    device: str,
    parameters: Mapping[str, str],
) -> pb.ModelConfig:
    config = _named(name, inputs, outputs, max_batch_size)
    config.backend = backend
    config.default_model_filename = "model.py" if backend == "python" else "model.onnx"
    config.instance_group.add(kind=pb.ModelInstanceGroup.Kind.Value(f"KIND_{device.upper()}"), count=1)
    config.dynamic_batching.SetInParent()
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    return config


def _limit_queue(config: pb.ModelConfig, limits: Limits) -> None:
    if not limits.max_queue:
        return
    queue = config.dynamic_batching.default_queue_policy
    queue.max_queue_size = limits.max_queue
    queue.default_timeout_microseconds = round(1e6 * limits.queue_seconds)
    queue.timeout_action = pb.ModelQueuePolicy.TimeoutAction.Value("REJECT")
    queue.allow_timeout_override = True  # a client's own, shorter, timeout


def _add_gpu_options(config: pb.ModelConfig, inputs: Tensors, runtime: Runtime, tower: bool) -> None:
    """Add preferred batches, each run once before the model is ready, and the accelerators' options."""
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    if runtime.provider == "tensorrt" and tower:
        modes = {"float32": "FP32", "float16": "FP16", "int8": "INT8"}
        options = {"precision_mode": modes[runtime.precision], "max_workspace_size_bytes": str(TENSORRT_WORKSPACE)}
        options |= {"trt_engine_cache_enable": "true", "trt_engine_cache_path": runtime.engines}
        options |= {"trt_engine_cache_prefix": config.name, "trt_timing_cache_enable": "true"}
        options |= {"trt_timing_cache_path": runtime.engines, "trt_layer_norm_fp32_fallback": "true"}
        # One profile for every batch: without it each new size would build an engine while a request waits.
        for end, rows in (("min", 1), ("opt", config.max_batch_size), ("max", config.max_batch_size)):
            shapes = [f"{name}:{'x'.join(map(str, (rows, *dims)))}" for name, (_, dims) in inputs.items()]
            options[f"trt_profile_{end}_shapes"] = ",".join(shapes)
        accelerators.add(name="tensorrt", parameters=options)
    # With TF32 the tensor cores would round float32 products to 10 bits.
    accelerators.add(name="cuda", parameters={"use_tf32": "0"})
    sizes = [1 << k for k in range(1, config.max_batch_size.bit_length()) if 1 << k < config.max_batch_size]
    config.dynamic_batching.preferred_batch_size.extend([*sizes, config.max_batch_size])
    for size in (1, *sizes, config.max_batch_size):
        warmup = config.model_warmup.add(name=f"batch_{size}", batch_size=size)
        for name, (kind, dims) in inputs.items():
            warmup.inputs[name].data_type = pb.DataType.Value(kind)
            warmup.inputs[name].dims.extend(dims)
            warmup.inputs[name].zero_data = True


def save_config(folder: Path, config: pb.ModelConfig) -> None:
    """Write a model's config.pbtxt into its folder, which is made where it is absent."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(text_format.MessageToString(config), "utf-8")
