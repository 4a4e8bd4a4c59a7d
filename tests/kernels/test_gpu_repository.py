"""`vilu export --device gpu`: what is written, and its head's Python model run on a stand-in for CUDA's driver."""

import ctypes
import gc
import hashlib
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("cuda.bindings.driver")
pytest.importorskip("open_clip")
pytest.importorskip("tritonclient.grpc")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import cuda.bindings
import onnx
from click.testing import CliRunner
from cuda.bindings import driver
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from tests.kernels.fake_cuda import FakeDriver
from vilu import Checkpoint, UserError, ViLUHead, load_clip, save_checkpoint
from vilu.cli.export import export_command
from vilu.export import export
from vilu.export.graphs import write_outlier
from vilu.export.outlier import OutlierGraph
from vilu.kernels import dlpack, fold
from vilu.kernels.launch import FORMAT, CubinHead, Gpu, LaunchError, read_manifest
from vilu.outlier import fit_outlier
from vilu.tiny import data

MAX_BATCH = 16
FEW = ["attend_image-fp32", "tail_few-fp32"]
MANY = ["project-fp32", "attend_few-fp32", "tail-fp32"]


@pytest.fixture(scope="module")
def checkpoint():
    torch.manual_seed(0)
    clip = load_clip()
    class_set = clip.class_set(data.digits("clip_val").names)
    head = ViLUHead(class_set.text_embeddings.shape[1], attention_scale=clip.spec.logit_scale)
    return Checkpoint(head.eval().requires_grad_(False), clip.spec, class_set)


@pytest.fixture(scope="module")
def root(tmp_path_factory, checkpoint):
    folder = tmp_path_factory.mktemp("gpu")
    save_checkpoint(checkpoint, folder / "head.safetensors")
    arguments = ["--ckpt", folder / "head.safetensors", "--output", folder / "repository", "--cuda-arch", "90"]
    run = CliRunner().invoke(export_command, [*map(str, arguments), "--max-batch-size", str(MAX_BATCH)])
    assert run.exception is None, run.exception
    return folder / "repository"


@pytest.fixture
def folded(checkpoint):
    return fold(checkpoint.head, checkpoint.class_set.text_embeddings, logit_scale=checkpoint.clip.logit_scale)


@pytest.fixture
def cuda_driver(monkeypatch, root, folded):
    fake = FakeDriver(folded, read_manifest(root / "vilu_head" / "1" / "cubins"))
    monkeypatch.setattr(cuda.bindings, "driver", fake)
    return fake


def test_configs(root):
    configs = {}
    for path in root.glob("*/config.pbtxt"):
        configs[path.parent.name] = text_format.Parse(path.read_text(), pb.ModelConfig())
    kinds = {name: [group.kind for group in config.instance_group] for name, config in configs.items()}
    on_gpu = [pb.ModelInstanceGroup.KIND_GPU]
    assert kinds == dict.fromkeys(["clip_image", "clip_text", "vilu_full", "vilu_head"], on_gpu) | {
        "preprocess": [pb.ModelInstanceGroup.KIND_CPU],
        "vilu_embeddings": [pb.ModelInstanceGroup.KIND_CPU],
        "vilu_details": [pb.ModelInstanceGroup.KIND_CPU],
        "tokenize": [pb.ModelInstanceGroup.KIND_CPU],
        "class_sets": [pb.ModelInstanceGroup.KIND_CPU],
        "vilu": [],
        "vilu_open": [],
        "vilu_text": [],
    }
    head = configs["vilu_head"]
    assert (head.backend, head.default_model_filename, head.max_batch_size) == ("python", "model.py", MAX_BATCH)
    assert head.parameters["FORCE_CPU_ONLY_INPUT_TENSORS"].string_value == "no"
    assert list(head.output)[:5] == list(configs["vilu"].output)[:5] == list(configs["vilu_full"].output)
    steps = [step.model_name for step in configs["vilu"].ensemble_scheduling.step]
    assert steps == ["preprocess", "clip_image", "vilu_head", "vilu_details"]


@pytest.mark.slow
def test_tensorrt_in_float16_from_end_to_end(tmp_path, checkpoint):
    """What TensorRT is given: operators of ONNX's own, half the weights, no engine to build while a request waits."""
    report = export(
        checkpoint,
        tmp_path / "r",
        device="gpu",
        provider="tensorrt",
        precision="float16",
        cuda_archs=(90,),
        max_batch_size=MAX_BATCH,
    )
    assert (report["precision"], report["over_budget"]) == ("float16", [])
    assert report["answers"]["cpu"]["cosine"]["mean"] > 0.9999
    halves = {}
    for name in ("clip_image", "clip_text", "vilu_full"):
        model = onnx.load(tmp_path / "r" / name / "1" / "model.onnx")
        assert {node.domain for node in model.graph.node} == {""}
        halves[name] = sum(t.data_type == onnx.TensorProto.FLOAT16 for t in model.graph.initializer)
        config = text_format.Parse((tmp_path / "r" / name / "config.pbtxt").read_text(), pb.ModelConfig())
        used = {
            one.name: one.parameters for one in config.optimization.execution_accelerators.gpu_execution_accelerator
        }
        assert set(used) == ({"cuda"} if name == "vilu_full" else {"tensorrt", "cuda"})
        if name != "vilu_full":
            assert used["tensorrt"]["precision_mode"] == "FP16"
            assert used["tensorrt"]["trt_profile_max_shapes"].split(":")[1].startswith(f"{MAX_BATCH}x")
        assert [one.batch_size for one in config.model_warmup] == [1, 2, 4, 8, MAX_BATCH]
    assert all(halves[name] > 10 for name in ("clip_image", "clip_text"))


def test_the_cubins_folder_is_what_its_manifest_says(root):
    cubins = root / "vilu_head" / "1" / "cubins"
    manifest = read_manifest(cubins)
    kernels = manifest["archs"]["90"]["kernels"]
    assert set(FEW + MANY) < set(kernels)
    for entry in [manifest["weights"], *kernels.values()]:
        assert hashlib.sha256((cubins / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
    files = ["manifest.json", "weights.bin", *(entry["file"] for entry in kernels.values())]
    assert sorted(path.name for path in cubins.iterdir()) == sorted(files)


def test_parity_is_measured_on_what_the_cubins_are_made_from(root):
    report = json.loads((root / "parity.json").read_text())
    assert report["device"] == "gpu"
    rows = report["graphs"]["vilu_head"]["folded"]
    assert set(rows) == {str(MAX_BATCH)}
    for row in rows.values():
        assert row["inputs"] >= 256
        assert row["argmax_agreement"] == 1
        assert max(row["max_abs_error"].values()) <= 1e-4


@pytest.mark.parametrize("file", ["tail_few-fp32-sm90.cubin", "weights.bin"])
def test_a_corrupted_file_is_refused_by_name(file, root, tmp_path, cuda_driver):
    cubins = shutil.copytree(root / "vilu_head" / "1" / "cubins", tmp_path / "cubins")
    changed = bytearray((cubins / file).read_bytes())
    changed[len(changed) // 2] ^= 1
    (cubins / file).write_bytes(changed)
    with pytest.raises(LaunchError, match=f"{file}: differs from the hash in manifest.json"):
        CubinHead(cubins, Gpu())
    (cubins / file).unlink()
    with pytest.raises(LaunchError, match=f"{file}: cannot be read"):
        CubinHead(cubins, Gpu())


def test_no_build_another_format_another_gpu_no_driver(tmp_path, root, folded, monkeypatch, cuda_driver):
    gpu = Gpu()
    with pytest.raises(LaunchError, match=r"manifest\.json: not a build of the fused head"):
        CubinHead(tmp_path, gpu)
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(LaunchError, match=f"format {FORMAT} expected"):
        CubinHead(tmp_path, gpu)
    gpu.arch = 75
    with pytest.raises(LaunchError, match="this GPU has 75"):
        CubinHead(root / "vilu_head" / "1" / "cubins", gpu)
    monkeypatch.setattr(cuda_driver, "cuInit", lambda flags: (100,))
    with pytest.raises(LaunchError, match="CUDA: it failed"):
        Gpu()
    monkeypatch.setattr(
        cuda_driver, "cuGetErrorString", lambda code: (1, None)
    )  # a code that the driver has no text for
    with pytest.raises(LaunchError, match="CUDA: error 100"):
        Gpu()
    monkeypatch.setattr(cuda_driver, "cuInit", lambda flags: (driver.CUresult(12345),))  # as the real bindings end
    with pytest.raises(LaunchError, match=r"CUDA: .*12345 is not a valid CUresult"):
        Gpu()
    if not torch.cuda.is_available():
        monkeypatch.setattr(cuda.bindings, "driver", driver)
        with pytest.raises(LaunchError, match=r"no NVIDIA driver|CUDA: no"):
            Gpu()


def test_bad_launches_are_named(root, cuda_driver):
    head = CubinHead(root / "vilu_head" / "1" / "cubins", Gpu())
    with pytest.raises(LaunchError, match="address 0x8 is not a multiple of 16"):
        head(8, 1, 16, 16)
    with pytest.raises(LaunchError, match="at least 1, got 0"):
        head(16, 0, 16, 16)
    with pytest.raises(LaunchError, match="no kernel 'attend_image-bf16'"):
        head(16, 1, 16, 16, image_type="bf16")
    with pytest.raises(LaunchError, match="belongs to its own class set"):
        head(16, 1, 16, 16, text=(16, 5))


def test_the_stand_in_has_the_real_driver_functions():
    for name, function in inspect.getmembers(FakeDriver, inspect.isfunction):
        if name.startswith("cu"):
            real = inspect.signature(getattr(driver, name)).parameters
            assert len(real) == len(inspect.signature(function).parameters) - 1, name


def scored(checkpoint):
    """An outlier score of the checkpoint's class set."""
    t = checkpoint.class_set.text_embeddings
    labels = torch.arange(40) % len(t)
    noise = torch.randn(40, t.shape[1], generator=torch.Generator().manual_seed(0)) / t.shape[1] ** 0.5
    return fit_outlier(torch.nn.functional.normalize(t[labels] + noise, dim=1), labels, t)


def server_stub():
    """triton_python_backend_utils, as far as the model uses it; outputs are consumed as the server consumes them."""

    class Tensor:
        def __init__(self, name, array, capsule=None):
            self.name, self.array, self.capsule = name, array, capsule

        @staticmethod
        def from_dlpack(name, capsule):
            view = dlpack.view(capsule)
            assert view.gpu == 0
            number: Any = {"fp32": ctypes.c_float, "i32": ctypes.c_int32}[view.dtype]
            flat = np.ctypeslib.as_array((number * int(np.prod(view.shape))).from_address(view.address))
            return Tensor(name, flat.reshape(view.shape), capsule)

    class Metric:
        def __init__(self, **_):
            self.values: list[float] = []
            self.increment = self.observe = self.values.append

    class MetricFamily:
        HISTOGRAM, COUNTER = "HISTOGRAM", "COUNTER"

        def __init__(self, **_):
            self.Metric = Metric

    class BLS:
        """Answers with the request itself."""

        def __init__(self, model_name, inputs, requested_output_names, parameters):
            self.asked = model_name, inputs, requested_output_names, parameters

        def exec(self):
            answer = [Tensor(name, self.asked) for name in self.asked[2]]
            return SimpleNamespace(has_error=lambda: False, output_tensors=lambda: answer)

    class TritonError(str):
        INVALID_ARG = 3

        def __new__(cls, message, code):
            assert code == cls.INVALID_ARG
            return str.__new__(cls, message)

    return SimpleNamespace(
        Tensor=Tensor,
        InferenceResponse=lambda output_tensors=(), error=None: (
            error or {tensor.name: tensor for tensor in output_tensors}
        ),
        InferenceRequest=BLS,
        MetricFamily=MetricFamily,
        TritonError=TritonError,
        TritonModelException=RuntimeError,
        get_input_tensor_by_name=lambda request, name: request[name],
    )


@pytest.fixture
def outlier_threshold():
    return None


@pytest.fixture
def model(root, monkeypatch, cuda_driver, checkpoint, outlier_threshold):
    folder = root / "vilu_head"
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", server_stub())
    monkeypatch.syspath_prepend(folder / "1")
    spec = importlib.util.spec_from_file_location("vilu_head_model", folder / "1" / "model.py")
    assert spec
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = {
        "max_batch_size": MAX_BATCH,
        "parameters": {"threshold": {"string_value": "0.5"}},
    }
    if outlier_threshold is not None:
        write_outlier(OutlierGraph(scored(checkpoint)), folder / "1" / "outlier.onnx")
        config["parameters"]["outlier_threshold"] = {"string_value": repr(outlier_threshold)}
    arguments = {"model_config": json.dumps(config), "model_repository": str(folder), "model_version": "1"}
    arguments["model_name"] = "vilu_head"
    server_model = module.TritonPythonModel()
    server_model.initialize(arguments | {"model_instance_device_id": "0"})
    assert set(cuda_driver.launched) == {*FEW, *MANY, "attend_tile-fp32"}, "no request waits for CUDA to load a kernel"
    cuda_driver.launched.clear()
    yield server_model
    for name in [name for name in sys.modules if name.split(".")[0] in ("fused", "sets")]:
        del sys.modules[name]


class Request(dict):
    """The server's, as far as the model uses it: tensors by name, and what else was asked."""

    def __init__(self, tensors, parameters="{}"):
        super().__init__(tensors)
        self.parameters = lambda: parameters
        self.requested_output_names = lambda: ["LABEL", "FAILURE_PROBABILITY"]


def request(array, gpu, parameters="{}"):
    """An IMAGE_EMBEDDING of the server, on the GPU or not."""
    view = dlpack.View(array.ctypes.data, array.shape, "fp32", gpu)
    return Request({"IMAGE_EMBEDDING": SimpleNamespace(to_dlpack=lambda: dlpack.lend(view, array))}, parameters)


def aligned(array):
    spare = np.empty(array.nbytes + 16, np.uint8)
    start = -spare.ctypes.data % 16
    out = spare[start : start + array.nbytes].view(np.float32).reshape(array.shape)
    out[...] = array
    return out


@pytest.mark.parametrize(
    ("batches", "gpu", "kernels", "copies"),
    [
        ((1,), 0, FEW, 1),
        ((5,), 0, FEW, 1),
        ((2, 1, 3), 0, FEW, 4),
        ((2,), None, FEW, 2),
        ((12,), 0, MANY, 1),
        ((7, 9), 0, MANY, 3),
    ],
    ids=str,
)
def test_served_answers(batches, gpu, kernels, copies, model, cuda_driver, checkpoint):
    """Whatever requests ride together: one launch, no host copy of an embedding on the GPU, the eager head's answer."""
    t = checkpoint.class_set.text_embeddings
    v = torch.nn.functional.normalize(t[:1] + torch.randn(sum(batches), t.shape[1]) / t.shape[1] ** 0.5, dim=1)
    parts = [aligned(part.numpy()) for part in v.split(list(batches))]
    for _ in range(3):
        cuda_driver.launched, cuda_driver.copied = [], []
        responses = model.execute([request(part, gpu) for part in parts])
        assert cuda_driver.launched == kernels
        assert len(cuda_driver.copied) == copies
        assert [len(response["LABEL"].array) for response in responses] == list(batches)
        joined = {name: np.concatenate([r[name].array for r in responses]) for name in responses[0]}
        index = (v @ t.T).argmax(1)
        failure = checkpoint.head.failure_probability(v, t)
        confidence = torch.softmax(checkpoint.clip.logit_scale * v @ t.T, 1).amax(1)
        assert {name: array.shape for name, array in joined.items()} == dict.fromkeys(joined, (len(v), 1))
        assert set(joined["CLASS_SET"][:, 0]) == {b"default@1"}
        assert set(joined["CLASS_SET_VERSION"][:, 0]) == {1}
        assert joined["CLASS_INDEX"][:, 0].tolist() == index.tolist()
        assert joined["LABEL"][:, 0].tolist() == [checkpoint.class_set.names[i].encode() for i in index]
        np.testing.assert_allclose(joined["FAILURE_PROBABILITY"][:, 0], failure, atol=1e-5)
        np.testing.assert_allclose(joined["CONFIDENCE"][:, 0], confidence, atol=1e-5)
        assert joined["ACCEPT"].dtype == bool
        assert joined["ACCEPT"][:, 0].tolist() == (failure < 0.5).tolist()
        del responses, joined
        gc.collect()
        assert len(model.pool) == 1, "a batch's memory comes back with its last tensor"


@pytest.mark.parametrize("outlier_threshold", [0.9])
def test_the_outlier_score_is_part_of_accept(model, checkpoint):
    """Requests that ride together, on the GPU or copied there first."""
    t = checkpoint.class_set.text_embeddings
    v = torch.nn.functional.normalize(torch.randn(12, t.shape[1], generator=torch.Generator().manual_seed(1)), dim=1)
    v[3] = float("nan")
    parts = [aligned(part.numpy()) for part in v.split([7, 5])]
    failure, score = checkpoint.head.failure_probability(v, t), scored(checkpoint).score(v)
    model.threshold = np.float32(failure[score <= 0.9].median() + 1e-6)
    expected = ((failure < model.threshold) & (score <= 0.9)).tolist()
    assert expected != (failure < model.threshold).tolist()
    assert any(expected)
    for asked in (parts, parts[:1]):
        responses = model.execute([request(part, 0) for part in asked])
        accept = np.concatenate([response["ACCEPT"].array for response in responses])[:, 0]
        assert accept.tolist() == expected[: len(accept)]


def test_who_names_another_class_set_is_answered_by_bls_alone(model, cuda_driver, checkpoint, tmp_path):
    model.store.folder = tmp_path
    (tmp_path / "pets@3").touch()
    (tmp_path / "birds@1.removed").touch()
    rows = aligned(checkpoint.class_set.text_embeddings[:2].numpy())
    names = ['{"class_set":"pets"}', "{}", '{"class_set":7}', '{"class_set":"default"}', '{"class_set":"birds"}']
    requests = [request(rows, 0, name) for name in names]
    pets, plain, wrong, default, birds = model.execute(requests)
    assert cuda_driver.launched == FEW
    asked = ("vilu_embeddings", [requests[0]["IMAGE_EMBEDDING"]], ["LABEL", "FAILURE_PROBABILITY"])
    assert pets["LABEL"].array == (*asked, {"class_set": "pets"})
    assert wrong == "class_set must be a string"
    assert birds == "class set 'birds' is not served; there are default, pets"
    for mine in (plain, default):
        assert mine["LABEL"].array[:, 0].tolist() == [name.encode() for name in checkpoint.class_set.names[:2]]
    _, answers, _ = model.tally.metrics["default"]
    assert answers.values == [4]


def test_serving_needs_neither_torch_nor_triton_nor_vilu(root):
    code = (
        f"import sys; sys.path.insert(0, {str(root / 'vilu_head' / '1')!r})\n"
        "sys.modules.update(torch=None, triton=None, vilu=None)\n"
        "import fused.launch, fused.dlpack"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cuda-arch", "75"], "cuda-arch 75: expected 80,86,89,90,100,120"),
        (["--cuda-arch", "sm_90"], "expected numbers as in 80,90"),
        (["--cuda-arch", "90", "--device", "cpu"], "--cuda-arch is for --device gpu"),
    ],
)
def test_bad_requests_write_nothing(arguments, message, tmp_path, checkpoint):
    save_checkpoint(checkpoint, tmp_path / "head.safetensors")
    output = tmp_path / "out"
    run = CliRunner().invoke(
        export_command, ["--ckpt", str(tmp_path / "head.safetensors"), "--output", str(output), *arguments]
    )
    assert isinstance(run.exception, UserError)
    assert message in str(run.exception)
    assert not output.exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("B", [1, 8, 12])
def test_cubins_on_a_gpu(B, tmp_path, checkpoint):
    from vilu.kernels import aot, fused_head

    major, minor = torch.cuda.get_device_capability()
    t = checkpoint.class_set.text_embeddings
    built = fold(checkpoint.head, t, logit_scale=checkpoint.clip.logit_scale)
    aot.build(built, [10 * major + minor], tmp_path / "build")
    head = CubinHead(tmp_path / "build", Gpu())
    v = torch.nn.functional.normalize(torch.randn(B, t.shape[1], device="cuda"), dim=1)
    scores = torch.empty(4, B, device="cuda")
    index = torch.empty(B, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    head(v.data_ptr(), B, scores.data_ptr(), index.data_ptr())
    head.gpu.synchronize()
    want = fused_head(v, built.cuda())
    assert torch.equal(index.long(), want.class_index)
    assert torch.equal(scores[0], want.failure_probability)
