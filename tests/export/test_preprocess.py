"""The model that decodes images: what it keeps of an image that a cascade may ask for once more."""

import importlib.util
import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vilu.export.repository import TEMPLATES
from vilu.preprocess import image
from vilu.preprocess.image import Transform, decode

SIZES = {"PIXELS": 32, "PIXELS_2": 64, "PIXELS_3": 48}


@pytest.fixture
def make(monkeypatch):
    """A model for these sizes, and how often it has opened an image."""
    made = []

    def model(mode, names=tuple(SIZES), **more):
        times = []
        own = SimpleNamespace(**vars(image))

        def opened(*given):
            times.append(given)
            return image.opened(*given)

        own.opened = opened
        monkeypatch.setitem(sys.modules, "image", own)
        error = type("TritonModelException", (Exception,), {})

        class Family:
            COUNTER = 0

            def __init__(self, **_):
                raise error

        backend = SimpleNamespace(TritonModelException=error, MetricFamily=Family)
        monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
        spec = importlib.util.spec_from_file_location("preprocess", TEMPLATES / "preprocess" / "model.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        stored = [{field: str(value) for field, value in vars(Transform(SIZES[n], mode=mode)).items()} for n in names]
        given = stored[0] | {"more": json.dumps(dict(zip(names[1:], stored[1:], strict=True)))} | more
        config = {"parameters": {key: {"string_value": value} for key, value in given.items()}}
        made.append(module.TritonPythonModel())
        made[-1].initialize({"model_config": json.dumps(config), "model_name": "preprocess", "model_version": "1"})
        return made[-1], times, module

    yield model
    for one in made:
        one.finalize()


def jpeg(seed=0):
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(("mode", "opened"), [("exact", [1, 0, 0, 1, 1, 1]), ("fast", [1, 1, 1, 1, 1, 2])])
def test_an_image_that_goes_on_is_decoded_once(make, mode, opened):
    model, times, _ = make(mode)
    data = jpeg()
    asked = (["PIXELS"], ["PIXELS_2"], ["PIXELS_3"], ["PIXELS_3"], ["PIXELS"], ["PIXELS", "PIXELS_2"])
    for names, count in zip(asked, opened, strict=True):
        times.clear()
        found = model._decode((data, names))
        assert len(times) == count, names
        for name, pixels in zip(names, found, strict=True):
            assert np.array_equal(pixels, decode(data, Transform(SIZES[name], mode=mode)))


def test_few_images_are_kept_and_none_where_one_size_is_all(make, monkeypatch):
    model, times, module = make("exact")
    files = [jpeg(seed) for seed in range(4)]
    monkeypatch.setattr(module, "KEPT_BYTES", 2 * (4 * 300 * 400 + len(files[0])) + 1000)
    for data in (*files, files[3], b"no image"):
        model._decode((data, ["PIXELS"]))
    assert list(model.kept.images) == files[2:]
    assert 0 < model.kept.bytes <= module.KEPT_BYTES
    times.clear()
    for data in files:
        assert np.array_equal(model._decode((data, ["PIXELS_3"]))[0], decode(data, Transform(48)))
    assert [data for data, _ in times] == files[:2]
    assert (model.kept.bytes, len(model.kept.images)) == (0, 0)
    alone, _, _ = make("exact", ["PIXELS"])
    alone._decode((files[0], ["PIXELS"]))
    assert not alone.kept.images


def test_a_cascade_decodes_at_a_low_priority(make, monkeypatch):
    by: list[int] = []
    monkeypatch.setattr("os.nice", by.append)
    make("exact")
    make("exact", nice="10")
    assert by == [0, 10]
