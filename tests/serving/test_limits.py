"""The limits of `vilu export`, each at its edge, through the real server."""

import asyncio
import io
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vilu import UserError
from vilu.checkpoint import save_checkpoint
from vilu.export import build, checks
from vilu.export.job import Job
from vilu.export.limits import Limits
from vilu.export.sample import Sample
from vilu.serving import AsyncClient, Client, Server, ServerUnavailable

pytestmark = pytest.mark.server
BYTES, SIDE = 3000, 40
OPTIONS = [
    "--max-queue",
    "2",
    "--max-image-bytes",
    BYTES,
    "--max-image-pixels",
    SIDE * SIDE,
    "--max-labels",
    "3",
]
OPTIONS += ["--max-label-bytes", "5", "--queue-seconds", "20"]


def export_with(checkpoint, folder: Path, *options) -> subprocess.CompletedProcess:
    save_checkpoint(checkpoint, folder / "head.safetensors")
    command = [sys.executable, "-m", "vilu", "export", "--ckpt", folder / "head.safetensors", "--output", folder / "r"]
    return subprocess.run([*map(str, [*command, *options])], capture_output=True, text=True)


@pytest.fixture(scope="module")
def limited(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("limits")
    done = export_with(checkpoint, folder, "--max-batch-size", 2, *OPTIONS)
    assert done.returncode == 0, done.stderr
    with Server(folder / "r", log=folder / "log") as server:
        yield server


def jpeg(width: int, height: int, size: int = 0) -> bytes:
    """An image; what follows its end fills it up to `size` bytes and is read by nobody."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 40)).save(buffer, "JPEG")
    return buffer.getvalue().ljust(size, b"\0")


@pytest.mark.parametrize(
    ("image", "labels", "told"),
    [
        (jpeg(SIDE, SIDE, BYTES), None, None),
        (jpeg(SIDE, SIDE, BYTES + 1), None, f"{BYTES + 1} bytes, the limit is {BYTES}"),
        (jpeg(SIDE, SIDE), None, None),
        (jpeg(SIDE, SIDE + 1), None, f"{SIDE}x{SIDE + 1} pixels, the limit is {SIDE * SIDE}"),
        (jpeg(8, 8), ["a", "b", "c"], None),
        (jpeg(8, 8), ["a", "b", "c", "d"], "4 labels, the limit is 3"),
        (jpeg(8, 8), ["éé1", "b"], None),
        (jpeg(8, 8), ["ééé", "b"], "6 bytes, the limit is 5"),
    ],
    ids=["bytes", "bytes+1", "pixels", "pixels+1", "labels", "labels+1", "label bytes", "label bytes+1"],
)
def test_the_largest_is_taken_and_what_is_larger_refused(limited, image, labels, told):
    with Client(limited.grpc_url) as client:
        (answer,) = client.ask([image], labels)
    if told is None:
        assert answer.error is None
    else:
        assert told in answer.error


def burst(url: str, image: bytes, count: int = 96):
    """Answers and refusals of requests sent at once, by a client that has no time to try again; then one alone."""

    async def ask():
        async with AsyncClient(url, timeout=60) as client:
            client._retry = partial(_once, client)  # type: ignore[method-assign]  # every refusal is to be seen
            found = await asyncio.gather(*(client.ask([image]) for _ in range(count)), return_exceptions=True)
            return found, (await client.ask([image]))[0]

    async def _once(client, once):
        try:
            return await once()
        except Exception as error:
            raise client._user_error(error)[0] from None

    found, alone = asyncio.run(ask())
    refused = [str(one) for one in found if isinstance(one, ServerUnavailable)]
    answered = [one[0] for one in found if isinstance(one, list)]
    assert len(refused) + len(answered) == count
    assert all(np.isclose(one.failure_probability, alone.failure_probability, atol=1e-4) for one in answered)
    assert alone.error is None
    return refused, answered


def test_a_full_queue_refuses_at_once_and_recovers(limited):
    refused, answered = burst(limited.grpc_url, jpeg(SIDE, SIDE))
    assert answered
    assert refused
    assert all("maximum queue size" in told for told in refused)


@pytest.fixture
def with_limits(repository, clip, checkpoint, tmp_path):
    """The shared export, copied, with the configurations that other limits give: no graph is written again."""

    def write(limits: Limits) -> Path:
        root = shutil.copytree(repository, tmp_path / "r")
        runtime = checks.choose_runtime("cpu", None, "float32", None, "")
        nothing = Sample(np.empty(0), np.empty(0), np.empty(0))
        job = Job(checkpoint, clip, checkpoint.class_set, nothing, 8, runtime, limits, (), "exact")
        (tmp_path / "written" / "clip_text" / "1").mkdir(parents=True)
        build.write_models(job, tmp_path / "written")
        for path in (tmp_path / "written").glob("*/config.pbtxt"):
            shutil.copyfile(path, root / path.parent.name / path.name)
        return root

    return write


@pytest.mark.slow
def test_a_request_waits_no_longer_than_it_may(with_limits, tmp_path):
    with_limits(Limits(queue_seconds=0.02))
    with Server(tmp_path / "r", log=tmp_path / "log") as server:
        refused, answered = burst(server.grpc_url, jpeg(5000, 5000), 24)  # which takes longer than that to decode
    assert answered
    assert refused
    assert all("timeout expired" in told for told in refused)


def test_the_defaults_are_those_of_every_export(repository, with_limits, tmp_path):
    with_limits(Limits())
    configs = sorted(path.relative_to(repository) for path in repository.glob("*/config.pbtxt"))
    assert len(configs) > 8
    for path in configs:
        assert (tmp_path / "r" / path).read_text() == (repository / path).read_text()


@pytest.mark.slow
def test_without_a_limit_nothing_is_refused(with_limits, tmp_path):
    with_limits(Limits(max_queue=0))
    for path in (tmp_path / "r").glob("*/config.pbtxt"):
        assert "default_queue_policy" not in path.read_text()
    with Server(tmp_path / "r", log=tmp_path / "log") as server:
        refused, answered = burst(server.grpc_url, jpeg(SIDE, SIDE), 400)  # more than the default limit
    assert not refused
    assert len(answered) == 400


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--max-queue", "-1", "max_queue must be from 0"),
        ("--queue-seconds", "0", "queue_seconds must be from 1e-06 to 3,600"),
        ("--queue-seconds", "nan", "queue_seconds must be"),
        ("--max-image-bytes", "0", "max_image_bytes must be"),
        ("--max-image-pixels", "178956971", "max_image_pixels must be from 1 to 178,956,970"),
        ("--max-labels", "-1", "max_labels must be"),
        ("--max-label-bytes", "0", "max_label_bytes must be"),
    ],
)
def test_limits_that_cannot_be_kept_are_refused(option, value, told):
    name = option.strip("-").replace("-", "_")
    given: dict[str, Any] = {name: float(value) if name == "queue_seconds" else int(value)}
    with pytest.raises(UserError, match=told):
        Limits(**given)


def test_an_image_may_be_as_large_as_what_clip_reads(clip, checkpoint):
    least = clip.transform.size**2
    checks.check_clip(checkpoint, clip, checkpoint.class_set, Limits(max_image_pixels=least))
    with pytest.raises(UserError, match="max_image_pixels must be at least"):
        checks.check_clip(checkpoint, clip, checkpoint.class_set, Limits(max_image_pixels=least - 1))


def test_the_command_tells_a_bad_limit_in_one_line(checkpoint, tmp_path):
    done = export_with(checkpoint, tmp_path, "--max-queue", "-1")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["vilu: max_queue must be from 0 to 1,073,741,824, got -1"]
    assert not (tmp_path / "r").exists()
