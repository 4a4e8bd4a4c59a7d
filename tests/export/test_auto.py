"""The precision that is chosen by measurement, and what is not offered."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vilu import UserError
from vilu.export import auto
from vilu.export.checks import OverBudgetError
from vilu.export.precision import needs
from vilu.export.sample import draw_sample

MODERN = {"avx2", "avx512_vnni", "amx_bf16"}


@pytest.fixture
def modern(monkeypatch):
    """This machine as one with VNNI, AMX and OpenVINO."""
    monkeypatch.setattr(auto.session, "cpu_flags", lambda: frozenset(MODERN))
    monkeypatch.setattr(auto.session, "has_openvino", lambda: True)


def verdicts(provider=None, flags=None):
    return {(row.precision, row.provider): row.verdict for row in auto._offered(provider, flags)}


def test_what_the_processor_lacks_is_not_offered(modern):
    every = verdicts()
    assert [way for way, verdict in every.items() if verdict] == [("bfloat16", "cpu")]
    old = verdicts(flags=["avx2"])
    assert "lacks VNNI" in old["int8", "cpu"]
    assert "AMX" in old["bfloat16", "openvino"]
    assert not old["float32", "cpu"]
    assert [way for way, verdict in verdicts(provider="cpu").items() if not verdict] == [
        ("float32", "cpu"),
        ("int8", "cpu"),
    ]
    assert needs("int8", {"avx_vnni"}) == ""
    assert needs("float32", ()) == ""


def test_what_only_the_servers_have_cannot_be_measured(monkeypatch):
    monkeypatch.setattr(auto.session, "cpu_flags", lambda: frozenset({"avx2"}))
    assert "cannot be measured" in verdicts(flags=MODERN)["int8", "cpu"]


@pytest.fixture
def stubbed(modern, monkeypatch):
    """Speeds without a measurement, and exports of which int8 is over its budget."""
    tries = []

    def export(checkpoint, output, **options):
        tries.append((options["precision"], options["provider"]))
        if options["precision"] == "int8":
            raise OverBudgetError("export refused: too far")
        return options

    speeds = {("float32", "openvino"): 20.0, ("float32", "cpu"): 30.0, ("bfloat16", "openvino"): 10.0}
    speeds |= {("int8", "openvino"): 40.0, ("int8", "cpu"): 5.0}
    monkeypatch.setattr(auto, "export", export)
    monkeypatch.setattr(auto, "_time", lambda rows, *_: {k: v for k, v in speeds.items() if k in open_ways(rows)})
    return tries


def open_ways(rows):
    return {(row.precision, row.provider) for row in rows if not row.verdict}


def test_the_fastest_within_its_budget_is_exported(stubbed, tmp_path, clip, checkpoint):
    report = auto.export_fastest(checkpoint, tmp_path / "r", clip=clip)
    assert stubbed == [("int8", "openvino"), ("float32", "cpu")]
    tried = {(row["precision"], row["provider"]): row for row in report["tried"]}
    assert tried["int8", "openvino"]["verdict"] == "export refused: too far"
    assert tried["int8", "openvino"]["images_per_second"] == 40
    assert tried["float32", "cpu"]["verdict"] == "chosen"
    assert tried["bfloat16", "openvino"]["verdict"] == "slower"
    assert tried["bfloat16", "cpu"]["images_per_second"] is None


def test_no_way_within_its_budget(stubbed, tmp_path, clip, checkpoint, monkeypatch):
    monkeypatch.setattr(auto, "_time", lambda *_: {("int8", "cpu"): 5.0})
    with pytest.raises(UserError, match="no precision is within"):
        auto.export_fastest(checkpoint, tmp_path / "r", clip=clip)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(("provider", "message"), [("cuda", "a CPU has openvino and cpu"), ("openvino", "OpenVINO is")])
def test_a_provider_that_cannot_be_timed(stubbed, tmp_path, clip, checkpoint, monkeypatch, provider, message):
    monkeypatch.setattr(auto.session, "has_openvino", lambda: False)
    with pytest.raises(UserError, match=f"^--precision auto: {message}"):
        auto.export_fastest(checkpoint, tmp_path / "r", clip=clip, provider=provider)
    assert stubbed == []


def test_a_tower_is_timed_and_its_export_says_so(tmp_path, tower_cache, repository, clip, checkpoint):
    """The float32 towers come from the cache: nothing is traced."""
    report = auto.export_fastest(
        checkpoint, tmp_path / "r", clip=clip, provider="cpu", cpu_flags=["avx2"], max_batch_size=8, cache=tower_cache
    )
    assert (report["precision"], report["provider"]) == ("float32", "cpu")
    (chosen,) = [row for row in report["tried"] if row["verdict"] == "chosen"]
    assert chosen["images_per_second"] > 0
    assert json.loads((tmp_path / "r" / "parity.json").read_text())["tried"] == report["tried"]
    assert "## Why this precision" in (tmp_path / "r" / "parity.md").read_text()


def test_each_int8_graph_is_made_for_its_provider(tmp_path, tower_cache, repository, clip, checkpoint):
    sample = draw_sample(clip, checkpoint.class_set.names, None, None, calibrate=True)
    paths = [auto._tower(clip, sample, tmp_path, auto.Cache(tower_cache), "int8", p) for p in ("cpu", "openvino")]
    assert paths[0].read_bytes() != paths[1].read_bytes()


def test_a_large_tower_is_timed_on_smaller_batches(monkeypatch):
    clock = iter([0.0, 0.5, 0.0, 40.0, 0.0, 1e-3])
    monkeypatch.setattr(auto, "time", SimpleNamespace(perf_counter=lambda: next(clock)))

    class Tower:
        def run(self, names, feed):
            assert len(feed["PIXELS"]) == 1

    tower: Any = Tower()
    pixels = np.zeros((16, 2, 2, 3), np.uint8)
    assert [auto._fitting(tower, pixels, 8.0) for _ in range(3)] == [4, 1, 16]
