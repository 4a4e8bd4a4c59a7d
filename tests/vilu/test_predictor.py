"""`vilu.Predictor`: its answers are the eager model's, and a bad image costs the others nothing."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import vilu
from vilu import Checkpoint, Predictor, UserError, ViLUHead
from vilu.answers import RequestRefused, opened
from vilu.preprocess.image import decode
from vilu.scores import Doctor, Entropy
from vilu.serving.image_input import encoded
from vilu.tiny import data


def png(image) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def images():
    """20 held-out digits, (32, 32, 3) uint8."""
    return [np.asarray(image) for image in data.digits("test").images[:20]]


@pytest.fixture(scope="module")
def predictor(clip, checkpoint):
    return Predictor(checkpoint, clip=clip)


def eager(clip, head, class_set, images):
    """What the answers must be: class indices, confidences, failure probabilities, embeddings; computed one by one."""
    t = class_set.text_embeddings
    v = torch.cat([clip.embed_images([decode(png(image), clip.transform)[None]]) for image in images])
    p = torch.softmax(clip.spec.logit_scale * v @ t.T, dim=1)
    return p.argmax(1).tolist(), p.amax(1).numpy(), head.failure_probability(v, t).numpy(), v


def test_answers_are_the_eager_models(clip, checkpoint, predictor, images):
    index, confidence, failure, v = eager(clip, checkpoint.head, checkpoint.class_set, images)
    answers = predictor(images, batch_size=7, details=True, embedding=True)
    assert [a.source for a in answers] == [f"image {i}" for i in range(20)]
    assert [a.class_index for a in answers] == index
    assert [a.label for a in answers] == [checkpoint.class_set.names[i] for i in index]
    np.testing.assert_allclose([a.confidence for a in answers], confidence, atol=1e-5)
    np.testing.assert_allclose([a.failure_probability for a in answers], failure, atol=1e-5)
    assert [a.accept for a in answers] == [a.failure_probability < checkpoint.threshold for a in answers]
    half = Predictor(checkpoint, clip=clip, threshold=float(np.median(failure)))(images)
    assert sum(a.accept for a in half) in (9, 10)
    assert all(a.accept == (a.failure_probability < np.median(failure)) for a in half)
    np.testing.assert_allclose(np.array([a.embedding for a in answers], float), v, atol=1e-5)
    np.testing.assert_allclose([a.outlier_score for a in answers], checkpoint.outlier.score(v), atol=1e-5)
    t, scale = checkpoint.class_set.text_embeddings, clip.spec.logit_scale
    np.testing.assert_allclose(
        np.array([a.entropy for a in answers], float), Entropy().confidence(v, t, scale), atol=1e-5
    )
    np.testing.assert_allclose(
        np.array([a.doctor for a in answers], float), Doctor().confidence(v, t, scale), rtol=1e-3, atol=1e-5
    )
    query, key, _ = checkpoint.head.projections()
    attention = torch.softmax(checkpoint.head.attention_scale * (v @ query.T) @ (t @ key.T).T, dim=1)
    for answer, weights in zip(answers, attention, strict=True):
        assert answer.top[0] == (answer.label, pytest.approx(answer.confidence, abs=1e-5))
        assert len(answer.top) == len(answer.concepts) == 5
        assert answer.concepts[0][1] == pytest.approx(float(weights.max()), abs=1e-5)
        assert answer.concepts[0][0] == checkpoint.class_set.names[int(weights.argmax())]
    np.testing.assert_allclose(predictor.embed(images), v, atol=1e-5)


def test_the_outlier_threshold_is_part_of_accept_over_the_checkpoints_own_classes(clip, checkpoint, images):
    names = checkpoint.class_set.names
    plain = Predictor(replace(checkpoint, outlier=None), clip=clip)(images)
    assert {a.outlier_score for a in plain} == {None}
    outlier = checkpoint.outlier.calibrated(eager(clip, checkpoint.head, checkpoint.class_set, images)[3], 0.5)
    scored = replace(checkpoint, outlier=outlier, threshold=1.0)
    strict = Predictor(scored, clip=clip)
    answers = strict(images)
    assert [a.accept for a in answers] == [a.outlier_score <= outlier.threshold for a in answers]
    assert 9 <= sum(a.accept for a in answers) <= 11
    again = Predictor(scored, clip=clip, templates=["a scan of {}"])(images)
    assert [a.accept for a in again] == [a.accept for a in answers], "other prompts, the same classes"
    others = strict(images, labels=list(names)), Predictor(scored, clip=clip, classes=names)(images)
    for found in others:
        assert all(a.accept for a in found), "candidates that the score does not know"
        np.testing.assert_allclose([a.outlier_score for a in found], [a.outlier_score for a in answers], atol=1e-6)


def test_every_kind_of_image_has_the_same_answer(predictor, images, tmp_path):
    path = tmp_path / "digit.png"
    path.write_bytes(png(images[0]))
    kinds = [images[0], Image.fromarray(images[0]), path.read_bytes(), path, str(path)]
    answers = predictor(kinds)
    assert len({a.label for a in answers}) == 1
    np.testing.assert_allclose([a.failure_probability for a in answers], answers[0].failure_probability, atol=1e-5)
    assert [a.source for a in answers] == ["image 0", "image 1", "image 2", str(path), str(path)]
    for kind in kinds:
        one = predictor(kind)
        assert isinstance(one, vilu.Answer)
        assert one.failure_probability == pytest.approx(answers[0].failure_probability, abs=1e-5)
        assert predictor.embed(kind).shape == (1, 128)
    assert len(predictor(np.stack(images[:3]))) == 3
    assert predictor([]) == []
    assert predictor.embed([]).shape == (0, 128)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "I;16", "CMYK"])
def test_a_pillow_image_has_the_pixels_of_its_file(clip, tmp_path, mode):
    """Transparency, palettes and 16 bits count in the resizing; the client's PNG of the image keeps them."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 60, 4), np.uint8))
    image = noise.convert("L").convert("I").convert("I;16") if mode == "I;16" else noise.convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    expected = decode(path.read_bytes(), clip.transform)
    with Image.open(path) as again:
        assert again.mode == mode
        np.testing.assert_array_equal(clip.transform(opened(again, 0)[1]), expected)
        sent = encoded(again, 0)[1]
        assert isinstance(sent, bytes)
        asked = decode(sent, clip.transform)
        if mode == "CMYK":  # which PNG cannot hold
            assert np.abs(asked.astype(int) - expected).max() < 40
        else:
            np.testing.assert_array_equal(asked, expected)


def test_a_bad_image_is_an_answer_with_an_error(predictor, images, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff nothing")
    lazy = tmp_path / "lazy.png"
    lazy.write_bytes(png(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))[:-2000])
    bad = [
        tmp_path / "absent.png",
        tmp_path,
        tmp_path / "cut.jpg",
        b"",
        np.zeros((4, 4), np.uint8),
        7,
        Image.open(lazy),
        Image.new("La", (40, 30)),
    ]
    asked = [one for image in bad for one in (images[0], image)]
    answers = predictor(asked, batch_size=3)
    assert [a.error is None for a in answers] == [True, False] * len(bad)
    said = [a.error for a in answers if a.error]
    assert "No such file" in said[0]
    assert "Is a directory" in said[1]
    assert "not a JPEG" in said[2]
    assert "0 bytes" in said[3]
    assert "(H, W, 3) uint8" in said[4]
    assert "int" in said[5]
    assert "cannot be decoded" in said[6]
    assert "cannot be decoded" in said[7]
    assert "mode La cannot be sent" in encoded(bad[7], 0)[1].error
    assert not any("\n" in line for line in said)
    assert np.ptp([a.failure_probability for a in answers if not a.error]) < 1e-5
    with pytest.raises(RequestRefused, match="No such file"):
        predictor.embed(bad)
    assert all(a.error for a in predictor(bad))


def test_labels_of_a_call_take_the_place_of_the_class_set(clip, checkpoint, predictor, images):
    labels = ["a red star", " a cat ", "handwritten eight"]
    own = clip.class_set([label.strip() for label in labels], checkpoint.class_set.templates)
    index, confidence, failure, _ = eager(clip, checkpoint.head, own, images)
    answers = predictor(images, labels)
    assert [a.label for a in answers] == [labels[i].strip() for i in index]
    np.testing.assert_allclose([a.confidence for a in answers], confidence, atol=1e-5)
    np.testing.assert_allclose([a.failure_probability for a in answers], failure, atol=1e-5)
    constructed = Predictor(checkpoint, clip=clip, classes=labels, threshold=0.0)
    assert [a.label for a in constructed(images)] == [a.label for a in answers]
    assert not any(a.accept for a in constructed(images))
    with pytest.raises(UserError, match="repeats"):
        predictor(images, ["cat", "cat"])
    with pytest.raises(TypeError, match="list of strings"):
        predictor(images, "cat")


def test_a_checkpoint_without_clip_or_classes_says_what_to_give(clip, checkpoint, images, tmp_path):
    path = tmp_path / "head.safetensors"
    vilu.save_checkpoint(Checkpoint(checkpoint.head), path)
    with pytest.raises(UserError, match=r"head\.safetensors: names no CLIP; give the CLIP"):
        Predictor(path)
    predictor = Predictor(path, clip="vilu-tiny")
    with pytest.raises(UserError, match="holds no class names"):
        predictor(images)
    assert predictor(images[0], ["a cat", "a dog"]).label in ("a cat", "a dog")
    other = Predictor(Checkpoint(ViLUHead(64)), clip=clip)
    with pytest.raises(UserError, match="64 wide, those of CLIP vilu-tiny are 128"):
        other(images[0], ["a cat", "a dog"])
    with pytest.raises(UserError, match="device 'cuda:99' cannot be used"):
        Predictor(path, clip="vilu-tiny", device="cuda:99")
    with pytest.raises(UserError, match="batch_size"):
        predictor(images[0], ["a cat", "a dog"], batch_size=0)


def test_images_are_read_as_they_are_needed(predictor, images):
    """Memory stays bounded: a stream reads a few batches ahead, never all."""
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield images[read % 20]

    stream = predictor.stream(endless(), batch_size=2)
    for _ in range(10):
        assert next(stream).error is None
    stream.close()
    assert read < 40


def test_the_transform_is_a_function(clip, images):
    encoded = png(images[0])
    np.testing.assert_array_equal(clip.transform(encoded), decode(encoded, clip.transform))
    np.testing.assert_array_equal(clip.transform(Image.fromarray(images[0])), decode(encoded, clip.transform))


def test_the_package_shows_its_public_names():
    shown = dir(vilu)
    assert {*vilu.__all__, "metrics", "scores", "__version__"} <= set(shown)
    assert not {"import_module", "Any", "_HOME"} & set(shown)
    for name in shown:
        getattr(vilu, name)
