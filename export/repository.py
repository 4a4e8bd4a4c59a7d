"""config.pbtxt for every model of the repository, written through Triton's own ModelConfig protobuf."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

import vilu.image
from vilu.export.graphs import ANSWER
from vilu.image import Transform

TEMPLATES = Path(__file__).parent / "templates"
Tensors = Mapping[str, tuple[str, Sequence[int]]]

_ANSWER_TYPES = dict(zip(ANSWER, ("TYPE_STRING", "TYPE_INT32", "TYPE_FP32", "TYPE_FP32", "TYPE_BOOL"), strict=True))
ANSWER_TENSORS: Tensors = {name: (kind, [1]) for name, kind in _ANSWER_TYPES.items()}


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
    config = _config(folder.name, inputs, outputs, max_batch_size)
    config.backend = backend
    config.default_model_filename = "model.py" if backend == "python" else "model.onnx"
    config.instance_group.add(kind=pb.ModelInstanceGroup.Kind.Value(f"KIND_{device.upper()}"), count=1)
    config.dynamic_batching.SetInParent()
    for key, value in (parameters or {}).items():
        config.parameters[key].string_value = value
    _write(folder, config)


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


def write_ensemble(folder: Path, max_batch_size: int) -> None:
    """The ensemble `vilu`: IMAGE through preprocess, clip_image and vilu_head to the answer."""
    config = _config(folder.name, {"IMAGE": ("TYPE_STRING", [1])}, ANSWER_TENSORS, max_batch_size)
    config.platform = "ensemble"
    answer = {name: name for name in ANSWER}
    for model, inputs, outputs in (
        ("preprocess", {"IMAGE": "IMAGE"}, {"PIXELS": "PIXELS"}),
        ("clip_image", {"PIXELS": "PIXELS"}, {"IMAGE_EMBEDDING": "IMAGE_EMBEDDING"}),
        ("vilu_head", {"IMAGE_EMBEDDING": "IMAGE_EMBEDDING"}, answer),
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
