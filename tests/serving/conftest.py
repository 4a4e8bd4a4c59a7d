"""One real server over the embedded default for the whole folder."""

import io
import shutil

import grpc
import numpy as np
import pytest
import torch
from PIL import Image
from tritonclient.grpc import service_pb2_grpc

from bench.loadtest.questions import QuestionMaker
from bench.loadtest.world import World, digits_and_shapes, label_sets
from tests.serving.helpers import door_over, opened, options
from vilu.preprocess.image import decode
from vilu.serving import Server
from vilu.serving.door import Door, own_server
from vilu.tiny import data


@pytest.fixture(scope="session")
def server(repository, tmp_path_factory):
    with Server(repository, log=tmp_path_factory.mktemp("server") / "tritonserver.log") as running:
        yield running


@pytest.fixture(scope="session")
def front_server(repository, tmp_path_factory):
    """The tritonserver behind `front`."""
    return own_server(repository, log=tmp_path_factory.mktemp("front") / "tritonserver.log")


@pytest.fixture(scope="session")
def front(front_server):
    """The ports of a door with a server of its own, as `vilu serve` makes it."""
    with opened(Door(options(), front_server)) as ports:
        yield ports


@pytest.fixture(scope="session")
def cascade_root(cascade, tmp_path_factory):
    """The repository of `cascade_served`, where class sets are put."""
    return shutil.copytree(cascade.root, tmp_path_factory.mktemp("cascade-served") / "model_repository")


@pytest.fixture(scope="session")
def cascade_served(cascade_root, tmp_path_factory):
    """The ports of a door over a cascade."""
    with door_over(cascade_root, tmp_path_factory.mktemp("cascade-log")) as (ports, _):
        yield ports


@pytest.fixture(scope="session")
def call(front):
    with grpc.insecure_channel(front.grpc) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


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


@pytest.fixture(scope="session")
def asking(clip, checkpoint):
    world = World(clip, checkpoint, digits_and_shapes(32), label_sets(12))
    return QuestionMaker(world, 8)
