"""The head of a GPU repository: cubins in a Python model, with the same inputs and outputs as the ONNX head."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import vilu.kernels
from vilu.errors import UserError
from vilu.export import repository
from vilu.export.model_config import write_config
from vilu.kernels import FoldedHead

ARCHS = (80, 86, 89, 90, 100, 120)  # compute capabilities: 90 is 9.0
RUNTIME_FILES = ("dlpack.py", "launch.py", "plan.py")


def check_archs(archs: Sequence[int]) -> None:
    """Refuse compute capabilities that the kernel is not compiled for, before any work is done.

    Raises:
        UserError: one is not in ARCHS, or there is none.
    """
    wrong = [arch for arch in archs if arch not in ARCHS]
    if wrong or not archs:
        raise UserError(f"cuda-arch {', '.join(map(str, wrong)) or 'empty'}: expected {','.join(map(str, ARCHS))}")


def write_head(
    folder: Path,
    folded: FoldedHead,
    served: repository.Served,
    archs: Sequence[int],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Compile the head into its model's folder and write its Python model.

    Args:
        folder: the model's; its version 1 is written.
        folded: the head, folded over the class set.
        served: what all models of the repository share.
        archs: compute capabilities, of ARCHS.
        progress: called with one line for each kernel.

    Returns:
        The cubins' manifest.

    Raises:
        UserError: Triton is not installed, or a kernel does not fit a compute capability.
    """
    try:
        from vilu.kernels import aot
    except ModuleNotFoundError as error:
        raise UserError(f"--cuda-arch needs the package {error.name!r}: pip install 'vilu[gpu]'") from None

    version = folder / "1"
    manifest = aot.build(folded, archs, version / "cubins", progress=progress)
    shutil.copyfile(repository.TEMPLATES / "vilu_head" / "gpu.py", version / "model.py")
    shutil.copyfile(repository.TEMPLATES / "shared" / "sets.py", version / "sets.py")
    (version / "fused").mkdir()
    (version / "fused" / "__init__.py").touch()
    for name in RUNTIME_FILES:
        shutil.copyfile(Path(vilu.kernels.__file__).with_name(name), version / "fused" / name)
    repository.write_labels(version / "labels.txt", served.class_set.names)
    write_config(
        folder,
        backend="python",
        device="gpu",
        inputs={"IMAGE_EMBEDDING": ("TYPE_FP32", [served.dim])},
        outputs=repository.HEAD_TENSORS,
        max_batch_size=served.max_batch_size,
        limits=served.limits,
        queue_limit=False,
        # By default the server copies every input to the host first.
        parameters={
            **served.head_parameters,
            "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
        },
    )
    return manifest
