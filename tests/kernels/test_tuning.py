"""`bench/head.py --tune` and the table that it writes."""

import functools
import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from bench import head_forms, head_tuning
from bench.head_timing import DeviceFailedError
from tests.kernels.reference import DEVICE, runs_kernels
from vilu import ViLUHead
from vilu.kernels import fold, plan

fused = pytest.importorskip("vilu.kernels.fused")
pytestmark = runs_kernels


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("attend_image", {"TILE": 512, "waves": 2}),
        ("attend_tile", {"BLOCK_N": 64, "RESIDENT": 1}),
        ("tail", {"CHUNK": 32}),
    ],
)
def test_tuning_takes_the_fastest_settings_that_pass_the_gate(name, chosen, tmp_path, monkeypatch):
    """The search that `bench/head.py --tune` makes, on the real kernels; only the clock is ours."""
    condition = {"bytes": 4, "width": 64, "projected": True, "folded": False}
    old = [condition | {"TILE": 1}, {"bytes": 2, "TILE": 2}]
    first = next(iter(chosen))
    spilling = 2 * chosen[first]
    candidates = {key: [*([0] if "BLOCK" in key else []), value] for key, value in chosen.items()}
    candidates[first].append(spilling)
    monkeypatch.setattr(head_tuning, "CANDIDATES", {name: candidates})
    monkeypatch.setattr(head_tuning, "never_spills", lambda role, settings, *_: settings[role][first] != spilling)
    monkeypatch.setattr(head_tuning, "TUNED_CLASSES", {"plain": 40})
    images = {"attend_image": 2, "attend_tile": 17, "tail": 9}[name]
    monkeypatch.setattr(head_tuning, "TUNED_IMAGES", {name: {4: images}})
    monkeypatch.setattr(head_forms, "ViLUHead", functools.partial(ViLUHead, hidden=(24, 8)))

    def clock(run, *, cold):
        """Each of the wished settings saves a second, the one that spills saves more; a block of 0 compiles nowhere."""
        current = dict(dict(fused.tuned(0, None))[name])
        return [20.0 - sum(current[key] == value for key, value in chosen.items()) - 5 * (current[first] == spilling)]

    monkeypatch.setattr(head_tuning, "gpu", clock)
    arch = str(fused.device_of(0)[0])
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps({arch: {name: old}}))
    head_tuning.tune(DEVICE, [name], [64], [torch.float32], path)
    best, kept = json.loads(path.read_text())[arch][name]
    assert {key: best[key] for key in (*condition, *chosen)} == condition | chosen
    assert f"{1e6 * (20 - len(chosen)):.1f} us" in best["from"]
    assert kept == old[1], "an entry for other conditions stays"

    before = path.read_text()
    monkeypatch.setattr(head_forms.Exact, "error", lambda self, run, v: math.inf)
    head_tuning.tune(DEVICE, [name], [64], [torch.float32], path)
    assert path.read_text() == before, "where nothing passes the gate, nothing is written"
    assert fused.tuned is plan.tuned


def test_a_failed_gpu_ends_the_search(tmp_path, monkeypatch):
    """A CUDA error is no slow setting: it fails everything that comes after it."""

    def fail(run, *, cold):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(head_tuning, "CANDIDATES", {"tail": {"CHUNK": [16]}})
    monkeypatch.setattr(head_tuning, "TUNED_CLASSES", {"plain": 40})
    monkeypatch.setattr(head_tuning, "TUNED_IMAGES", {"tail": {4: 9}})
    monkeypatch.setattr(head_forms, "ViLUHead", functools.partial(ViLUHead, hidden=(24, 8)))
    monkeypatch.setattr(head_tuning, "gpu", fail)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", functools.partial(fail, None, cold=True))
    path = tmp_path / "tuning.json"
    path.write_text("{}")
    with pytest.raises(DeviceFailedError, match="illegal memory access"):
        head_tuning.tune(DEVICE, ["tail"], [64], [torch.float32], path)
    assert path.read_text() == "{}"
    head_tuning.tune(DEVICE, ["tail"], [64], [torch.float32], path, end=0.0)
    assert path.read_text() == "{}", "no search begins when the time is over"


def test_every_kernel_is_tuned_on_a_batch_that_runs_it():
    """Of a batch that runs another kernel the times are noise, and would enter the table as a measurement."""
    for name, by_bytes in head_tuning.TUNED_IMAGES.items():
        for (itemsize, images), layout in itertools.product(by_bytes.items(), head_tuning.TUNED_CLASSES):
            dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
            case = head_forms.Case(images, head_tuning.TUNED_CLASSES[layout], 64, dtype)
            folded = fold(ViLUHead(64), torch.eye(3, 64).to(dtype), layout=layout)
            large = name in ("score_tile", "sum_tile")
            for arch in (80, 90):
                runs = head_tuning.runs(name, case, folded, arch, 132)
                assert runs == (not large or (layout == "plain" and arch == 90)), (name, itemsize, layout, arch)


def test_the_committed_table_is_written_as_it_is_read():
    text = Path(plan.__file__).with_name("tuning.json").read_text()
    assert head_tuning.one_line_an_entry(json.loads(text)) == text
    for roles in json.loads(text).values():
        for entry in (entry for entries in roles.values() for entry in entries):
            assert entry["from"], "every entry says where its settings come from"
