"""Reduced precisions: what is rewritten and what stays float32, what it costs, what is refused, what configs say."""

import json
import platform
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto
from PIL import Image
from tritonclient.grpc import model_config_pb2 as pb

from vilu import UserError
from vilu.export import build, export, int8, measure, onnx_file, parity, precision, report, repository
from vilu.export import sample as samples
from vilu.export.float16 import to_float16
from vilu.export.int8 import quantise
from vilu.export.job import Job, Ticker
from vilu.export.limits import Limits
from vilu.export.model_config import Runtime, write_graph_config
from vilu.preprocess.image import pixels
from vilu.serving import Client, Server
from vilu.serving.backends.onnxruntime import session
from vilu.tiny import data

GOLDEN = Path(__file__).parent / "golden"
COSINE = {"float16": 0.9999, "int8": 0.995}  # least mean cosine of the embedded CLIP's towers


@pytest.fixture(scope="module")
def sample(clip, checkpoint):
    return samples.draw_sample(clip, checkpoint.class_set.names, None, None, calibrate=True)


@pytest.fixture(scope="module")
def tokens(clip, checkpoint):
    measured, others = samples.texts(checkpoint.class_set.names, checkpoint.class_set.templates)
    return clip.tokenize(measured).numpy(), clip.tokenize(others).numpy()


@pytest.fixture(params=["clip_image", "clip_text"])
def tower(request, repository_copy, sample, tokens):
    """(path of a float32 graph that may be changed, its input, what is measured, what is calibrated on)."""
    path = repository_copy / request.param / "1" / "model.onnx"
    if request.param == "clip_image":
        return path, "PIXELS", sample.pixels, sample.calibration
    return path, "TOKENS", *tokens


@pytest.fixture
def repository_copy(repository, tmp_path):
    return shutil.copytree(repository, tmp_path / "repository")


def embed(path, name, feed):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {name: feed})[0]


def types(model):
    """Value name -> element type; casts and initializers are known even where the graph says nothing."""
    found = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.output)}
    return found | {t.name: t.data_type for t in model.graph.initializer}


def test_float16_keeps_statistics_and_the_embedding_in_float32(tower):
    path, name, feed, _ = tower
    before = embed(path, name, feed)
    size = path.stat().st_size
    to_float16(path)
    after = embed(path, name, feed)
    assert path.stat().st_size < 0.55 * size
    assert (after * before).sum(axis=1).mean() >= COSINE["float16"]
    assert (after != before).any()
    assert np.abs(np.linalg.norm(after, axis=1) - 1).max() < 1e-6
    model = onnx.load(path)
    kinds = types(model)
    wide = [n for n in model.graph.node if n.op_type in ("LayerNormalization", "Softmax", "ReduceL2")]
    products = [n for n in model.graph.node if n.op_type in ("MatMul", "Gemm", "Conv")]
    assert wide
    assert {kinds[n.input[0]] for n in wide} == {TensorProto.FLOAT}
    assert {kinds[n.input[1]] for n in products if n.input[1] in kinds} == {TensorProto.FLOAT16}


# ONNX Runtime adds two products in 16 bits where the CPU has no VNNI: they saturate, and an int8 export is refused.
SATURATES = "x86" in platform.machine() and "vnni" not in Path("/proc/cpuinfo").read_text()
exact_int8 = pytest.mark.skipif(SATURATES, reason="no VNNI: ONNX Runtime's int8 products saturate")


@pytest.mark.parametrize("symmetric", [False, pytest.param(True, marks=exact_int8)])
def test_int8_products_of_weights_alone(tower, symmetric):
    path, name, feed, calibration = tower
    before = embed(path, name, feed)
    precise = onnx.load(path)
    count = quantise(path, {name: calibration}, symmetric=symmetric)
    after = embed(path, name, feed)
    assert count > 5
    assert (after * before).sum(axis=1).mean() >= COSINE["int8"]
    assert (after != before).any()
    model = onnx.load(path)
    makers = {output: node for node in model.graph.node for output in node.output}
    constants = {t.name: t for t in model.graph.initializer}
    quantised = []
    for node in model.graph.node:
        sources = [makers.get(i) for i in node.input]
        if any(s is not None and s.op_type == "DequantizeLinear" and s.input[0] in constants for s in sources):
            if node.op_type in ("MatMul", "Gemm", "Conv"):
                quantised.append(node)
                weight = constants[sources[1].input[0]]
                assert weight.data_type == TensorProto.INT8
                scales = onnx.numpy_helper.to_array(constants[sources[1].input[1]])
                assert scales.ndim == 1, "one scale a channel"
                assert len(scales) in weight.dims
            zero = constants[sources[0].input[2]]
            assert zero.data_type == (TensorProto.INT8 if symmetric else TensorProto.UINT8)
            assert not symmetric or not onnx.numpy_helper.to_array(zero).any()
    assert len(quantised) == count
    untouched = ("LayerNormalization", "Softmax", "Gelu", "MultiHeadAttention", "ReduceL2")
    kept = [[n.op_type for n in m.graph.node if n.op_type in untouched] for m in (precise, model)]
    assert kept[0] == kept[1]
    assert [p.name for p in path.parent.glob("calibrate*")] == []


def rewrite(path, kind, name, calibration):
    if kind == "float16":
        to_float16(path)
    else:
        quantise(path, {name: calibration[:16]})


@pytest.mark.parametrize("kind", ["float16", "int8"])
@pytest.mark.parametrize("after", ["external", "inline"])
def test_weights_in_a_file_of_their_own_are_rewritten(kind, after, tower, tmp_path, monkeypatch):
    """As a tower over 1 GB has them; rewritten, the weights may be small enough to lie in the graph's file."""
    path, name, feed, calibration = tower
    inline = tmp_path / "inline.onnx"
    shutil.copy(path, inline)
    rewrite(inline, kind, name, calibration)
    limit = 10_000 if after == "external" else path.stat().st_size * 0.9
    monkeypatch.setattr(onnx_file, "MAX_INLINE", limit)
    onnx_file.save(ir.load(path), path)
    data = path.with_name("model.onnx.data")
    assert data.is_file()
    rewrite(path, kind, name, calibration)
    assert data.is_file() == (after == "external")
    assert np.array_equal(embed(path, name, feed[:40]), embed(inline, name, feed[:40]))
    assert {p.name for p in path.parent.iterdir()} - {"tokenizer.json", data.name} == {"model.onnx"}


LARGE = {
    "float16": Runtime("gpu", "cuda", "float16", 2),
    "bfloat16": Runtime("cpu", "openvino", "bfloat16", 2),
    "int8": Runtime("cpu", "cpu", "int8", 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["float16", "bfloat16", "int8"])
def test_towers_with_weights_in_files_of_their_own_are_exported_and_served(
    name, clip, checkpoint, tmp_path, monkeypatch
):
    """What an export does with towers over 1 GB; the float16 one cannot be served without a GPU."""
    if name == "bfloat16" and not (session.has_openvino() and session.has_bfloat16()):
        pytest.skip("no OpenVINO, or no bfloat16 here")
    if name == "int8" and SATURATES:
        pytest.skip("no VNNI: ONNX Runtime's int8 products saturate")
    monkeypatch.setattr(onnx_file, "MAX_INLINE", 10_000)
    drawn = samples.draw_sample(clip, checkpoint.class_set.names, photos(), None, calibrate=name == "int8")
    job = Job(checkpoint, clip, checkpoint.class_set, drawn, 8, LARGE[name], Limits(), (), "exact")
    root, tick = tmp_path / "r", Ticker(None, 1)
    build.write_graphs(job, root, tick)
    build.write_models(job, root)
    for graph in ("clip_image", "clip_text", "vilu_full"):
        files = {path.name: path.stat().st_size for path in (root / graph / "1").glob("model.onnx*")}
        assert set(files) == {"model.onnx", "model.onnx.data"}
        assert files["model.onnx"] < files["model.onnx.data"]
    assert list(parity.over_budget(report.build(job, measure.measure(job, root, tick).figures))) == []
    if LARGE[name].device == "cpu":
        asked = data.digits("test").images[:8]
        t = checkpoint.class_set.text_embeddings
        vision = session.open_session(root / "clip_image" / "1" / "model.onnx", job.runtime.provider, name)
        feed = np.stack([pixels(Image.fromarray(photo), clip.transform) for photo in asked])
        v = torch.from_numpy(vision.run(["IMAGE_EMBEDDING"], {"PIXELS": feed})[0])
        with Server(root, log=tmp_path / "log") as server, Client(server.grpc_url) as client:
            answers = client.ask(list(asked))
        assert [a.class_index for a in answers] == (v @ t.T).argmax(1).tolist()
        failure = checkpoint.head.failure_probability(v, t)
        np.testing.assert_allclose([a.failure_probability for a in answers], failure, atol=1e-3)


def test_a_graph_that_is_not_valid_leaves_the_old_file(tower):
    path, *_ = tower
    before = path.read_bytes()
    model = ir.load(path)
    model.graph.append(ir.node("NoSuchOperator", [model.graph.outputs[0]]))
    with pytest.raises(onnx.checker.ValidationError):
        onnx_file.save(model, path)
    assert path.read_bytes() == before
    assert {p.name for p in path.parent.iterdir()} <= {"model.onnx", "tokenizer.json"}


def test_the_same_calibration_gives_the_same_file(repository, sample, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        path = shutil.copy(repository / "clip_image" / "1" / "model.onnx", tmp_path / name)
        quantise(Path(path), {"PIXELS": sample.calibration[:16]})
    assert (tmp_path / "a" / "model.onnx").read_bytes() == (tmp_path / "b" / "model.onnx").read_bytes()


def test_calibration_and_measurement_share_no_image(sample):
    measured = {image.tobytes() for image in sample.pixels}
    assert len(sample.calibration) == samples.CALIBRATION
    assert len(sample.pixels) == samples.MIN_INPUTS
    assert not measured & {image.tobytes() for image in sample.calibration}
    names, templates = [f"class {i}" for i in range(400)], ("a {}.",)
    first, second = samples.texts(names, templates)
    assert len(first) == samples.MIN_INPUTS
    assert len(second) == samples.CALIBRATION
    assert not set(first) & set(second)


values = st.lists(st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30), min_size=2, max_size=60)


@given(values, st.booleans())
def test_a_range_holds_zero_stays_inside_the_extremes_and_loses_no_more(sample, symmetric):
    x = np.array(sample, np.float32)
    low, high = float(x.min()), float(x.max())

    def loss(a, b):
        if b <= a:
            return float(np.square(x, dtype=np.float64).sum())
        step = (b - a) / 255
        return float(np.square(np.clip(np.rint((x - a) / step), 0, 255) * step + a - x, dtype=np.float64).sum())

    plain = int8._range(x, low, high, symmetric=symmetric, narrow=False)
    narrow = int8._range(x, low, high, symmetric=symmetric, narrow=True)
    assert plain[0] <= narrow[0] <= 0 <= narrow[1] <= plain[1]
    assert not symmetric or narrow[0] == -narrow[1]
    assert loss(*narrow) <= loss(*plain)


@pytest.mark.parametrize(
    ("name", "device", "provider", "have", "message"),
    [
        ("float64", "cpu", "cpu", True, "precision must be one of float32, float16, bfloat16, int8"),
        ("float32", "cpu", "cuda", True, "provider 'cuda' is not for --device cpu: use openvino or cpu"),
        ("float32", "gpu", "openvino", True, "use cuda or tensorrt"),
        ("float32", "cpu", "openvino", False, "OpenVINO is not installed here"),
        ("float16", "cpu", "cpu", True, "float16 is for GPU servers"),
        ("bfloat16", "gpu", "cuda", True, "bfloat16 on a GPU"),
        (
            "bfloat16",
            "cpu",
            "cpu",
            True,
            "bfloat16 on a CPU is OpenVINO's, and the provider is cpu: leave out --provider",
        ),
        ("bfloat16", "cpu", "cpu", False, "OpenVINO's, and the provider is cpu: pip install"),
        ("bfloat16", "cpu", "openvino", None, "neither AMX nor AVX512-BF16"),
        ("int8", "gpu", "cuda", True, "int8 on a GPU is TensorRT's"),
    ],
)
def test_refused_precisions(name, device, provider, have, message):
    with pytest.raises(UserError, match=message):
        precision.check(name, device, provider, has_openvino=have is not False, has_bfloat16=have is True)


@pytest.fixture(scope="module")
def int8_repository(tmp_path_factory, clip, checkpoint):
    if SATURATES:
        pytest.skip("no VNNI: ONNX Runtime's int8 products saturate")
    root = tmp_path_factory.mktemp("int8") / "repository"
    export(checkpoint, root, clip=clip, images=photos(), max_batch_size=8, precision="int8", provider="cpu")
    return root


def photos():
    """Without labels: the shared head is untrained, and what int8 does to its ranking is chance."""
    return [*data.digits("test").images[:192], *data.shapes("test", 192).images]


def test_int8_is_within_its_budget_and_says_what_it_cost(int8_repository, repository):
    report = json.loads((int8_repository / "parity.json").read_text())
    assert (report["precision"], report["over_budget"]) == ("int8", [])
    assert report["budget"] == {"cosine": 0.99, "agreement": 0.985, "auc_loss": 0.003}
    assert report["images"] == {"measured": 256, "calibrated": 128}
    cost = report["answers"]["cpu"]
    assert 0.99 <= cost["cosine"]["mean"] < 1
    assert 0.985 <= cost["argmax_agreement"] <= 1
    assert 0 < cost["failure_probability_error"]["mean"] < cost["failure_probability_error"]["max"] < 0.1
    assert cost["ranking"] is None
    full = report["graphs"]["vilu_full"]["cpu"]["8"]
    assert max(full["max_abs_error"].values()) <= 1e-4, "the joined graph against its own parts"
    for name in ("vilu_head", "clip_image"):
        sizes = [(root / name / "1" / "model.onnx").stat().st_size for root in (int8_repository, repository)]
        assert (sizes[0] == sizes[1]) == (name == "vilu_head"), "the head stays float32"


def test_int8_is_served(int8_repository, clip, checkpoint, tmp_path):
    asked = data.digits("test").images[:8]
    t = checkpoint.class_set.text_embeddings
    with Server(int8_repository, log=tmp_path / "log") as server, Client(server.grpc_url) as client:
        answers = client.ask(list(asked))
    graph = session.open_session(int8_repository / "clip_image" / "1" / "model.onnx")
    feed = np.stack([pixels(Image.fromarray(photo), clip.transform) for photo in asked])
    v = torch.from_numpy(graph.run(["IMAGE_EMBEDDING"], {"PIXELS": feed})[0])
    assert [a.class_index for a in answers] == (v @ t.T).argmax(1).tolist()
    failure = checkpoint.head.failure_probability(v, t)
    np.testing.assert_allclose([a.failure_probability for a in answers], failure, atol=1e-5)


def copied(source):
    """In the place of `build.write_graphs`: the graphs of an export that was made before."""

    def write(job, root, tick):
        for name in ("clip_image", "clip_text", "vilu_head", "vilu_full"):
            shutil.copytree(source / name, root / name)

    return write


def test_over_budget_is_refused_unless_loss_is_allowed(int8_repository, tmp_path, clip, checkpoint, monkeypatch):
    strict = replace(precision.BUDGETS["int8"], cosine=0.999999)
    monkeypatch.setitem(precision.BUDGETS, "int8", strict)
    monkeypatch.setattr(build, "write_graphs", copied(int8_repository))
    options = {"clip": clip, "images": photos(), "max_batch_size": 8, "precision": "int8", "provider": "cpu"}
    with pytest.raises(
        UserError, match=r"export refused: clip_image \(cpu, batch 8\): mean cosine 0\.99\d+, the limit"
    ):
        export(checkpoint, tmp_path / "r", **options)
    assert list(tmp_path.iterdir()) == []
    report = export(checkpoint, tmp_path / "r", allow_loss=True, **options)
    assert json.loads((tmp_path / "r" / "parity.json").read_text()) == report
    assert any("mean cosine" in line for line in report["over_budget"])
    assert "kept by --allow-loss" in (tmp_path / "r" / "parity.md").read_text()


def test_no_allowance_covers_nan(int8_repository, tmp_path, clip, checkpoint, monkeypatch):
    def write(job, root, tick):
        copied(int8_repository)(job, root, tick)
        path = root / "clip_image" / "1" / "model.onnx"
        model = onnx.load(path)
        for tensor in model.graph.initializer:
            if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 1 and tensor.dims[0] > 8:
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(tensor.dims, np.nan, np.float32), tensor.name))
        onnx.save(model, path)

    monkeypatch.setattr(build, "write_graphs", write)
    options = {"clip": clip, "images": photos(), "max_batch_size": 8, "precision": "int8", "provider": "cpu"}
    with pytest.raises(UserError, match="not finite"):
        export(checkpoint, tmp_path / "r", allow_loss=True, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not (session.has_openvino() and session.has_bfloat16()), reason="no OpenVINO, or no bfloat16 here")
def test_bfloat16_is_within_its_budget_and_falls_back_to_float32(tmp_path, repository, clip, checkpoint, monkeypatch):
    monkeypatch.setattr(build, "write_graphs", copied(repository))
    report = export(checkpoint, tmp_path / "r", clip=clip, max_batch_size=8, precision="bfloat16")
    assert report["provider"] == "openvino"
    assert report["answers"]["openvino"]["cosine"]["mean"] < 1
    assert report["answers"]["cpu"]["failure_probability_error"]["max"] <= 1e-4


RUNTIMES = {
    "cpu-float32": Runtime("cpu", "cpu", "float32", 2),
    "openvino-bfloat16-32-cores": Runtime("cpu", "openvino", "bfloat16", 32),
    "cuda-float32": Runtime("gpu", "cuda", "float32", 8),
    "tensorrt-float16": Runtime("gpu", "tensorrt", "float16", 8, "/engines"),
}


@pytest.mark.parametrize("case", RUNTIMES)
def test_configs_are_the_golden_ones(case, tmp_path):
    for name, tower in (("clip_image", True), ("vilu_full", False)):
        write_graph_config(
            tmp_path / name,
            inputs={"PIXELS": ("TYPE_UINT8", [224, 224, 3])},
            outputs={"IMAGE_EMBEDDING": ("TYPE_FP32", [512])} if tower else repository.ANSWER_TENSORS,
            max_batch_size=32,
            limits=Limits(),
            runtime=RUNTIMES[case],
            tower=tower,
        )
        text = (tmp_path / name / "config.pbtxt").read_text()
        golden = text_format.Parse((GOLDEN / f"{case}-{name}.pbtxt").read_text(), pb.ModelConfig())
        assert text_format.Parse(text, pb.ModelConfig()) == golden


def test_tensorrt_never_builds_an_engine_while_a_request_waits(tmp_path):
    """One profile spans every batch, engines are kept, and each preferred batch is run before the model is ready."""
    write_graph_config(
        tmp_path / "clip_text",
        inputs={"TOKENS": ("TYPE_INT64", [77])},
        outputs={"TEXT_EMBEDDING": ("TYPE_FP32", [512])},
        max_batch_size=24,
        limits=Limits(),
        runtime=RUNTIMES["tensorrt-float16"],
        tower=True,
    )
    config = text_format.Parse((tmp_path / "clip_text" / "config.pbtxt").read_text(), pb.ModelConfig())
    tensorrt, cuda = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert tensorrt.parameters["precision_mode"] == "FP16"
    assert tensorrt.parameters["trt_engine_cache_enable"] == "true"
    assert tensorrt.parameters["trt_profile_min_shapes"] == "TOKENS:1x77"
    assert tensorrt.parameters["trt_profile_max_shapes"] == "TOKENS:24x77"
    assert cuda.parameters["use_tf32"] == "0"
    preferred = list(config.dynamic_batching.preferred_batch_size)
    assert preferred == [2, 4, 8, 16, 24]
    assert [warm.batch_size for warm in config.model_warmup] == [1, *preferred]
    assert all(list(warm.inputs["TOKENS"].dims) == [77] for warm in config.model_warmup)
