"""A model repository before the start: what would hang or fail a load later is found here."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

from vilu.errors import UserError
from vilu.serving.about import load_config

_FILES = {"python": "model.py", "onnxruntime": "model.onnx"}  # a backend's model file, where the config names none


def check_repository(root: Path) -> None:
    """Refuse what would hang or fail a load later.

    Raises:
        UserError: one line for the first problem found.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such model repository")
    models = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not models:
        raise UserError(f"{root}: holds no models; write them with `vilu export`")
    names = {model.name for model in models}
    for model in models:
        config = model / "config.pbtxt"
        try:
            text = config.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            raise UserError(f"{config}: missing or not text") from None
        for needed in (*_stages(config), *re.findall(r'^\s*model_name:\s*"([^"]+)"', text, re.MULTILINE)):
            if needed not in names:
                raise UserError(f"{config}: names the model {needed!r}, which the repository lacks")
        versions = [path for path in model.iterdir() if path.is_dir() and path.name.isdigit()]
        if not versions:
            raise UserError(f"{model}: has no version folder")
        backend = re.search(r'^\s*backend:\s*"(\w+)"', text, re.MULTILINE)
        default = re.search(r'^\s*default_model_filename:\s*"([^"]+)"', text, re.MULTILINE)
        file = default[1] if default else _FILES.get(backend[1] if backend else "")
        for folder in versions:
            if file and not (folder / file).is_file():
                raise UserError(f"{folder / file}: missing")


def _stages(path: Path) -> list[str]:
    """Refuse what is no configuration. Return the models that a cascade's router asks."""
    if not find_spec("tritonclient"):
        return []
    config = load_config(path)
    if path.parent.name != "vilu_router":
        return []
    try:
        stages = json.loads(config.parameters["stages"].string_value)
        asked = [f"{stage['prefix']}{name}" for stage in stages for name in ("clip_image", "vilu_head", "vilu_details")]
        # Exports before 2026-11-27 have no such ensembles.
        return asked + [stage["model"] + end for stage in stages if "model" in stage for end in ("", "_open")]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path}: does not name the stages of its cascade") from None
