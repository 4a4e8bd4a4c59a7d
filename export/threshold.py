"""Another threshold as a version of its own: a copy of the served version in which nothing else is changed.

No graph is exported again. Files of a version never change, so large ones are shared with the copy by hard links where
the file system has them, except those that hold the threshold.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir

from vilu import atomic
from vilu.errors import UserError
from vilu.export import onnx_file, versions
from vilu.export.model_config import save_config
from vilu.serving.about import CONFIG, load_config

SHARED_FROM = 1 << 20  # bytes


def add_threshold(repository: Path, threshold: float, reference: str = "", *, checkpoint: str = "") -> int:
    """Put a version beside the others that is the served one with another threshold; `versions.use` has it served.

    Args:
        repository: what `vilu export` wrote.
        threshold: answers with a lower failure probability are accepted; in [0, 1].
        reference: what a monitor compares the answers with, in JSON; "" keeps the served version's.
        checkpoint: the digest of the checkpoint that the threshold was chosen for; "" for any.

    Returns:
        The new version's number.

    Raises:
        UserError: not such a repository, a threshold out of range, another checkpoint's repository, or a folder that
            cannot be written; the repository is as it was.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold must be in [0, 1], got {threshold}")
    present = versions.versions(repository)
    now = versions.served(repository)
    if (repository / "vilu_router" / CONFIG).is_file():
        raise UserError(f"{repository}: serves a cascade, whose stages have thresholds of their own; export it again")
    head = next(name for name in ("vilu_head", "vilu_embeddings") if (repository / name / CONFIG).is_file())
    served = load_config(repository / head / CONFIG).parameters
    there = served["checkpoint"].string_value if "checkpoint" in served else ""
    if checkpoint and there and checkpoint != there:
        raise UserError(
            f"{repository}: serves another head than this checkpoint's; export the checkpoint as a new version"
        )
    new = max(present) + 1
    with atomic.folder(repository) as staging:
        shutil.copytree(repository, staging, dirs_exist_ok=True, copy_function=_copy)
        versions.keep(staging, now)
        for model in versions.models(staging):
            folder = staging / model / str(new)
            shutil.copytree(staging / model / str(now), folder, copy_function=_copy)
            config = load_config(folder / CONFIG)
            if "threshold" in config.parameters:
                config.parameters["threshold"].string_value = repr(threshold)
            if reference and "calibration" in config.parameters:
                config.parameters["calibration"].string_value = reference
            save_config(folder, config)
            for graph in folder.glob("*.onnx"):
                _set_threshold(graph, threshold)
        report = staging / versions.keeper(staging) / str(new) / "parity.json"
        said = json.loads(report.read_text("utf-8"))
        # `head` names what was exported, which had another threshold.
        said |= {"threshold": threshold, "head": f"{said.get('head', '')} with threshold {threshold!r}"}
        report.unlink()
        report.write_text(json.dumps(said, indent=2) + "\n", "utf-8")
        versions.serve(staging, now)  # a first export leaves it to the newest version
    return new


def _copy(source: str, target: str) -> str:
    """Copy a file, by a link where it is large. No file of a version is written to, only replaced."""
    if os.path.getsize(source) >= SHARED_FROM:
        try:
            os.link(source, target)
            return target
        except OSError:
            pass
    return str(shutil.copy2(source, target))


def _set_threshold(path: Path, threshold: float) -> None:
    """Replace the threshold of a graph that gives ACCEPT; other graphs stay."""
    model = ir.load(path)
    accept = [value for value in model.graph.outputs if value.name == "ACCEPT"]
    if not accept:
        return
    less = accept[0].producer()
    if less is not None and less.op_type == "And":  # P(failure) and the outlier score, which keeps its threshold
        both = [value.producer() for value in less.inputs if value is not None]
        less = next((node for node in both if node is not None and node.op_type == "Less"), None)
    if less is None or less.op_type != "Less" or (value := less.inputs[1]) is None:
        raise UserError(f"{path}: has no threshold where `vilu export` puts it; export the checkpoint again")
    number = ir.tensor(np.float32(threshold), name=value.name)
    if value.name is not None and value.name in model.graph.initializers:
        model.graph.initializers[value.name].const_value = number
    else:
        node = value.producer()
        if node is None or node.op_type != "Constant":
            raise UserError(f"{path}: has no threshold where `vilu export` puts it; export the checkpoint again")
        node.attributes["value"] = ir.AttrTensor("value", number)
    onnx_file.save(model, path)
