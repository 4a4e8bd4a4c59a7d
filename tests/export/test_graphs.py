"""Every kind of architecture, made small: the graphs equal the eager towers and hold the operators they should."""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import open_clip
import open_clip.timm_model
import pytest
import timm
import torch
from open_clip import CLIP, CoCa, CustomTextCLIP

from tests.support.embeddings import unit_rows
from tests.support.graphs import write_tiny
from tests.support.public_data import lvis_text_embeddings
from vilu import ViLUHead
from vilu.checkpoint import ClipSpec
from vilu.clip import Clip
from vilu.export import onnx_file
from vilu.export.attention import MASK_INPUT
from vilu.export.graphs import HeadGraph, ImageGraph, TextGraph, example_tokens, write_graph
from vilu.export.onnx_file import merge_full
from vilu.export.open_vocabulary import write_open_vocabulary
from vilu.kernels import fold

# Largest absolute difference of an embedding or a probability from the eager model, by the dtype computed in.
TOLERANCE = {torch.float32: 1e-5}
BATCHES = (1, 2, 5)
TEXT = {"context_length": 12, "vocab_size": 60, "width": 32, "heads": 2, "layers": 2}


@dataclass
class Small:
    """A shrunk architecture; `timm` are arguments for its trunk, `image` and `text` the nodes expected."""

    config: dict
    image: dict
    text: dict
    kind: type = CustomTextCLIP
    timm: dict = field(default_factory=dict)


def vit(**options):
    return {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8, **options}


def trunk(name, size=32, **options):
    return {"timm_model_name": name, "timm_model_pretrained": False, "image_size": size, **options}


CAUSAL = {"MultiHeadAttention": 2, "LayerNormalization": 5, "Gelu": 2}
VIT = {"MultiHeadAttention": 2, "LayerNormalization": 6}
SHAPE = {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 32, "patch_size": 8}
SMALL = {
    "vit": Small({"vision_cfg": vit(), "text_cfg": TEXT}, {**VIT, "Gelu": 2}, CAUSAL, CLIP),
    "vit-quickgelu": Small(
        {"vision_cfg": vit(), "text_cfg": TEXT, "quick_gelu": True},
        {**VIT, "QuickGelu": 2, "Gelu": 0},
        {**CAUSAL, "QuickGelu": 2, "Gelu": 0},
        CLIP,
    ),
    "resnet": Small(
        {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16}, "text_cfg": TEXT},
        {"MultiHeadAttention": 1, "BatchNormalization": 0},
        CAUSAL,
        CLIP,
    ),
    "siglip": Small(
        {
            "embed_dim": 64,
            "init_logit_bias": -10,
            "vision_cfg": trunk("vit_base_patch16_siglip_224", timm_pool="map", timm_proj="none"),
            "text_cfg": {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
        },
        {"MultiHeadAttention": 3, "LayerNormalization": 6, "Gelu": 3},
        CAUSAL,
        timm=SHAPE,
    ),
    "eva": Small(
        {"vision_cfg": trunk("eva02_base_patch16_clip_224", timm_pool="token", timm_proj=None), "text_cfg": TEXT},
        {"MultiHeadAttention": 2, "LayerNormalization": 9, "QuickGelu": 2},
        CAUSAL,
        timm={**SHAPE, "ref_feat_shape": (4, 4)},
    ),
    "convnext": Small(
        {"vision_cfg": trunk("convnext_base", 64, timm_pool="", timm_proj="linear"), "text_cfg": TEXT},
        {"LayerNormalization": 9, "Gelu": 4},
        CAUSAL,
        timm={"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 64)},
    ),
    "mobileclip": Small(
        {
            "vision_cfg": trunk("fastvit_mci1", 64, timm_pool="avg", timm_proj=None),
            "text_cfg": {**TEXT, "no_causal_mask": True},
        },
        {"MultiHeadAttention": 1, "Conv": 32},  # one a branch, where training had up to five
        CAUSAL,
        timm={"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 128)},
    ),
    "coca": Small(
        {
            "vision_cfg": vit(attentional_pool=True, attn_pooler_heads=2, output_tokens=True),
            "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
            "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
        },
        {"MultiHeadAttention": 3, "LayerNormalization": 8, "Gelu": 2},
        CAUSAL,
        CoCa,
    ),
}


def no_tokenizer(texts: list[str]) -> torch.Tensor:
    raise AssertionError("these towers are given token ids")


@pytest.fixture(scope="module")
def small():
    """name -> Clip, every weight and statistic random, so that none of them can be left out unseen."""
    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            shape = SMALL[name]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(open_clip.timm_model.timm, "create_model", partial(timm.create_model, **shape.timm))
                model = shape.kind(**{"embed_dim": 48, **shape.config}).eval().requires_grad_(False)
            for tensor_name, tensor in model.state_dict().items():
                if tensor_name.endswith("running_var"):
                    tensor.uniform_(0.5, 2)
                elif tensor.is_floating_point() and tensor.ndim:
                    tensor.add_(torch.randn_like(tensor), alpha=0.05)
            size = model.visual.image_size[0] if isinstance(model.visual.image_size, tuple) else model.visual.image_size
            preprocess = {"size": size, "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}
            open_clip.set_model_preprocess_cfg(model, {**preprocess, "mean": (0.5, 0.4, 0.3), "std": (0.3, 0.25, 0.2)})
            made[name] = Clip(model, ClipSpec(name, "random", 50.0, ""), no_tokenizer)
        return made[name]

    return make


def pixels(clip, rows):
    size = (rows, clip.transform.size, clip.transform.size, 3)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def width(clip):
    return clip.encode_tokens(example_tokens(clip)).shape[1]


def write_image(clip, path, **options):
    write_graph(ImageGraph(clip), pixels(clip, 2), path, "PIXELS", {"IMAGE_EMBEDDING": [width(clip)]}, **options)
    return path


def write_text(clip, path, **options):
    write_graph(TextGraph(clip), example_tokens(clip), path, "TOKENS", {"TEXT_EMBEDDING": [width(clip)]}, **options)
    return path


@pytest.fixture(scope="module")
def fused_image(small, tmp_path_factory):
    """name -> the file of its image tower, fused; written once."""
    root = tmp_path_factory.mktemp("fused")

    def make(name):
        path = root / name / "1" / "model.onnx"
        return path if path.is_file() else write_image(small(name), path, fused=True)

    return make


def nodes(path):
    return list(onnx.load(path, load_external_data=False).graph.node)


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def error(path, feed, expected):
    """Largest difference over all rows, whatever the batch they are sent in."""
    run, name = session(path).run, session(path).get_inputs()[0].name
    parts = [np.concatenate([run(None, {name: part.numpy()})[0] for part in feed.split(b)]) for b in BATCHES]
    assert np.isfinite(parts).all()
    return max(np.abs(part - expected.numpy()).max() for part in parts)


@pytest.mark.parametrize("name", SMALL)
def test_image_towers_are_exact_fused_and_normalise_in_the_convolution(name, small, fused_image):
    clip, feed, path = small(name), pixels(small(name), 5), fused_image(name)
    assert error(path, feed, clip.encode_pixels(feed)) < TOLERANCE[torch.float32]
    graph = nodes(path)
    assert {k: Counter(node.op_type for node in graph)[k] for k in SMALL[name].image} == SMALL[name].image
    assert not Counter(node.op_type for node in graph)["Softmax"]
    start = [node.op_type for node in graph if node.op_type != "Shape"]
    start = [kind for kind in start[: start.index("Conv") + 1] if kind in ("Transpose", "Cast", "Sub", "Div", "Conv")]
    padded = name in ("resnet", "mobileclip")
    assert start == ["Transpose", "Cast", "Sub", "Conv"] if padded else ["Transpose", "Cast", "Conv"]


@pytest.mark.parametrize("name", ["vit", "vit-quickgelu", "siglip", "coca"])
def test_text_towers_are_exact_and_fused(name, small, tmp_path):
    clip = small(name)
    feed = example_tokens(clip, 5, seed=2)
    feed[0, 6:] = 0  # a short text; CoCa masks its padding
    path = write_text(clip, tmp_path / "clip_text" / "1" / "model.onnx", fused=True)
    assert error(path, feed, clip.encode_tokens(feed)) < TOLERANCE[torch.float32]
    graph = nodes(path)
    assert {k: Counter(node.op_type for node in graph)[k] for k in SMALL[name].text} == SMALL[name].text
    attention = [node for node in graph if node.op_type == "MultiHeadAttention"]
    causal = [a.i for node in attention for a in node.attribute if a.name == "unidirectional"]
    assert causal == ([0, 0] if name in ("siglip", "coca") else [1, 1])
    # CoCa's mask depends on the text, and is added to the logits.
    assert {len(node.input) for node in attention} == ({6} if name == "coca" else {3})


@pytest.mark.parametrize(
    ("name", "tower"),
    [
        pytest.param("vit-quickgelu", "text", marks=pytest.mark.slow),
        ("siglip", "image"),
        pytest.param("coca", "text", marks=pytest.mark.slow),
    ],
)
def test_plain_graphs_hold_onnx_operators_only(name, tower, small, tmp_path):
    clip, path = small(name), tmp_path / "plain" / "1" / "model.onnx"
    if tower == "image":
        feed = pixels(clip, 5)
        expected = clip.encode_pixels(feed)
        write_image(clip, path)
    else:
        feed = example_tokens(clip, 5)
        expected = clip.encode_tokens(feed)
        write_text(clip, path)
    assert error(path, feed, expected) < TOLERANCE[torch.float32]
    model = onnx.load(path)
    assert [(item.domain, item.version) for item in model.opset_import] == [("", 20)]
    assert model.ir_version <= 10
    assert Counter(node.op_type for node in model.graph.node)["Softmax"] == (3 if tower == "image" else 2)


@pytest.mark.parametrize("name", ["vit", "siglip", "mobileclip"])
def test_no_transposes_are_left_around_attention(name, fused_image):
    graph = nodes(fused_image(name))
    made = {output: node for node in graph for output in node.output}
    attention = [node for node in graph if node.op_type == "MultiHeadAttention"]
    layers = attention[:2] if name != "mobileclip" else attention  # SigLIP's pooling attends from one learned query
    for node in layers:
        assert {made[value].op_type for value in node.input[:3]} == {"Split"}
        assert len({made[value].output[0] for value in node.input[:3]}) == 1
        (reader,) = (other for other in graph if node.output[0] in other.input)
        assert reader.op_type == "MatMul"


def test_a_branch_beside_the_first_convolution_keeps_the_normalisation(tmp_path):
    class TwoReaders(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = torch.nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            x = (x.permute(0, 3, 1, 2).float() / 255 - 0.4) / torch.tensor([0.2, 0.3, 0.4])[:, None, None]
            return self.convolution(x).mean(dim=(2, 3)) + x.mean(dim=(1, 2, 3))[:, None]

    module, feed = TwoReaders().requires_grad_(False), torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8)
    path = tmp_path / "g" / "1" / "model.onnx"
    write_graph(module, feed[:2], path, "PIXELS", {"Y": [4]}, fused=True)
    assert error(path, feed, module(feed)) < TOLERANCE[torch.float32]


def test_outputs_of_another_shape_than_expected_are_refused(small, tmp_path):
    path = tmp_path / "clip_text" / "1" / "model.onnx"
    with pytest.raises(ValueError, match=r"TEXT_EMBEDDING is \(batch, 48\), expected \(batch, 47\)"):
        write_graph(TextGraph(small("vit")), example_tokens(small("vit")), path, "TOKENS", {"TEXT_EMBEDDING": [47]})
    assert not path.exists()


@pytest.mark.parametrize("fused", [False, True])
def test_attention_that_is_causal_by_argument(fused, tmp_path):
    class Causal(torch.nn.Module):
        def forward(self, x):
            q = x.unflatten(2, (2, 8)).transpose(1, 2)
            out = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.5)
            return out.transpose(1, 2).flatten(2)

    path, feed = tmp_path / "g" / "1" / "model.onnx", torch.randn(5, 6, 16)
    write_graph(Causal(), feed[:2], path, "X", {"Y": [6, 16]}, fused=fused)
    assert error(path, feed, Causal()(feed)) < TOLERANCE[torch.float32]


def test_a_constant_mask_that_is_not_causal_is_kept(tmp_path):
    class Window(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
            allowed = torch.ones(6, 6).tril().triu(-2).bool()
            self.register_buffer("mask", torch.zeros(6, 6).masked_fill(~allowed, -torch.inf))

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False, attn_mask=self.mask)[0]

    module, feed = Window().eval().requires_grad_(False), torch.randn(5, 6, 16)
    path = tmp_path / "g" / "1" / "model.onnx"
    write_graph(module, feed[:2], path, "X", {"Y": [6, 16]}, fused=True)
    assert error(path, feed, module(feed)) < TOLERANCE[torch.float32]
    (node,) = (node for node in nodes(path) if node.op_type == "MultiHeadAttention")
    (mask,) = (w for w in onnx.load(path).graph.initializer if w.name == node.input[MASK_INPUT])
    assert list(mask.dims) == [1, 2, 6, 6]


def head_of(dim, **options):
    torch.manual_seed(3)
    head = ViLUHead(dim, hidden=(32, 16), attention_scale=20.0, **options).eval().requires_grad_(False)
    for parameter in head.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return head


ANSWER = {"CLASS_INDEX": [1], "CONFIDENCE": [1], "FAILURE_PROBABILITY": [1], "ACCEPT": [1]}
LABELS = [f"ünï {i}, a label among many that are long" for i in range(9)]  # more than 256 bytes together


def write_head(path, text_embeddings, **options):
    folded = fold(head_of(text_embeddings.shape[1]), text_embeddings, logit_scale=50.0)
    head = HeadGraph(folded, 0.5)
    example = text_embeddings[:2].clone()
    write_graph(head, example, path, "IMAGE_EMBEDDING", ANSWER, LABELS, **options)
    return head


@pytest.mark.parametrize("limit", [10**9, 10**4], ids=["inline", "external"])
def test_the_full_graph_is_joined_from_its_parts(limit, small, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "MAX_INLINE", limit)
    clip, feed = small("vit-quickgelu"), pixels(small("vit-quickgelu"), 5)
    image, part, full = (tmp_path / name / "1" / "model.onnx" for name in ("clip_image", "vilu_head", "vilu_full"))
    write_image(clip, image)
    head = write_head(part, unit_rows(9, 48, 5).float())
    merge_full(image, part, full)
    files = {path.name for path in full.parent.iterdir()}
    if limit == 10**4:
        assert files == {"model.onnx", "model.onnx.data"}
        assert full.stat().st_size < full.with_name("model.onnx.data").stat().st_size / 4
    else:
        assert files == {"model.onnx"}
    for parent in (image.parent, part.parent):
        for path in parent.iterdir():
            path.unlink()  # the graph needs its own folder only
    names = ["LABEL", *ANSWER]
    runner = session(full)
    assert [output.name for output in runner.get_outputs()] == names
    index, confidence, failure, accept = head(clip.encode_pixels(feed))
    for batch in BATCHES:
        parts = [runner.run(names, {"PIXELS": chunk.numpy()}) for chunk in feed.split(batch)]
        label, *answer = (np.concatenate(column) for column in zip(*parts, strict=True))
        assert label[:, 0].tolist() == [LABELS[i] for i in index[:, 0]]
        assert np.array_equal(answer[0], index.numpy())
        assert np.array_equal(answer[3], accept.numpy())
        for actual, expected in zip(answer[1:3], (confidence, failure), strict=True):
            assert np.abs(actual - expected.numpy()).max() < TOLERANCE[torch.float32]


def test_a_graph_of_another_input_is_not_joined(fused_image, tmp_path):
    with pytest.raises(ValueError, match=r"gives IMAGE_EMBEDDING, .* takes PIXELS"):
        merge_full(fused_image("vit"), fused_image("siglip"), tmp_path / "c" / "1" / "model.onnx")


OPEN: dict[str, dict[str, Any]] = {
    "identity": {"projection": "identity"},
    "separate": {"projection": "separate"},
    "prior": {"projection": "shared", "logit_scale": 50.0},
    "visual": {"parts": ("image",)},
}


@pytest.fixture(scope="module", params=OPEN)
def open_head(request, tmp_path_factory):
    """(eager head, session of its graph), its candidates an input."""
    path = tmp_path_factory.mktemp("open") / "vilu_embeddings" / "1" / "ragged.onnx"
    head, t = head_of(512, **OPEN[request.param]), unit_rows(3, 512, 6).float()
    write_open_vocabulary(fold(head, t, logit_scale=50.0, layout="plain"), 0.5, path)
    dims = [[d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in onnx.load(path).graph.input]
    assert dims == [["batch", 512], ["classes", 512], ["batch", 2]]
    return head, session(path)


@pytest.mark.parametrize("classes", [1, 2, 10, 1203])
@pytest.mark.parametrize("batch", [1, 7])
def test_candidates_may_be_an_inputs(classes, batch, open_head):
    check_open(open_head, unit_rows(batch, 512, 7).float(), unit_rows(classes, 512, 8).float())


def test_candidates_may_be_real_text(open_head):
    text = torch.nn.functional.normalize(torch.from_numpy(lvis_text_embeddings()).float(), dim=-1)
    near = torch.nn.functional.normalize(text[:40] + 0.03 * torch.randn(40, 512), dim=-1)
    check_open(open_head, near, text)


def check_open(open_head, v, t):
    head, runner = open_head
    feed = {"IMAGE_EMBEDDING": v.numpy(), "TEXT_EMBEDDINGS": t.numpy(), "CANDIDATES": np.array([[0, len(t)]] * len(v))}
    index, confidence, failure, accept = runner.run(None, feed)
    similarity = v.double() @ t.double().T
    p = torch.softmax(50 * similarity, dim=-1).amax(dim=-1)
    expected = head.double().failure_probability(v.double(), t.double()).numpy()
    head.float()
    assert np.array_equal(index[:, 0], similarity.argmax(dim=-1))
    assert np.abs(confidence[:, 0] - p.numpy()).max() < TOLERANCE[torch.float32]
    assert np.abs(failure[:, 0] - expected).max() < TOLERANCE[torch.float32]
    assert np.array_equal(accept[:, 0], failure[:, 0] < 0.5)


@pytest.mark.slow
def test_the_same_weights_give_the_same_bytes_in_any_process(tmp_path):
    here = write_tiny(tmp_path / "here")
    assert write_tiny(tmp_path / "again") == here
    there = tmp_path / "there"
    code = f"from pathlib import Path; from tests.support.graphs import write_tiny; write_tiny(Path({str(there)!r}))"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=Path(__file__).parents[2], check=True)
    assert tuple((there / name / "1" / "model.onnx").read_bytes() for name in ("clip_image", "clip_text")) == here
