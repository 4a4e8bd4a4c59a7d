"""Ahead-of-time builds: which kernels a build has, what it writes, and which build a GPU runs."""

import contextlib
import itertools
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from tests.support.embeddings import unit_rows
from vilu import UserError, ViLUHead
from vilu.kernels import fold

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.nvidia import compiler as nvidia

from vilu.kernels import aot
from vilu.kernels.launch import PDL_ARCH, CubinHead, Gpu, LaunchError, pick_build
from vilu.kernels.plan import COUNTERS, MAX_SPLITS, all_kernels, plan_launches, tuned

F32, BF16 = torch.float32, torch.bfloat16


def folded_head(dim=512, dtype=F32, layout="folded", projection="shared"):
    head = ViLUHead(dim, projection=projection)
    return fold(head, unit_rows(5, dim, 0).to(dtype), layout=layout)


def test_weights_lie_where_the_manifest_says(tmp_path):
    folded = folded_head(64, F32, "plain", "shared")
    at = aot._write_weights(folded, tmp_path / "weights.bin")["at"]
    data = bytearray((tmp_path / "weights.bin").read_bytes())
    assert sorted(at) == ["packed", "query", "t"]
    for name, want in {"t": folded.text_embeddings, "query": folded.query_map, "packed": folded.packed}.items():
        assert at[name] % 256 == 0
        got = torch.frombuffer(data, dtype=F32, count=want.numel(), offset=at[name])
        assert torch.equal(got, want.flatten())


def test_build_replaces_whole_or_not_at_all(tmp_path):
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "old").touch()
    with pytest.raises(UserError, match="cuda-arch 75: expected one of 80"):
        aot.build(folded_head(64), [75], tmp_path / "build")
    assert [path.name for path in tmp_path.iterdir()] == ["build"]
    assert [path.name for path in (tmp_path / "build").iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("have", "want"),
    [(80, (80, False)), (87, (86, False)), (89, (86, False)), (90, (90, False)), (103, (80, True)), (121, (80, True))],
)
def test_pick_build(have, want, tmp_path):
    """Cubins of the GPU's own or, within 8.x, of an older one; else the PTX that the oldest build keeps."""
    archs = {"80": {"portable": True}, "86": {"portable": False}, "90": {"portable": False}, "100": {"portable": False}}
    assert pick_build({"archs": archs}, have, tmp_path) == want


@pytest.mark.parametrize(("built", "have"), [((80, 100), 75), ((90, 100), 103), ((90,), 120)])
def test_pick_build_refuses_what_it_cannot_run(built, have, tmp_path):
    archs = {str(arch): {"portable": arch < 90} for arch in built}
    names = ", ".join(map(str, built))
    with pytest.raises(LaunchError, match=f"built for compute capability {names}, this GPU has {have}"):
        pick_build({"archs": archs}, have, tmp_path)


@pytest.mark.slow
def test_a_gpu_without_cubins_loads_the_oldest_builds_ptx(tmp_path):
    """PTX that NVIDIA's assembler, as the driver's, takes for 10.3 and 12.1, in the shared memory that 12.1 has."""
    aot.build(folded_head(64), [80], tmp_path / "build", image_types=[F32])
    loaded = []
    gpu = SimpleNamespace(
        arch=121, allocate=lambda size: 256, write=lambda address, data: None,
        load=lambda code, symbol, shared: loaded.append((code, symbol, shared)),
    )  # fmt: skip
    CubinHead(tmp_path / "build", cast(Gpu, gpu))
    assert len(loaded) >= 9
    for code, symbol, shared in loaded:
        assert code.endswith(b"\0"), "the driver reads PTX up to a zero"
        text = code[:-1].decode()
        assert f".entry {symbol}(" in text
        assert ".target sm_80" in text
        assert shared <= min(aot.SHARED_LIMIT.values())
    file, tool = tmp_path / "kernel.ptx", Path(nvidia.__file__).parent / "bin" / "ptxas-blackwell"
    for code in {symbol: code for code, symbol, _ in loaded}.values():  # one of each kernel
        file.write_bytes(code[:-1])
        for arch in (103, 121):
            subprocess.run([tool, f"--gpu-name=sm_{arch}", file, "-o", os.devnull], check=True)


def test_a_build_fits_wherever_it_may_run():
    """A build for 8.0 runs on 8.6 and 8.9 too and, as PTX, on every later GPU without a build of its own."""
    for arch, limit in aot.SHARED_LIMIT.items():
        for have in aot.SHARED_LIMIT:
            with contextlib.suppress(LaunchError):
                pick_build({"archs": {str(arch): {"portable": arch < PDL_ARCH}}}, have, Path())
                assert limit <= aot.SHARED_LIMIT[have], (arch, have)


def test_plans_are_compiled_for():
    """A launch uses a kernel as it was compiled, a grid within bounds, and regions of scratch that do not overlap."""
    for layout, projection in (("folded", "shared"), ("plain", "separate"), ("plain", "identity")):
        for dtype in (F32, BF16):
            variant = folded_head(dtype=dtype, layout=layout, projection=projection).variant
            for arch in aot.SHARED_LIMIT:
                settings = tuned(arch, variant)
                same = {"settings": settings, "shared_softmax": False, "pdl": arch >= 90}
                made = {replace(kernel, grid=()) for kernel in all_kernels(variant, **same)}
                for B, K, ragged in itertools.product(
                    (1, 8, 9, 16, 17, 64, 513), (1, 63, 1000, 65_536, 1 << 20), (False, True)
                ):
                    plan = plan_launches(variant, B, K, ragged=ragged, multiprocessors=132, **same)
                    assert {replace(kernel, grid=()) for kernel in plan.kernels} <= made
                    assert all(1 <= n <= 1 << 31 for kernel in plan.kernels for n in kernel.grid)
                    assert 1 <= plan.splits <= MAX_SPLITS
                    starts = [start for _, start in plan.regions]
                    assert starts == sorted(starts)
                    assert all(start % 16 == 0 for start in starts)
                    assert dict(plan.regions)["sums"] >= B * plan.splits * 8
                    assert plan.scratch >= B * plan.splits * (8 + variant.value_dim)
                    functions = [kernel.function for kernel in plan.kernels]
                    large = arch == 90 and dtype == BF16 and not ragged and (B, K) == (513, 65_536)
                    assert ("score_tile" in functions) == large, "too few, too many, or no settings"
                    if large:
                        assert functions == ["project", "score_tile", "sum_tile", "tail"]
                        continue
                    assert [name.split("_")[0] for name in functions[-2:]] == ["attend", "tail"]
                    assert functions[:-2] == ["project"] * (len(functions) - 2)
                    # A layer's counter is the stage's own, and a program waits only for programs of lower number.
                    starts = dict(plan.kernels[-1].constants)["STARTS"]
                    assert list(starts) == sorted(set(starts))
                    assert len(starts) - 1 <= COUNTERS


@pytest.mark.slow
def test_a_start_launches_the_kernels_of_large_batches(tmp_path, monkeypatch):
    """With arguments as their cubins declare them, and only where the class set is large."""
    bindings = pytest.importorskip("cuda.bindings")
    from tests.kernels.fake_cuda import FakeDriver

    head, large = ViLUHead(64, hidden=(16, 8)), {"project_large-fp32", "score_tile", "sum_tile"}
    for classes in (8, 8192):
        folded = fold(head, unit_rows(classes, 64, 0).to(BF16), layout="plain")
        folder = tmp_path / str(classes)
        driver = FakeDriver(folded, aot.build(folded, [90], folder, image_types=[F32]))
        monkeypatch.setattr(driver, "_check_weights", lambda sent: None)  # it reads float32 alone
        monkeypatch.setattr(bindings, "driver", driver)
        CubinHead(folder, Gpu()).warm_up()
        assert set(driver.launched) & large == (large if classes == 8192 else set())
