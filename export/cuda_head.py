"""The head of a GPU repository: cubins in a Python model, in the place of the ONNX graph and with its contract."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import vilu.kernels
from vilu.errors import UserError
from vilu.export import repository
from vilu.kernels import FoldedHead

ARCHS = (80, 86, 89, 90, 100, 120)
RUNTIME = ("dlpack.py", "launch.py", "plan.py")


def check_archs(archs: Sequence[int]) -> None:
    """Raises UserError for compute capabilities that nothing is compiled for, before any work is done."""
    wrong = [arch for arch in archs if arch not in ARCHS]
    if wrong or not archs:
        raise UserError(f"cuda-arch {', '.join(map(str, wrong)) or 'empty'}: expected {','.join(map(str, ARCHS))}")


def write_head(
    folder: Path,
    folded: FoldedHead,
    labels: Sequence[str],
    threshold: float,
    archs: Sequence[int],
    max_batch_size: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Compile the head into `folder` (the model's own) and write its Python model; returns the cubins' manifest.

    Raises:
        UserError: no Triton here, or a kernel that does not fit a compute capability.
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
    for name in RUNTIME:
        shutil.copyfile(Path(vilu.kernels.__file__).with_name(name), version / "fused" / name)
    repository.write_labels(version / "labels.txt", labels)
    repository.write_config(
        folder,
        backend="python",
        device="gpu",
        inputs={"IMAGE_EMBEDDING": ("TYPE_FP32", [folded.text_embeddings.shape[1]])},
        outputs=repository.HEAD_TENSORS,
        max_batch_size=max_batch_size,
        limited=False,
        # Else the server copies every input to the host first.
        parameters={"threshold": repr(threshold), "FORCE_CPU_ONLY_INPUT_TENSORS": "no"},
    )
    return manifest
