"""Every kernel compiled for every architecture, without a GPU: registers, spills, loads, instructions within bounds."""

import itertools
import multiprocessing
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from bench.head_tuning import never_spills
from tests.support.embeddings import unit_rows
from vilu import ViLUHead
from vilu.kernels import fold

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.nvidia import compiler as nvidia

from vilu.kernels import aot
from vilu.kernels.machine_code import disassemble, longest_way, loops, within
from vilu.kernels.plan import tuned

pytestmark = pytest.mark.slow  # 150 compilations
F32, BF16 = torch.float32, torch.bfloat16
# (compute capability, D, type, layout, projections). Hopper has them all, the smallest shared memory (8.6) the wide
# ones; one head of each layout for the rest.
HEADS = [
    *itertools.product((90,), (512,), (F32, BF16), ("folded", "plain"), ("shared",)),
    (90, 512, BF16, "plain", "identity"),
    *itertools.product((86, 90), (768,), (F32, BF16), ("folded",), ("shared",)),
    *((arch, 768, BF16, "plain", "shared") for arch in (86, 90, 120)),
    (86, 1152, BF16, "plain", "shared"),
    (120, 512, BF16, "folded", "shared"),
    *((arch, 512, F32, "folded", "shared") for arch in (80, 86, 89, 100, 120)),
    *((arch, 512, BF16, "plain", "shared") for arch in (80, 86, 89, 100, 120)),
]


@pytest.fixture(scope="module")
def compiled():
    """(head, kernel's name) -> Compiled, by two processes."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = {}
        for head in HEADS:
            arch, dim, dtype, layout, projection = head
            folded = fold(ViLUHead(dim, projection=projection), unit_rows(5, dim, 0).to(dtype), layout=layout)
            for name, make in aot.variants(folded, arch, [dtype]):
                # Ragged kernels differ by two loads; beyond D = 512 the attention alone has limits to reach.
                if "ragged" not in name and (dim == 512 or name.startswith(("attend", "score", "sum"))):
                    jobs[head, name] = pool.submit(make)
    return {key: job.result() for key, job in jobs.items()}


@pytest.fixture(scope="module")
def code(compiled):
    """(head, kernel's name) -> its instructions."""
    return {key: disassemble(done.cubin) for key, done in compiled.items()}


def test_every_kernel_is_compiled_for_every_architecture(compiled):
    made = {(head[0], name.split("-")[0].rstrip("0123456789")) for head, name in compiled}
    functions = {"project", "project_few", "attend_image", "attend_few", "attend_tile", "tail", "tail_few"}
    for arch in aot.SHARED_LIMIT:
        assert {name for have, name in made if have == arch} >= functions
    assert {name for have, name in made if have == 90} >= {"project_large", "score_tile", "sum_tile"}


def test_products_of_large_batches_run_beside_their_warps(compiled, code):
    """Both factors come from shared memory, filled 16 bytes at a time, and a step waits for the product before it.

    A tile of 128 x 256 numbers costs a warp of `score_tile` at most 2,000 instructions beyond the steps to it.
    """
    seen = set()
    for (head, name), done in compiled.items():
        if name.startswith(("score_tile", "sum_tile")):
            products = re.findall(r"wgmma\.mma_async\S* \{[^}]*\}, (\S+),", done.ptx)
            assert len(products) == 4, head
            assert all(a.startswith("%rd") for a in products), f"{head}: a factor in registers"
            assert re.findall(r"wgmma\.wait_group\S* (\d)", done.ptx) == ["1", "0", "0"], head
            body = within(code[head, name], loops(code[head, name])[0])
            assert {one.load_width for one in body if one.name.startswith("LDGSTS")} == {16}, head
            if name.startswith("score_tile"):
                assert {one.load_width for one in body} == {0, 16}, head
                assert longest_way(body, lambda one: 1.0) <= 2200, head
            assert longest_way(body, lambda one: 1.0, pick=min) <= 250, head
            seen.add(name)
    assert len(seen) >= 2


def test_a_product_from_registers_is_waited_for_at_once(compiled):
    """Else Triton 3.6 writes the next factor into the registers that the product still reads."""
    seen = 0
    for (head, name), done in compiled.items():
        lines = re.findall(r"^\s*(wgmma\.(?:mma_async\S* \{[^}]*\}, .|wait_group\S* \d))", done.ptx, re.M)
        for here, after in itertools.pairwise(lines):
            if here.endswith("{") and "wait_group" in after:
                assert after.endswith(" 0"), (head, name)
                seen += 1
    assert seen


def test_kernels_fit_and_never_spill(compiled):
    for key, done in compiled.items():
        assert done.spilled == 0, key
        assert done.shared <= aot.SHARED_LIMIT[key[0][0]], key
        least = 10 if key[1].startswith("project_large") else 16  # which may have no more to do than copy
        assert least < done.registers <= 255, f"{key}: a kernel this small is a trap, not a kernel"


@pytest.mark.parametrize(("arch", "layout"), [(80, "plain"), (120, "folded")], ids=["spills", "too much shared memory"])
def test_tuning_takes_no_settings_that_spill_or_do_not_fit(arch, layout):
    folded = fold(ViLUHead(768, projection="shared"), unit_rows(5, 768, 0).to(BF16), layout=layout)
    settings = {role: dict(values) for role, values in tuned(arch, folded.variant)}
    assert never_spills("attend_tile", settings, folded, arch)
    settings["attend_tile"]["BLOCK_W"] = 512
    assert not never_spills("attend_tile", settings, folded, arch)


def test_tensor_cores_serve_every_type_and_float32_is_multiplied_by_three_products(compiled):
    """Of two tf32 numbers each: in one product alone, the rounding would show."""
    for (head, name), done in compiled.items():
        if name.startswith(("attend_few", "attend_tile")):
            products = len(re.findall(r"^\s*(?:wgmma|mma|tcgen05\.mma)\S*\.", done.ptx, re.M))
            tf32 = len(re.findall(r"^\s*mma\.sync\S*\.tf32\.tf32", done.ptx, re.M))
            assert products > 0, head
            assert (tf32, tf32 % 3) == ((products, 0) if head[2] == F32 else (0, 0)), head


def test_the_class_set_is_loaded_128_bits_at_a_time(code):
    """In the loops of the attention, whose loads are the class set's rows (and a batch's own, from L1)."""
    for key, instructions in code.items():
        if key[1].startswith("attend"):
            assert loops(instructions), key
            for span in loops(instructions):
                widths = {one.load_width for one in within(instructions, span)} - {0}
                assert widths <= {16}, key


def test_weights_are_loaded_128_bits_at_a_time(compiled, code):
    """But for biases and the image, which are few numbers. (`tail` also reads states and counters, one by one.)"""
    for key, instructions in code.items():
        copies = key[1].startswith("project_large") and key[0][3:] == ("plain", "identity")  # the image alone
        if key[1].startswith("project") and not copies:
            wide = sum(one.load_width for one in instructions if one.load_width == 16)
            narrow = sum(one.load_width for one in instructions if one.load_width < 16)
            assert narrow <= wide / 3, key


# Warp instructions for every 16 KB of the class set that the main loop reads, at most. At 85% of an H100's 4.3 TB/s a
# multiprocessor has 1,120 cycles for them, in which its four schedulers issue 4,480 at most.
INSTRUCTIONS = {
    ("attend_image-fp32", "folded"): 1600,
    ("attend_image-fp32", "plain"): 4200,
    ("attend_few-bf16", "plain"): 2000,
}


def test_instructions_for_16_kb_of_the_class_set(compiled, code):
    seen = set()
    for (head, name), instructions in code.items():
        key = (name, head[3])
        if key in INSTRUCTIONS and head[:2] == (90, 512):
            body = within(instructions, loops(instructions)[0])
            read = sum(one.load_width for one in body) * 32 * compiled[head, name].num_warps
            cost = len(body) * compiled[head, name].num_warps * (16 << 10) / read
            assert cost <= INSTRUCTIONS[key], (head, name, cost)
            seen.add(key)
    assert seen == INSTRUCTIONS.keys()


def test_the_second_half_has_short_chains(compiled, code):
    """`tail` of few images asks for its weights before it waits, and its first programs wait beside the attention."""
    for (head, name), done in compiled.items():
        if name.startswith("tail_few") and head[0] >= 90 and head[1] == 512:
            # One wait in each stage; the merge has programs for scores, for columns, and those without an image.
            parts = done.ptx.split("griddepcontrol.wait")
            layers = 2 + (head[3] == "plain")
            assert len(parts) - 1 == layers + 1 + 3
            assert done.ptx.count("ld.acquire.gpu") == 2 * (layers + 1), "a look, and the loop of looks"
            assert done.ptx.count("release") == layers + 1
        if (head, name) == ((90, 512, F32, "folded", "shared"), "tail_few-fp32"):
            first = compiled[head, "attend_image-fp32"]
            together = first.registers * first.num_warps + done.registers * done.num_warps
            assert 32 * together <= 1 << 16
            assert first.shared + done.shared <= aot.SHARED_LIMIT[90]


def ptxas_output(ptx: str, arch: int, registers: int) -> str:
    """What NVIDIA's assembler says of a kernel."""
    tool = Path(nvidia.__file__).parent / "bin" / ("ptxas-blackwell" if arch >= 100 else "ptxas")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        suffix = "a" if arch >= 90 else ""
        command = [str(tool), "-v", f"--gpu-name=sm_{arch}{suffix}", f"--maxrregcount={registers}", file.name]
        run = subprocess.run([*command, "-o", os.devnull], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def test_the_assembler_serialises_no_matrix_product(compiled):
    """Warnings C75xx: ptxas makes a warp group wait for each wgmma."""
    seen = 0
    for (head, name), done in compiled.items():
        if "wgmma" in done.ptx:
            text = ptxas_output(done.ptx, head[0], min(255, (1 << 16) // (32 * done.num_warps)))
            assert "C75" not in text, (head, name, text)
            seen += 1
    assert seen
