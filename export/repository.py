"""config.pbtxt for every model of the repository, written through Triton's own ModelConfig protobuf."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

import vilu.image
import vilu.text
from vilu.class_set import ClassSet
from vilu.export.graphs import ANSWER
from vilu.image import Transform
from vilu.text import TextTransform

TEMPLATES = Path(__file__).parent / "templates"
Tensors = Mapping[str, tuple[str, Sequence[int]]]

_ANSWER_TYPES = dict(zip(ANSWER, ("TYPE_STRING", "TYPE_INT32", "TYPE_FP32", "TYPE_FP32", "TYPE_BOOL"), strict=True))
ANSWER_TENSORS: Tensors = {name: (kind, [1]) for name, kind in _ANSWER_TYPES.items()}

# A label set of a request's own; a label is a name or a caption, not a text.
MAX_LABELS, MAX_LABEL_BYTES = 1000, 256
KEPT_PROMPTS = 16384  # whose text embeddings an open-vocabulary server keeps: 32 MB at D = 512
# Requests that may wait before one model, and for how long: more are refused at once, with UNAVAILABLE.
MAX_QUEUE, QUEUE_SECONDS = 256, 30.0
# Cores that one instance of a tower still makes good use of; more cores get more instances.
CORES_PER_INSTANCE = 8
# A tower's activations and TensorRT's choice of kernels; engines that need more are not built.
WORKSPACE = 4 << 30


@dataclass(frozen=True)
class Runtime:
    """What runs the repository's graphs.

    device: "cpu" or "gpu"; provider: "cpu", "openvino", "cuda" or "tensorrt"; cores: what a CPU server may use.
    engines: folder on the server where TensorRT keeps its engines from one start to the next.
    """

    device: str
    provider: str
    precision: str
    cores: int
    engines: str = ""


def write_config(
    folder: Path,
    *,
    backend: str,
    inputs: Tensors,
    outputs: Tensors,
    max_batch_size: int,
    device: str = "cpu",
    parameters: Mapping[str, str] | None = None,
) -> None:
    """One model's config.pbtxt: explicit batch size, one instance on `device` ("cpu" or "gpu"), dynamic batching."""
    _write(folder, _model(folder.name, backend, inputs, outputs, max_batch_size, device, parameters or {}))


def write_graph_config(
    folder: Path,
    *,
    inputs: Tensors,
    outputs: Tensors,
    max_batch_size: int,
    runtime: Runtime,
    tower: bool,
    parameters: Mapping[str, str] | None = None,
) -> None:
    """config.pbtxt of an ONNX graph. `tower`: it holds CLIP alone, so it may run in the reduced precision and where
    strings cannot; other graphs stay on ONNX Runtime's own providers.
    """
    parameters = dict(parameters or {})
    if runtime.device == "cpu":
        instances = max(1, runtime.cores // CORES_PER_INSTANCE) if tower else 1
        # Names of the native backend; `provider` and `precision` are this project's own and unknown to it.
        threads = runtime.cores // instances if folder.name != "vilu_head" else 1
        parameters |= {"intra_op_thread_count": str(threads), "inter_op_thread_count": "1", "execution_mode": "0"}
        parameters |= {"provider": runtime.provider if tower else "cpu"}
        parameters |= {"precision": runtime.precision if tower else "float32"}
    config = _model(folder.name, "onnxruntime", inputs, outputs, max_batch_size, runtime.device, parameters)
    if runtime.device == "cpu":
        config.instance_group[0].count = instances
    else:
        _gpu(config, inputs, runtime, tower)
    _write(folder, config)


def _model(
    name: str,
    backend: str,
    inputs: Tensors,
    outputs: Tensors,
    max_batch_size: int,
    device: str,
    parameters: Mapping[str, str],
) -> pb.ModelConfig:
    config = _config(name, inputs, outputs, max_batch_size)
    config.backend = backend
    config.default_model_filename = "model.py" if backend == "python" else "model.onnx"
    config.instance_group.add(kind=pb.ModelInstanceGroup.Kind.Value(f"KIND_{device.upper()}"), count=1)
    queue = config.dynamic_batching.default_queue_policy
    queue.max_queue_size = MAX_QUEUE
    queue.default_timeout_microseconds = int(1e6 * QUEUE_SECONDS)
    queue.timeout_action = pb.ModelQueuePolicy.TimeoutAction.Value("REJECT")
    queue.allow_timeout_override = True  # a client's own, shorter, timeout
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    return config


def _gpu(config: pb.ModelConfig, inputs: Tensors, runtime: Runtime, tower: bool) -> None:
    """Preferred batches, each warmed up before the model is ready, and the accelerators' own options."""
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    if runtime.provider == "tensorrt" and tower:
        modes = {"float32": "FP32", "float16": "FP16", "int8": "INT8"}
        options = {"precision_mode": modes[runtime.precision], "max_workspace_size_bytes": str(WORKSPACE)}
        options |= {"trt_engine_cache_enable": "true", "trt_engine_cache_path": runtime.engines}
        options |= {"trt_engine_cache_prefix": config.name, "trt_timing_cache_enable": "true"}
        options |= {"trt_timing_cache_path": runtime.engines, "trt_layer_norm_fp32_fallback": "true"}
        # One profile for every batch: without it each new size would build an engine while a request waits.
        for end, rows in (("min", 1), ("opt", config.max_batch_size), ("max", config.max_batch_size)):
            shapes = [f"{name}:{'x'.join(map(str, (rows, *dims)))}" for name, (_, dims) in inputs.items()]
            options[f"trt_profile_{end}_shapes"] = ",".join(shapes)
        accelerators.add(name="tensorrt", parameters=options)
    # Else float32 products would be rounded to 10 bits on tensor cores.
    accelerators.add(name="cuda", parameters={"use_tf32": "0"})
    sizes = [1 << k for k in range(1, config.max_batch_size.bit_length()) if 1 << k < config.max_batch_size]
    config.dynamic_batching.preferred_batch_size.extend([*sizes, config.max_batch_size])
    for size in (1, *sizes, config.max_batch_size):
        warmup = config.model_warmup.add(name=f"batch_{size}", batch_size=size)
        for name, (kind, dims) in inputs.items():
            warmup.inputs[name].data_type = pb.DataType.Value(kind)
            warmup.inputs[name].dims.extend(dims)
            warmup.inputs[name].zero_data = True


def write_preprocess(folder: Path, transform: Transform, max_batch_size: int) -> None:
    """The Python model that decodes images, with the same image code that the training used."""
    version = folder / "1"
    version.mkdir(parents=True)
    shutil.copyfile(TEMPLATES / "preprocess" / "model.py", version / "model.py")
    shutil.copyfile(Path(vilu.image.__file__), version / "image.py")
    write_config(
        folder,
        backend="python",
        inputs={"IMAGE": ("TYPE_STRING", [1])},
        outputs={"PIXELS": ("TYPE_UINT8", [transform.size, transform.size, 3])},
        max_batch_size=max_batch_size,
        parameters={name: str(getattr(transform, name)) for name in transform.__dataclass_fields__},
    )


def write_embeddings(
    folder: Path, class_set: ClassSet, tokenizer: Path, transform: TextTransform, fingerprint: str, max_batch_size: int
) -> None:
    """The Python model for embeddings in, with the class set's candidates or each request's own.

    Its graph, ragged.onnx, is written by `vilu.export.ragged`.

    Args:
        tokenizer: the file that `write_tokenizer` wrote, and `transform` what it returned.
        fingerprint: of the CLIP; with a prompt, the key of an embedding that is kept.
    """
    version = folder / "1"
    version.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(TEMPLATES / "vilu_embeddings" / "model.py", version / "model.py")
    shutil.copyfile(Path(vilu.text.__file__), version / "text.py")
    shutil.copyfile(tokenizer, version / "tokenizer.json")
    (version / "labels.txt").write_text("".join(f"{name}\n" for name in class_set.names), "utf-8")
    np.save(version / "text_embeddings.npy", class_set.text_embeddings.numpy(), allow_pickle=False)
    dim = class_set.text_embeddings.shape[1]
    config = _model(
        folder.name,
        "python",
        {"IMAGE_EMBEDDING": ("TYPE_FP32", [dim]), **_CANDIDATES, "TEXT_EMBEDDINGS": ("TYPE_FP32", [-1, dim])},
        ANSWER_TENSORS,
        max_batch_size,
        "cpu",
        {
            "templates": json.dumps(class_set.templates),
            "text_transform": json.dumps(vars(transform)),
            "fingerprint": fingerprint,
            "text_batch_size": str(max_batch_size),
            "text_cache_prompts": str(KEPT_PROMPTS),
            "max_labels": str(MAX_LABELS),
            "max_label_bytes": str(MAX_LABEL_BYTES),
            "intra_op_thread_count": "1",
        },
    )
    for tensor in config.input[1:]:
        tensor.optional = True
        tensor.allow_ragged_batch = True  # requests with other numbers of candidates still make one batch
    _write(folder, config)


_CANDIDATES: Tensors = {"LABELS": ("TYPE_STRING", [-1])}


def write_ensemble(folder: Path, max_batch_size: int, *, head: str = "vilu_head", candidates: bool = False) -> None:
    """An ensemble: IMAGE through preprocess, clip_image and `head` to the answer, with LABELS of the request's own
    where `candidates` is set."""
    own = _CANDIDATES if candidates else {}
    config = _config(folder.name, {"IMAGE": ("TYPE_STRING", [1]), **own}, ANSWER_TENSORS, max_batch_size)
    config.platform = "ensemble"
    answer = {name: name for name in ANSWER}
    for model, inputs, outputs in (
        ("preprocess", {"IMAGE": "IMAGE"}, {"PIXELS": "PIXELS"}),
        ("clip_image", {"PIXELS": "PIXELS"}, {"IMAGE_EMBEDDING": "IMAGE_EMBEDDING"}),
        (head, {name: name for name in ("IMAGE_EMBEDDING", *own)}, answer),
    ):
        config.ensemble_scheduling.step.add(model_name=model, model_version=-1, input_map=inputs, output_map=outputs)
    _write(folder, config)
    (folder / "1").mkdir()
    (folder / "1" / ".gitkeep").touch()


def _config(name: str, inputs: Tensors, outputs: Tensors, max_batch_size: int) -> pb.ModelConfig:
    config = pb.ModelConfig(name=name, max_batch_size=max_batch_size)
    for tensors, target in ((inputs, config.input), (outputs, config.output)):
        for tensor, (kind, dims) in tensors.items():
            target.add(name=tensor, data_type=pb.DataType.Value(kind), dims=dims)
    return config


def _write(folder: Path, config: pb.ModelConfig) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.pbtxt").write_text(text_format.MessageToString(config), "utf-8")
