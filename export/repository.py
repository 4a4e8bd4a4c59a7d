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

import vilu.preprocess.class_names
import vilu.preprocess.image
import vilu.preprocess.text
from vilu.class_set import ClassSet
from vilu.errors import UserError
from vilu.export.graphs import ANSWER
from vilu.preprocess.image import Transform
from vilu.preprocess.text import TextTransform

CONFIG = "config.pbtxt"
TEMPLATES = Path(__file__).parent / "templates"
Tensors = Mapping[str, tuple[str, Sequence[int]]]

_ANSWER_TYPES = dict(zip(ANSWER, ("TYPE_STRING", "TYPE_INT32", "TYPE_FP32", "TYPE_FP32", "TYPE_BOOL"), strict=True))
ANSWER_TENSORS: Tensors = {name: (kind, [1]) for name, kind in _ANSWER_TYPES.items()}
CLASS_SET: Tensors = {"CLASS_SET": ("TYPE_STRING", [1])}  # NAME@VERSION; empty for candidates of the request's own
VERSION: Tensors = {"CLASS_SET_VERSION": ("TYPE_INT32", [1])}
HEAD_TENSORS: Tensors = {**ANSWER_TENSORS, **CLASS_SET, **VERSION}


def details(dim: int) -> Tensors:
    """What is computed only for who asks for it."""
    return {
        "TOP_LABELS": ("TYPE_STRING", [-1]),
        "TOP_PROBABILITIES": ("TYPE_FP32", [-1]),
        "ENTROPY": ("TYPE_FP32", [1]),
        "DOCTOR": ("TYPE_FP32", [1]),
        "CONCEPTS": ("TYPE_STRING", [-1]),
        "CONCEPT_WEIGHTS": ("TYPE_FP32", [-1]),
        "IMAGE_EMBEDDING": ("TYPE_FP32", [dim]),
    }


# A label set of a request's own; a label is a name or a caption, not a text.
MAX_LABELS, MAX_LABEL_BYTES = 1000, 256
MAX_TEXT_BYTES = 4096  # a label in its prompt
# Class sets that are put while the server runs.
MAX_CLASSES, MAX_CLASS_SETS = 100_000, 100
KEPT_PROMPTS = 16384  # whose text embeddings an open-vocabulary server keeps: 32 MB at D = 512
# Requests that may wait before one model, and for how long: more are refused at once, with UNAVAILABLE.
MAX_QUEUE, QUEUE_SECONDS = 256, 30.0
# Cores that one instance of a tower still makes good use of; more cores get more instances.
CORES_PER_INSTANCE = 8
# Of the text tower's process, where images want the same cores: names that nobody asked before are much work, and can
# wait. 10 instead of 5 helped the images no further (`bench/new_names.py`).
TEXT_NICE = 5
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
    limited: bool = True,
) -> None:
    """One model's config.pbtxt: explicit batch size, one instance on `device` ("cpu" or "gpu"), dynamic batching.

    limited: its queue has a size and a timeout. With such a queue tritonserver (2.51) does not look at a request that
    came while its only instance was busy before the next one comes, or half a second has passed: the end of a batch
    wakes nobody. What ends an ensemble, and is faster than the limited steps before it, needs none.
    """
    config = _model(folder.name, backend, inputs, outputs, max_batch_size, device, parameters or {})
    if not limited:
        config.dynamic_batching.ClearField("default_queue_policy")
    save_config(folder, config)


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
        if folder.name == "clip_text":
            parameters["nice"] = str(TEXT_NICE)
    config = _model(folder.name, "onnxruntime", inputs, outputs, max_batch_size, runtime.device, parameters)
    if runtime.device == "cpu":
        config.instance_group[0].count = instances
    else:
        _gpu(config, inputs, runtime, tower)
    save_config(folder, config)


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
    shutil.copyfile(Path(vilu.preprocess.image.__file__), version / "image.py")
    write_config(
        folder,
        backend="python",
        inputs={"IMAGE": ("TYPE_STRING", [1])},
        outputs={"PIXELS": ("TYPE_UINT8", [transform.size, transform.size, 3])},
        max_batch_size=max_batch_size,
        parameters={name: str(getattr(transform, name)) for name in transform.__dataclass_fields__},
    )


def write_folded_head(
    folder: Path, class_set: ClassSet, threshold: float, fingerprint: str, max_batch_size: int
) -> None:
    """The Python model around the folded head's graph, which answers from other class sets through ragged.onnx.

    The graphs, model.onnx and ragged.onnx, are written by `vilu.export`.
    """
    _write_head(folder, class_set, threshold, fingerprint, max_batch_size, {}, HEAD_TENSORS)


def write_details_model(
    folder: Path, class_set: ClassSet, threshold: float, fingerprint: str, max_batch_size: int
) -> None:
    """The Python model of what is told of an answer when asked for, from the class set that was answered from.

    A model, so a process, of its own: the text tower does not hold it up, as it does vilu_embeddings. Its graph,
    details.onnx, is written by `vilu.export.open_vocabulary`.
    """
    outputs = details(class_set.text_embeddings.shape[1])
    _write_head(folder, class_set, threshold, fingerprint, max_batch_size, VERSION, outputs)


def _write_head(
    folder: Path,
    class_set: ClassSet,
    threshold: float,
    fingerprint: str,
    max_batch_size: int,
    inputs: Tensors,
    outputs: Tensors,
) -> None:
    _write_head_files(folder, class_set, "vilu_head/cpu.py")
    write_config(
        folder,
        backend="python",
        inputs={"IMAGE_EMBEDDING": ("TYPE_FP32", [class_set.text_embeddings.shape[1]]), **inputs},
        outputs=outputs,
        max_batch_size=max_batch_size,
        parameters={"threshold": repr(threshold), "fingerprint": fingerprint, "intra_op_thread_count": "1"},
        limited=False,
    )


def write_embeddings(
    folder: Path, class_set: ClassSet, threshold: float, fingerprint: str, max_batch_size: int
) -> None:
    """The Python model for embeddings in, with a class set's candidates or each request's own.

    Its graphs, ragged.onnx and details.onnx, are written by `vilu.export.open_vocabulary`.

    Args:
        fingerprint: of the CLIP; with a prompt, the key of an embedding that is kept.
    """
    _write_head_files(folder, class_set, "vilu_embeddings/model.py")
    dim = class_set.text_embeddings.shape[1]
    rows: Tensors = {"TEXT_EMBEDDINGS": ("TYPE_FP32", [-1, dim])}
    config = _model(
        folder.name,
        "python",
        {"IMAGE_EMBEDDING": ("TYPE_FP32", [dim]), **_CANDIDATES, **rows},
        {**HEAD_TENSORS, **details(dim)},
        max_batch_size,
        "cpu",
        {
            "templates": json.dumps(class_set.templates),
            "threshold": repr(threshold),
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
    save_config(folder, config)


def _write_head_files(folder: Path, class_set: ClassSet, model: str) -> None:
    version = folder / "1"
    version.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(TEMPLATES / model, version / "model.py")
    for shared in ("head.py", "sets.py"):
        shutil.copyfile(TEMPLATES / "shared" / shared, version / shared)
    write_labels(version / "labels.txt", class_set.names)
    np.save(version / "text_embeddings.npy", class_set.text_embeddings.numpy(), allow_pickle=False)


def write_class_sets(
    folder: Path, class_set: ClassSet, threshold: float, fingerprint: str, max_batch_size: int
) -> None:
    """The Python model that lists class sets and, loaded with a change in its config, puts or removes one."""
    version = folder / "1"
    version.mkdir(parents=True)
    shutil.copyfile(TEMPLATES / "class_sets" / "model.py", version / "model.py")
    shutil.copyfile(TEMPLATES / "shared" / "sets.py", version / "sets.py")
    shutil.copyfile(Path(vilu.preprocess.class_names.__file__), version / "class_names.py")
    write_labels(version / "labels.txt", class_set.names)
    write_config(
        folder,
        backend="python",
        inputs={"NAME": ("TYPE_STRING", [1])},
        outputs={"CLASS_SETS": ("TYPE_STRING", [1])},
        max_batch_size=max_batch_size,
        parameters={
            "templates": json.dumps(class_set.templates),
            "threshold": repr(threshold),
            "fingerprint": fingerprint,
            "dim": str(class_set.text_embeddings.shape[1]),
            "max_classes": str(MAX_CLASSES),
            "max_class_sets": str(MAX_CLASS_SETS),
            "max_label_bytes": str(MAX_LABEL_BYTES),
        },
    )


def write_tokenize(folder: Path, tokenizer: Path, transform: TextTransform, length: int, max_batch_size: int) -> None:
    """The Python model from strings to token ids.

    Args:
        tokenizer: the file that `write_tokenizer` wrote, and `transform` what it returned.
        length: how many ids a text has.
    """
    version = folder / "1"
    version.mkdir(parents=True)
    shutil.copyfile(TEMPLATES / "tokenize" / "model.py", version / "model.py")
    shutil.copyfile(Path(vilu.preprocess.text.__file__), version / "text.py")
    shutil.copyfile(tokenizer, version / "tokenizer.json")
    write_config(
        folder,
        backend="python",
        inputs={"TEXT": ("TYPE_STRING", [1])},
        outputs={"TOKENS": ("TYPE_INT64", [length])},
        max_batch_size=max_batch_size,
        parameters={"text_transform": json.dumps(vars(transform)), "max_text_bytes": str(MAX_TEXT_BYTES)},
    )


def write_labels(path: Path, names: Sequence[str]) -> None:
    path.write_text("".join(f"{name}\n" for name in names), "utf-8")


_CANDIDATES: Tensors = {"LABELS": ("TYPE_STRING", [-1])}


@dataclass(frozen=True)
class Step:
    """A model of an ensemble: its inputs and outputs, by the names they have among the ensemble's tensors."""

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


def write_ensemble(folder: Path, inputs: Tensors, outputs: Tensors, steps: Sequence[Step], max_batch_size: int) -> None:
    config = _config(folder.name, inputs, outputs, max_batch_size)
    config.platform = "ensemble"
    for step in steps:
        config.ensemble_scheduling.step.add(
            model_name=step.model, model_version=-1, input_map=step.inputs, output_map=step.outputs
        )
    save_config(folder, config)
    (folder / "1").mkdir()
    (folder / "1" / ".gitkeep").touch()


def write_answering(
    folder: Path, dim: int, max_batch_size: int, *, head: str, details_from: str, candidates: bool = False
) -> None:
    """An ensemble: IMAGE through preprocess, clip_image and `head` to the answer, with LABELS of the request's own
    where `candidates` is set.

    Details are another step, which Triton leaves out where none of its outputs is asked for: inside an ensemble a
    model cannot see what was. That works only where no output of the ensemble is also a step's input (the server
    would count it twice and leave out too much), so the embedding comes back out of that step, and what ties it to
    the step before is not an output: the version of the class set that was answered from, or the embedding handed on.

    Each step waits for the one before. Where two run at a time and one fails, tritonserver (2.51) may answer twice,
    which ends it, lets the other read the request after its memory is gone, and counts the request as in flight for
    ever (`EnsembleContext` in its core: `PrepareSteps`, `ScheduleSteps`).
    """
    own = _CANDIDATES if candidates else {}
    chosen = {"IMAGE_EMBEDDING": "embedding", **dict.fromkeys(own, "LABELS")}
    tie = {"IMAGE_EMBEDDING": "answered"} if candidates else {"CLASS_SET_VERSION": "version"}
    optional = details(dim)
    write_ensemble(
        folder,
        {"IMAGE": ("TYPE_STRING", [1]), **own},
        {**ANSWER_TENSORS, **CLASS_SET, **optional},
        [
            Step("preprocess", {"IMAGE": "IMAGE"}, {"PIXELS": "pixels"}),
            Step("clip_image", {"PIXELS": "pixels"}, {"IMAGE_EMBEDDING": "embedding"}),
            Step(head, chosen, {name: name for name in (*ANSWER_TENSORS, *CLASS_SET)} | tie),
            Step(details_from, chosen | tie, {name: name for name in optional}),
        ],
        max_batch_size,
    )


def write_text(folder: Path, dim: int, max_batch_size: int) -> None:
    """The ensemble from a text to its embedding."""
    write_ensemble(
        folder,
        {"TEXT": ("TYPE_STRING", [1])},
        {"TEXT_EMBEDDING": ("TYPE_FP32", [dim])},
        [
            Step("tokenize", {"TEXT": "TEXT"}, {"TOKENS": "tokens"}),
            Step("clip_text", {"TOKENS": "tokens"}, {"TEXT_EMBEDDING": "TEXT_EMBEDDING"}),
        ],
        max_batch_size,
    )


def _config(name: str, inputs: Tensors, outputs: Tensors, max_batch_size: int) -> pb.ModelConfig:
    config = pb.ModelConfig(name=name, max_batch_size=max_batch_size)
    for tensors, target in ((inputs, config.input), (outputs, config.output)):
        for tensor, (kind, dims) in tensors.items():
            target.add(name=tensor, data_type=pb.DataType.Value(kind), dims=dims)
    return config


def load_config(path: Path) -> pb.ModelConfig:
    """A config.pbtxt. Raises UserError where it is none."""
    try:
        return text_format.Parse(path.read_text("utf-8"), pb.ModelConfig())
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise UserError(f"{path}: not a Triton model configuration ({error})") from None


def save_config(folder: Path, config: pb.ModelConfig) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(text_format.MessageToString(config), "utf-8")
