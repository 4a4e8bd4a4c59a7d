"""Every kernel compiled for every architecture, no GPU needed: what it uses of the chip, and what is written."""

import itertools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from tests.support.embeddings import unit_rows
from vilu import UserError, ViLUHead
from vilu.kernels import fold

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from vilu.kernels import aot
from vilu.kernels.launch import LaunchError, pick_arch
from vilu.kernels.plan import all_kernels, plan_launches, tuned

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def folded_head(dim=512, dtype=F16, layout="folded", projection="shared"):
    head = ViLUHead(dim, projection=projection)
    return fold(head, unit_rows(5, dim, 0).to(dtype), layout=layout)


# (compute capability, D, type, layout, projections): all variants for the smallest shared memory and for Hopper, the
# widths that are no power of two, and one head for each of the rest.
HEADS = [
    *itertools.product((86, 90), (768,), (F32, BF16), ("folded", "plain"), ("identity", "shared")),
    *itertools.product((86,), (640, 1152), (F32,), ("folded",), ("shared",)),
    *itertools.product((80, 89, 100, 120), (512,), (F16,), ("folded",), ("shared",)),
]


@pytest.fixture(scope="module")
def compiled():
    """(head, kernel's name) -> Compiled, by two processes."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = {}
        for head in HEADS:
            arch, dim, dtype, layout, projection = head
            folded = folded_head(dim, dtype, layout, projection)
            for name, make in aot.variants(folded, arch, [dtype]):
                # The ragged kernel differs by two loads, `tail` not at all by the projections: once is enough.
                usual = (layout, projection) == ("folded", "shared") and dim < 1152
                if usual or not ("ragged" in name or (name.startswith("combine") and projection == "identity")):
                    jobs[head, name] = pool.submit(make)
    return {key: job.result() for key, job in jobs.items()}


@pytest.mark.parametrize("arch", sorted(aot.SHARED_LIMIT))
def test_kernels_fit_and_spill_only_in_half_precision_scans(arch, compiled):
    mine = {key: done for key, done in compiled.items() if key[0][0] == arch}
    assert {name.split("-")[0] for _, name in mine} == {"attend_image", "attend_tile", "combine"}
    for key, done in mine.items():
        assert done.shared <= aot.SHARED_LIMIT[arch], key
        assert 16 < done.registers <= 255, f"{key}: a kernel this small is a trap, not a kernel"
        # In 16 bits a tile of 64 images keeps (64, D) sums in registers, which at D = 768 is worth a few spills.
        if not key[1].startswith("attend_tile") or key[0][2] == F32:
            assert done.spilled == 0, key


def test_tensor_cores_serve_16_bit_banks_and_float32_is_never_rounded(compiled):
    for (head, name), done in compiled.items():
        if name.startswith("attend_tile"):
            assert "tf32" not in done.ptx, head
            assert ("mma" in done.ptx) is (head[2] != F32), head


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


@pytest.mark.parametrize(("have", "want"), [(80, 80), (87, 86), (89, 86), (90, 90)])
def test_pick_arch(have, want, tmp_path):
    assert pick_arch({"archs": {"80": 0, "86": 0, "90": 0, "100": 0}}, have, tmp_path) == want


@pytest.mark.parametrize("have", [75, 103, 120])
def test_pick_arch_refuses_another_generation(have, tmp_path):
    with pytest.raises(LaunchError, match=f"built for compute capability 80, 100, this GPU has {have}"):
        pick_arch({"archs": {"80": 0, "100": 0}}, have, tmp_path)


def test_plans_are_compiled_for():
    """Whatever the shape, a launch uses a kernel as it was compiled, a grid within bounds, and scratch to match."""
    variant = folded_head().variant
    for arch in aot.SHARED_LIMIT:
        settings = tuned(arch, variant)
        made = {(kernel.name, kernel.settings) for kernel in all_kernels(settings)}
        for B in (1, 8, 9, 64, 513):
            for K in (1, 63, 1000, 1_048_576):
                for ragged in (False, True):
                    plan = plan_launches(variant, B, K, ragged=ragged, settings=settings, multiprocessors=132)
                    assert {(kernel.name, kernel.settings) for kernel in plan.kernels} <= made
                    assert 1 <= plan.splits <= 256
                    assert plan.scratch >= B * plan.splits * (8 + variant.value_dim)
                    assert [kernel.name for kernel in plan.kernels] in (["attend_image"], ["attend_tile", "combine"])
