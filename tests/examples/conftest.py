"""A server over the shared export, and photos to ask it about."""

import io

import pytest
from PIL import Image

from vilu.serving import Server
from vilu.tiny import data


@pytest.fixture(scope="module")
def running(repository, tmp_path_factory):
    with Server(repository, log=tmp_path_factory.mktemp("server") / "tritonserver.log") as server:
        yield server


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    """Held-out digits as JPEG."""
    out = []
    for image in data.digits("test").images[:6]:
        buffer = io.BytesIO()
        Image.fromarray(image).resize((80, 80)).save(buffer, "JPEG")
        out.append(buffer.getvalue())
    return out
