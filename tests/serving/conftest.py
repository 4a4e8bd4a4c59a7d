"""One real server over the embedded default for the whole folder."""

import io
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vilu.preprocess.image import decode
from vilu.serving import Server
from vilu.tiny import data


@pytest.fixture(scope="session")
def server(repository, tmp_path_factory):
    with Server(repository, log=tmp_path_factory.mktemp("server") / "tritonserver.log") as running:
        yield running


@pytest.fixture(scope="session")
def eager(clip, checkpoint):
    """Image bytes to (label, confidence, failure probability) by the eager model."""

    def answer(image: bytes):
        t = checkpoint.class_set.text_embeddings
        v = clip.embed_images([decode(image, clip.transform)[None]])
        p = torch.softmax(clip.spec.logit_scale * v @ t.T, dim=1)
        failure = checkpoint.head.failure_probability(v, t)
        return checkpoint.class_set.names[int(p.argmax())], float(p.max()), float(failure)

    return answer


@pytest.fixture(scope="session")
def photos() -> list[bytes]:
    """Held-out digits as JPEG, PNG and WebP of several sizes."""
    out = []
    for i, image in enumerate(data.digits("test").images[:12]):
        buffer = io.BytesIO()
        picture = Image.fromarray(np.asarray(image)).resize((64 + 7 * i, 80))
        picture.save(buffer, ("JPEG", "PNG", "WEBP")[i % 3])
        out.append(buffer.getvalue())
    return out


BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="session")
def bench():
    """The modules of bench/ by their plain names, by which they import each other."""
    names = (
        "contenders",
        "faults",
        "hostile",
        "load",
        "loadgen",
        "new_names",
        "throughput",
        "throughput_rows",
        "traffic",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield {name: import_module(name) for name in names}


@pytest.fixture(scope="session")
def asking(bench, clip, checkpoint):
    traffic = bench["traffic"]
    world = traffic.World(clip, checkpoint, traffic.digits_and_shapes(32), traffic.label_sets(12))
    return traffic.Asking(world, 8)
