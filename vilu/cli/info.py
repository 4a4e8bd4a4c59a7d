"""`vilu info` says what a checkpoint or a model repository holds."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vilu.cli import output as said
from vilu.cli.command import Command
from vilu.cli.options import PATH
from vilu.errors import UserError

if TYPE_CHECKING:
    from vilu.checkpoint import Checkpoint

FEW = 5  # class names that a line shows
Line = tuple[str, str]


@click.command("info", cls=Command, extra="export")
@click.argument("path", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, with all class names.")
def info_command(path: Path, as_json: bool) -> None:
    """Say what a checkpoint or a model repository holds.

    PATH is a checkpoint: its CLIP, classes, head, threshold, promise and training data are shown. Or it is a folder
    that `vilu export` wrote: its models, versions, limits and class sets are shown, too.
    """
    if path.is_dir():
        from vilu.serving.about import about_repository

        about = {"kind": "model repository", "path": str(path), **about_repository(path)}
        lines = _repository_lines(about)
    elif path.is_file():
        from vilu.checkpoint import load_checkpoint, written_with

        about = {"kind": "checkpoint", "path": str(path), "bytes": path.stat().st_size}
        about |= _about_checkpoint(load_checkpoint(path)) | {"libraries": written_with(path)}
        lines = _checkpoint_lines(about)
    else:
        raise UserError(f"{path}: {'not a file or folder' if path.exists() else 'no such file or folder'}")
    if as_json:
        said.document(about)
        return
    for name, text in lines:
        said.result(_fitted(name, said.printable(text)))


def _fitted(name: str, text: str) -> str:
    """Return one line, or in a terminal as many as its width needs."""
    line = f"{name:<14}{text}"
    if not said.in_terminal():
        return line
    width = shutil.get_terminal_size().columns
    return "\n".join(textwrap.wrap(line, width, subsequent_indent=" " * 14, break_on_hyphens=False)) or line


def _about_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    from dataclasses import asdict

    from vilu.outlier import about_outlier

    classes, meta = checkpoint.class_set, dict(checkpoint.meta)
    head = {**checkpoint.head.config(), "parameters": sum(p.numel() for p in checkpoint.head.parameters())}
    return {
        "clip": asdict(checkpoint.clip) if checkpoint.clip else None,
        "class_set": None
        if classes is None
        else {"classes": len(classes), "names": list(classes.names), "templates": list(classes.templates)},
        "head": head,
        "threshold": checkpoint.threshold,
        "calibration": meta.pop("calibration", None),
        "outlier": about_outlier(checkpoint.outlier),
        "training": meta,
        "fingerprints": None if checkpoint.samples is None else len(checkpoint.samples),
    }


def _checkpoint_lines(about: Mapping[str, Any]) -> Iterable[Line]:
    yield "checkpoint", f"{about['path']}, {_size(about['bytes'])}"
    yield from _clip_line(about["clip"])
    yield "classes", _classes(about["class_set"])
    head = about["head"]
    layers = "-".join(map(str, (head["dim"] * len(head["parts"]), *head["hidden"], 1)))
    prior = "; starts from CLIP's own confidence" if head["logit_scale"] is not None else ""
    yield (
        "head",
        f"reads {', '.join(head['parts'])} ({head['dim']} wide); {head['projection']} projections; MLP {layers}; "
        f"{head['parameters']:,} parameters{prior}",
    )
    yield from _threshold_lines(about)
    yield from _outlier_line(about["outlier"])
    yield from _training_lines(about["training"])
    if about["fingerprints"] is not None:
        yield "remembers", f"{about['fingerprints']} of its training samples, so that eval and calibrate know them"
    yield from _libraries_line(about["libraries"])


def _repository_lines(about: Mapping[str, Any]) -> Iterable[Line]:
    yield "repository", about["path"]
    yield from _clip_line(about["clip"])
    yield "classes", _classes(about["class_set"])
    yield from _threshold_lines(about)
    yield from _outlier_line(about["outlier"])
    decoded = f"; images decoded {about['preprocess']}" if about["preprocess"] else ""
    yield "runs as", f"{about['precision']}, {about['device']}, {about['provider']}{decoded}"
    for provider, row in _items(about["answers"]):
        error = _at(row, "failure_probability_error", "max")
        agreement = _at(row, "argmax_agreement")
        if isinstance(agreement, float) and isinstance(error, float):
            yield "parity", f"{provider}: {agreement:.2%} of the answers as PyTorch's, P(failure) within {error:.1e}"
    yield from _cascade_lines(about["cascade"])
    if about["over_budget"]:
        yield "over budget", "; ".join(map(str, about["over_budget"]))
    versions = ", ".join(map(str, about["versions"]))
    yield "versions", f"{versions or 'none that all models have'}; {about['served']} is served"
    for model in about["models"]:
        yield (
            "model",
            f"{model['name']}: {model['backend']}, versions {', '.join(map(str, model['versions']))}, "
            f"batches of {model['max_batch_size']}{_instances(model['instances'])}",
        )
    yield "limits", ", ".join(f"{name} {value:,.12g}" for name, value in about["limits"].items()) or "none"
    for one in about["class_sets"]:
        threshold = "the default threshold" if one["threshold"] is None else f"threshold {one['threshold']}"
        yield "class set", f"{one['name']}@{one['version']}: {one['classes']} classes, {threshold}"
    yield from _libraries_line(about["libraries"])


def _cascade_lines(cascade: Mapping[str, Any] | None) -> Iterable[Line]:
    if not cascade:
        return
    note = cascade["calibration"] if isinstance(cascade["calibration"], dict) else {}
    how = "; not calibrated"
    if note:
        what = "accepted answers wrong" if note.get("rule") == "risk" else "of the last stage's accuracy lost"
        how = f"; at most {_percent(note.get('target'))} {what}, with {_percent(note.get('confidence'))} confidence"
    rule = f"an image goes on to the next stage where P(failure) > {_number(cascade['threshold'])}"
    yield "cascade", f"{cascade['front']}: {rule}{how}"
    for number, stage in enumerate(cascade["stages"], 2):
        (_, clip), *_ = _clip_line(_at(stage, "clip"))
        threshold = _number(stage["threshold"])
        yield (
            f"stage {number}",
            f"{clip}; {stage['precision']}, {stage['provider']}; accepted where P(failure) < {threshold}",
        )


def _outlier_line(outlier: Any) -> Iterable[Line]:
    if isinstance(outlier, dict):
        threshold, refused = _number(outlier.get("threshold")), _percent(outlier.get("refused"))
        yield (
            "outliers",
            "no threshold: ACCEPT does not look at it"
            if outlier.get("threshold") is None
            else f"answers above {threshold} are not accepted: at most {refused} of images inside the class set",
        )


def _instances(count: int) -> str:
    """An ensemble has none of its own."""
    return "" if not count else ", 1 instance" if count == 1 else f", {count} instances"


def _clip_line(clip: Mapping[str, Any] | None) -> Iterable[Line]:
    if not clip:
        yield "CLIP", "none is named: the head reads embeddings that another program makes"
        return
    weights = f" ({clip['pretrained']})" if clip.get("pretrained") else ""
    fingerprint = str(clip.get("fingerprint") or "unknown")
    yield (
        "CLIP",
        f"{clip.get('name')}{weights}, logit scale {_number(clip.get('logit_scale'))}, fingerprint {fingerprint[:12]}",
    )


def _classes(classes: Mapping[str, Any] | None) -> str:
    if classes is None:
        return "none: captions, or a file of the authors'"
    names = classes["names"]
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    prompts = classes.get("templates")
    text = f"{len(names)}: {', '.join(names[:FEW])}{more}"
    return text + (f"; prompts {', '.join(map(repr, prompts))}" if prompts else "")


def _threshold_lines(about: Mapping[str, Any]) -> Iterable[Line]:
    note = about["calibration"] if isinstance(about["calibration"], dict) else {}
    chosen = note.get("threshold") if isinstance(note.get("threshold"), dict) else None
    how = "; not calibrated" if chosen is None else ""
    yield "threshold", f"answers are accepted where P(failure) < {_number(about['threshold'])}{how}"
    if chosen is not None:
        where = (
            f"{chosen.get('samples')} samples of {chosen.get('data') or note.get('data')}, split {note.get('split')}"
        )
        if chosen.get("bound") is None:
            text = f"none: the threshold was chosen for {chosen.get('rule')} {chosen.get('target')} on {where}"
        else:
            text = (
                f"at most {_percent(chosen.get('target'))} of the accepted answers are wrong, with "
                f"{_percent(chosen.get('confidence'))} confidence; from {where}"
            )
        accepted = f"{_percent(chosen.get('coverage'))} accepted, {_percent(chosen.get('risk'))} of them wrong there"
        yield "promise", f"{text}: {accepted}"
    probability = note.get("probability")
    if isinstance(probability, dict):
        yield "calibrated", f"P(failure) by {probability.get('method')} on {probability.get('samples')} samples"


def _training_lines(meta: Mapping[str, Any]) -> Iterable[Line]:
    known = {name: value for name, value in meta.items() if name != "logit_scale"}  # the line of the CLIP has it
    data = known.pop("data", None) or known.pop("source", None)
    if data:
        samples = known.pop("samples", None)
        yield "trained on", f"{data}{'' if samples is None else f', {samples} samples'}"
    accuracy, chance = known.pop("accuracy", None), known.pop("chance", None)
    if accuracy is not None:
        yield "accuracy", f"CLIP is right on {_percent(accuracy)} of the training data (chance {_percent(chance)})"
    figures = known.pop("validation", None)
    if isinstance(figures, dict):
        yield (
            "figures",
            f"AUC {_percent(figures.get('auc'))} (MCM {_percent(figures.get('mcm_auc'))}), FPR95 "
            f"{_percent(figures.get('fpr95'))} (MCM {_percent(figures.get('mcm_fpr95'))}) on "
            f"{figures.get('samples')} samples with {figures.get('failures')} failures",
        )
    recipe = known.pop("recipe", None)
    if isinstance(recipe, dict):
        yield "recipe", f"{recipe.get('name')}, seed {recipe.get('seed')}, best epoch {known.pop('best_epoch', None)}"
    rest = {name: value for name, value in known.items() if value not in (None, 0, [], {})}
    if rest:
        yield "notes", ", ".join(f"{name} {_short(value)}" for name, value in rest.items())


def _libraries_line(libraries: Mapping[str, Any] | None) -> Iterable[Line]:
    if libraries:
        yield "written with", ", ".join(f"{name} {version}" for name, version in libraries.items())


def _items(value: Any) -> Iterable[tuple[str, Any]]:
    return value.items() if isinstance(value, dict) else ()


def _at(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else str(value)


def _percent(value: Any) -> str:
    return f"{100 * value:.4g}%" if isinstance(value, int | float) else str(value)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
