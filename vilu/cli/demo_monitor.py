"""The end of `vilu demo`: a promise is made, broken by darker and noisier images, seen to be broken, and kept again."""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vilu.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from vilu.checkpoint import Checkpoint
    from vilu.clip import Clip
    from vilu.serving import Answer, Client
    from vilu.serving.monitor import Report

CALIBRATED, STREAM = 2000, 1200  # images of the calibration, and of each part of the stream
TARGET = 0.1
START_SECONDS = 60.0
SEED = 11  # of the images; those of the evaluation have another


def promise(
    output: Path, repository: Path, clip: Clip, checkpoint: Checkpoint, say: Callable[[str], None]
) -> tuple[Report, Path]:
    """Run it: calibrate, serve and record a stream, shift it, raise the alarm, roll out another threshold.

    Args:
        output: folder for the record, the checkpoints, a copy of the repository and the picture.
        repository: what serves the checkpoint.
        say: prints a line.

    Returns:
        What the monitor found at the end, and the picture.
    """
    import shutil

    import numpy as np
    import torch

    from vilu.checkpoint import digest, load_checkpoint, save_checkpoint
    from vilu.cli.from_record import calibrate
    from vilu.evaluation.calibration import guaranteed_risk
    from vilu.evaluation.reference import summarise
    from vilu.export import versions
    from vilu.export.threshold import add_threshold
    from vilu.preprocess.image import pixels
    from vilu.serving.monitor import watch
    from vilu.serving.record import open_record
    from vilu.tiny import data

    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    served = shutil.copytree(repository, output / "model_repository", ignore=shutil.ignore_patterns("sets"))
    drawn = data.shapes("test", CALIBRATED + 3 * STREAM, seed=SEED)
    names = [drawn.names[label] for label in drawn.labels]
    assert checkpoint.class_set is not None
    t, place = checkpoint.class_set.text_embeddings, {name: i for i, name in enumerate(checkpoint.class_set.names)}
    parts = [np.stack([pixels(_image(image), clip.transform) for image in drawn.images[:CALIBRATED][i : i + 256]])
             for i in range(0, CALIBRATED, 256)]  # fmt: skip
    v = torch.cat([clip.embed_images([part]) for part in parts])
    index = (v @ t.T).argmax(dim=1).numpy()
    failure = checkpoint.head.failure_probability(v, t).numpy()
    right = index == np.array([place[name] for name in names[:CALIBRATED]])
    chosen = guaranteed_risk(failure, right, TARGET)
    reference = summarise(failure, index, len(place), v.numpy()) | {"target_risk": TARGET}
    made = replace(
        checkpoint, threshold=chosen.threshold, meta={**checkpoint.meta, "calibration": {"reference": reference}}
    )
    promised, repaired = output / "promised.safetensors", output / "repaired.safetensors"
    save_checkpoint(made, promised)
    versions.use(served, add_threshold(served, chosen.threshold, json.dumps(reference)))
    say(f"promise: at most {TARGET:.0%} of the accepted answers are wrong; {chosen.coverage:.0%} are accepted")

    record = str(output / "record")
    where = open_record(record, create=True)
    stream = iter(zip(drawn.images[CALIBRATED:], names[CALIBRATED:], strict=True))
    begun: list[float] = []
    with _serving(served, record, output / "server.log") as (client, token):

        def part(change: Callable[[np.ndarray], np.ndarray]) -> Report:
            """Ask about the next images, and give feedback on those that the server chose."""
            begun.append(time.time())
            _ask(client, record, [(_png(change(image)), name) for image, name in (next(stream) for _ in range(STREAM))])
            return watch(where, window=0.7)

        report = part(lambda image: image)
        say(_line("as calibrated", report))
        random = np.random.default_rng(SEED)
        report = part(lambda image: _darker(image, random))
        say(_line("darker, noisier", report))
        since = datetime.fromtimestamp(begun[-1], timezone.utc).replace(tzinfo=None)
        calibrate(promised, record, since, TARGET, 0.95, repaired)
        found = load_checkpoint(repaired)
        text = json.dumps(found.meta["calibration"]["reference"])
        new = add_threshold(served, found.threshold, text, checkpoint=digest(found))
        client.run(versions.switch, served, new, control_token=token)
        say(f"threshold {chosen.threshold:.3f} became {found.threshold:.3f} while the server answered")
        report = part(lambda image: _darker(image, random))
        say(_line("darker, noisier", report))
    picture = output / "monitor.png"
    _draw(picture, report, begun)
    return report, picture


def _image(image: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(image)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    _image(image).save(buffer, "PNG")
    return buffer.getvalue()


def _darker(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return the image at 80% of its brightness, with noise."""
    import numpy as np

    return np.clip(0.8 * image + random.normal(0, 20, image.shape), 0, 255).astype(np.uint8)


@contextlib.contextmanager
def _serving(repository: Path, record: str, log: Path) -> Iterator[tuple[Client, str]]:
    """Run `vilu serve --record`; yield a client and the control token."""
    from vilu.serving import Client
    from vilu.serving.address import free_port
    from vilu.serving.server import probe

    token, port = secrets.token_urlsafe(24), free_port()
    command = [sys.executable, "-m", "vilu", "serve", "--model-repository", str(repository), "--record", record]
    command += ["--grpc-port", str(port), "--http-port", "0", "--metrics-port", "0"]
    command += ["--record-embeddings", "--label-accepted", "0.7", "--label-rejected", "1"]
    environment = os.environ | {"VILU_CONTROL_TOKEN": token}
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environment) as process:
        try:
            end = time.monotonic() + START_SECONDS
            while True:
                with contextlib.suppress(UserError):
                    probe(f"127.0.0.1:{port}", timeout=2)
                    break
                if process.poll() is not None or time.monotonic() > end:
                    raise UserError(f"the server did not start; see {log}")
                time.sleep(0.2)
            with Client(f"127.0.0.1:{port}") as client:
                yield client, token
        finally:
            process.send_signal(signal.SIGTERM)


def _ask(client: Client, where: str, images: list[tuple[bytes, str]]) -> None:
    from vilu.serving.record import open_record
    from vilu.serving.record.feedback import give_feedback, read_feedback, to_label

    answers: list[Answer] = [answer.raise_for_error() for answer in client.stream([data for data, _ in images])]
    truth = {answer.id: name for answer, (_, name) in zip(answers, images, strict=True)}
    record, end = open_record(where), time.monotonic() + 20
    while sum(map(len, record.find(truth, ["id"]))) < len(truth):  # the last rows come within a second
        if time.monotonic() > end:
            raise UserError(f"{where}: rows are missing")
        time.sleep(0.1)
    lines = [json.dumps({"id": row["id"], "label": truth[row["id"]]}) for row in to_label(record) if row["id"] in truth]
    give_feedback(record, read_feedback("\n".join(lines)))


def _line(what: str, report: Report) -> str:
    now = report.watched[-1]
    last = f"risk {now.risk:.1%} ({now.low:.1%} to {now.high:.1%}), {now.accepted / now.answers:.0%} accepted"
    return f"{what}: {last}, {'ALARM: ' + ' and '.join(now.alarms) if now.alarms else 'no alarm'}"


def _draw(path: Path, report: Report, begun: list[float]) -> None:
    """Draw a PNG file with risk and coverage over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from vilu import atomic

    figure, axes = plt.subplots(2, 1, figsize=(10, 6), sharex=True, layout="constrained")
    start = begun[0]
    for one, colour in zip(report.watched, ("tab:blue", "tab:green"), strict=False):
        windows = [window for window in one.windows if window.labelled]
        x = [window.start - start for window in windows]
        bounds = [window.low for window in windows], [window.high for window in windows]
        axes[0].fill_between(x, *bounds, color=colour, alpha=0.2)
        label = f"threshold of version {one.model_version}"
        axes[0].plot(x, [window.risk for window in windows], color=colour, marker="o", label=label)
        axes[1].plot(x, [window.coverage for window in windows], color=colour, marker="o")
    axes[0].axhline(TARGET, color="tab:red", linestyle="--", label="target")
    for axis in axes:
        for at, what in zip(begun, ("as calibrated", "darker, noisier", "new threshold"), strict=True):
            axis.axvline(at - start, color="tab:gray", linewidth=1)
            if axis is axes[0]:
                axis.text(at - start + 0.1, 0.97, what, va="top", transform=axis.get_xaxis_transform(), fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="risk among the accepted", ylim=(0, 0.6))
    axes[0].legend(loc="center right")
    axes[1].set(ylabel="coverage", xlabel="seconds", ylim=(0, 1))
    with atomic.file(path) as part:
        figure.savefig(part, dpi=90, format="png")
    plt.close(figure)
