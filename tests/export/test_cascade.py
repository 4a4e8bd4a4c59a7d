"""`vilu export --cascade`: one repository of several stages, each proven, or one line and nothing written."""

import io
import json
import math
import re
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from vilu import UserError, save_checkpoint
from vilu.checkpoint import digest
from vilu.cli.export import export_command
from vilu.cli.info import info_command
from vilu.clip import Clip
from vilu.export import auto, export, versions
from vilu.export import cascade as cascades
from vilu.export.cascade import STAGE_MODELS, export_cascade
from vilu.export.checks import OverBudgetError
from vilu.export.measure import Measured
from vilu.export.parity import Answers
from vilu.export.rule import compare_rule, rule_problems, within_budget
from vilu.preprocess.image import Transform, decode, opened, resized
from vilu.serving.about import load_config


def test_every_stage_and_the_rule_are_proven(cascade, repository):
    report = json.loads((cascade.root / "parity.json").read_text())
    assert report == cascade.report
    said = report["cascade"]
    (second,) = said["stages"]
    for one in (report, second):
        assert one["answers"][one["provider"]]["failure_probability_error"]["max"] <= 1e-4
        assert one["answers"][one["provider"]]["argmax_agreement"] == 1
    assert second["clip"]["name"] != report["clip"]["name"]
    assert (said["threshold"], said["front"], report["over_budget"]) == (cascade.threshold, "vilu_cascade", [])
    rule = said["rule"]
    assert (rule["images"], rule["not_near"], rule["argmax_agreement"]) == (256, 0, 1)
    assert sum(rule["stages"]) == pytest.approx(1)
    assert min(rule["stages"]) > 0.05, "each stage answers a share of the images"
    text = (cascade.root / "parity.md").read_text()
    assert "# Stage 2: Parity of this repository" in text
    assert "vilu_cascade_open" in (cascade.root / "README.md").read_text()


def test_the_repository_is_that_of_the_first_stage_and_more(cascade, repository):
    later = {f"stage2_{name}" for name in STAGE_MODELS}
    more = {"vilu_cascade", "vilu_cascade_open", "vilu_router", "stage2_vilu", "stage2_vilu_open"}
    assert set(versions.models(cascade.root)) == {*versions.models(repository), *later, *more}
    assert [path.name for path in cascade.root.iterdir() if path.name.startswith(".")] == []
    config = load_config(cascade.root / "stage2_vilu_text" / "config.pbtxt")
    assert [step.model_name for step in config.ensemble_scheduling.step] == ["stage2_tokenize", "stage2_clip_text"]
    result = CliRunner().invoke(info_command, [str(cascade.root)], catch_exceptions=False)
    assert f"P(failure) > {cascade.threshold:.6g}" in result.output


def test_the_towers_share_the_cores(cascade, repository):
    """No tower's threads are tied to a core, tiny ones take one thread and no OpenVINO, and later stages come first."""
    alone = load_config(repository / "clip_image" / "config.pbtxt").parameters
    assert "pin_threads" not in alone
    assert "nice" not in load_config(repository / "preprocess" / "config.pbtxt").parameters
    nice = {"preprocess": 10, "clip_image": 10, "stage2_clip_image": 0, "clip_text": 15, "stage2_clip_text": 15}
    for name, value in nice.items():
        tower = load_config(cascade.root / name / "config.pbtxt").parameters
        assert tower["nice"].string_value == str(value)
        if not name.endswith("clip_image"):
            continue
        assert tower["pin_threads"].string_value == "no"
        assert tower["intra_op_thread_count"].string_value == "1"
        # This fixture's first stage is the export of one model alone, which is served by OpenVINO where it is there.
        served = "cpu" if name.startswith("stage2") else alone["provider"].string_value
        assert tower["provider"].string_value == served


@pytest.mark.parametrize(("size", "threads"), [(99_999_999, "1"), (100_000_000, "4"), (500_000_000, "8")])
def test_larger_towers_take_more_threads(tmp_path, monkeypatch, size, threads):
    monkeypatch.setattr(cascades, "multiply_adds", lambda _: size)
    for name in ("clip_image", "clip_text", "preprocess"):
        for prefix in ("", "stage2_"):
            folder = tmp_path / f"{prefix}{name}"
            folder.mkdir()
            text = 'parameters { key: "intra_op_thread_count" value { string_value: "8" } }' if "clip" in name else ""
            (folder / "config.pbtxt").write_text(text)
    cascades._share_cores(tmp_path, cast(Any, (None, None)))
    for name in ("clip_image", "stage2_clip_image"):
        given = load_config(tmp_path / name / "config.pbtxt").parameters
        assert given["intra_op_thread_count"].string_value == threads


def test_one_decoding_gives_every_size():
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    for kind in ("JPEG", "PNG", "WEBP"):
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, kind)
        image = opened(buffer.getvalue(), Transform(32))
        for transform in (Transform(32), Transform(48), Transform(24, "squash", "bilinear"), Transform(150)):
            assert np.array_equal(resized(image, transform), decode(buffer.getvalue(), transform))


def answers(failure, index):
    return Answers(np.zeros((len(index), 1)), np.array(index), np.array(failure, np.float32))


def test_a_rule_that_routes_otherwise_is_refused():
    eager = answers([0.1, 0.4, 0.5, 0.9], [0, 0, 0, 0]), answers([0.1] * 4, [1, 1, 1, 1])
    near = answers([0.1, 0.4, 0.50001, 0.9], [0, 0, 0, 0]), eager[1]
    far = answers([0.1, 0.6, 0.5, 0.9], [0, 0, 0, 0]), eager[1]
    for served, moved, not_near in ((eager, 0, 0), (near, 1, 0), (far, 1, 1)):
        measured = [Measured({}, {"cpu": b}, a) for a, b in zip(eager, served, strict=True)]
        rule = compare_rule(measured, 0.5)
        assert (rule["routed_differently"], rule["not_near"], rule["misrouted"]) == (moved, not_near, [not_near])
        assert rule["argmax_agreement"] == 1 - moved / 4
        assert len(rule_problems(rule, ["float32", "float32"])) == not_near
    assert rule["stages"] == [0.5, 0.5]
    assert rule_problems(rule | {"images": 1000}, ["float16", "float32"]) == []


def three_stages(first, second):
    """What is measured of three stages over four doubtful images, of which the first and second send on as given."""
    eager = [answers([0.9] * 4, [number] * 4) for number in range(3)]
    served = answers(first, [0] * 4), answers(second, [1] * 4), eager[2]
    return {n: Measured({}, {"cpu": b}, a) for n, (a, b) in enumerate(zip(eager, served, strict=True))}


def fast(precision="int8"):
    return {
        "precision": precision,
        "tried": [
            {"precision": "int8", "provider": "cpu", "images_per_second": 2.0, "verdict": "chosen"},
            {"precision": "float32", "provider": "cpu", "images_per_second": 1.0, "verdict": "slower"},
            {"precision": "bfloat16", "provider": "cpu", "images_per_second": None, "verdict": "not there"},
        ],
    }


def test_a_stage_that_misroutes_gets_a_slower_precision():
    """The second stage keeps three images that its eager model sends on, the first keeps one; the third routes none."""
    measured = three_stages([0.9, 0.9, 0.9, 0.1], [0.1, 0.1, 0.1, 0.1])
    reports, written = [fast(), fast(), fast()], []
    truth = three_stages([0.9] * 4, [0.9] * 4)

    def write(number, tried):
        written.append(number)
        assert [row["verdict"] for row in tried[1:]] == ["", "not there"]
        assert re.fullmatch(r"with it the cascade sends .* to another stage .*", tried[0]["verdict"])
        measured[number] = truth[number]
        return {"precision": "float32", "tried": tried}

    rule, problems = within_budget(reports, measured, 0.5, write)
    assert (written, problems, rule["misrouted"]) == ([1, 0], [], [0, 0])
    assert [one["precision"] for one in reports] == ["float32", "float32", "int8"]


def test_a_cascade_with_no_precision_left_is_refused():
    measured, written = three_stages([0.9, 0.9, 0.9, 0.1], [0.1, 0.1, 0.1, 0.1]), []

    def write(number, tried):
        written.append(number)
        raise OverBudgetError("no precision is within its parity budget")

    reports = [fast(), fast(), fast()]
    _, (problem,) = within_budget(reports, measured, 0.5, write)
    assert written == [1, 0]
    assert "sends 100.00% of the images" in problem
    assert problem.endswith("no other precision of stage 1 and 2 is within its parity budget")
    assert reports == [fast()] * 3
    _, (problem,) = within_budget([{"precision": "int8"}] * 3, measured, 0.5, write)
    assert written == [1, 0], "a precision that was asked for is kept"
    assert "no other precision" not in problem


def test_bad_input_is_one_line_and_writes_nothing(cascade, tmp_path, larger):
    small, large = tmp_path / "small.safetensors", tmp_path / "large.safetensors"
    other, bare, note = tmp_path / "other.safetensors", tmp_path / "bare.safetensors", tmp_path / "cascade.json"
    checkpoints = [replace(one, clip=replace(one.clip, pretrained=one.clip.pretrained)) for one in cascade.checkpoints]
    for path, checkpoint in zip((small, large), checkpoints, strict=True):
        save_checkpoint(checkpoint, path)
    save_checkpoint(replace(checkpoints[1], class_set=larger.class_set(("cat", "dog"))), other)
    save_checkpoint(replace(checkpoints[1], class_set=None), bare)
    written = "not what `vilu calibrate --cascade --output` writes"
    stages = [{"head": digest(one), "accuracy": 0.8 + 0.1 * i} for i, one in enumerate(checkpoints)]
    good: dict[str, Any] = {"format": "vilu-cascade", "version": 1, "threshold": 0.5, "stages": stages}
    worse = good | {"stages": [stages[0], stages[1] | {"accuracy": 0.8}]}
    before = sorted(tmp_path.iterdir())
    cases: tuple[tuple[tuple[Any, ...], Any, str], ...] = (
        ((small, large), None, "a cascade needs --cascade-threshold"),
        ((small,), 0.5, "two or more checkpoints"),
        ((small, other), 0.5, "stage 2 has other classes than stage 1"),
        ((small, bare), 0.5, "stage 2: this checkpoint holds no CLIP name and class set"),
        ((small, large), 1.5, r"must be in \[0, 1\]"),
        ((small, large), "nan", r"must be in \[0, 1\]"),
        ((small, large), "none.json", "'none.json': neither a number nor a file that can be read"),
        ((small, large), "", "'': neither a number nor"),
        ((small, large), {}, written),
        ((small, large), good | {"threshold": True}, written),
        ((small, large), good | {"threshold": "0.5"}, written),
        ((small, large), good | {"threshold": 1.5}, written),
        ((small, large), good | {"threshold": math.nan}, written),
        ((small, large), good | {"bound": math.inf}, written),
        ((small, large), good | {"stages": [stages[0], stages[1] | {"accuracy": math.nan}]}, written),
        ((small, large), good | {"stages": [stages[0], stages[1] | {"accuracy": "nan"}]}, written),
        ((small, large), worse, "no better than stage 1"),
        ((large, small), good, "chosen for another checkpoint as stage 1"),
        ((small, large, large), good, "a cascade of 2 stages, not of 3"),
    )
    for paths, threshold, message in cases:
        given = [] if threshold is None else ["--cascade-threshold", str(threshold)]
        if isinstance(threshold, dict):
            note.write_text(json.dumps(threshold))
            given = ["--cascade-threshold", str(note)]
        arguments = ["--cascade", *map(str, paths), *given, "--output", str(tmp_path / "out")]
        with pytest.raises(UserError, match=message):
            CliRunner().invoke(export_command, arguments, catch_exceptions=False, standalone_mode=False)
    note.unlink()
    assert sorted(tmp_path.iterdir()) == before
    cascaded = ["--cascade", str(small), str(large), "--cascade-threshold", "0.5", "--output", str(tmp_path / "out")]
    for arguments, message in (
        (["--cascade", str(small), str(large), "--threshold", "0.5"], "every stage of a cascade has"),
        ([*cascaded, "--escalation-seconds", "inf"], "escalation_seconds must be above 0 and at most 3600, got inf"),
        ([str(small)], "or give --cascade"),
        (["--ckpt", str(small), "--cascade-default"], "--cascade-default is for --cascade"),
        ([], "give --ckpt"),
    ):
        with pytest.raises(UserError, match=message):
            CliRunner().invoke(export_command, arguments, catch_exceptions=False, standalone_mode=False)


@pytest.mark.slow
def test_the_precision_of_each_stage_is_measured(cascade, tmp_path, monkeypatch, tower_cache):
    """Stage 1's faster precision is said to misroute images: it alone is exported again, and nothing embedded again."""
    exports: list[tuple[str, str]] = []
    embedded: list[tuple[int, int]] = []
    real, encode = compare_rule, Clip.encode_pixels

    def write(*given, **options):
        exports.append((options["clip"].spec.name, options["provider"]))
        return export(*given, **options)

    def encoded(self, feed):
        embedded.append((len(exports), len(feed)))
        return encode(self, feed)

    def compared(*given):
        return real(*given) | ({"not_near": 9, "misrouted": [9]} if len(exports) < 3 else {})

    monkeypatch.setattr(auto, "SECONDS", 0.1)
    monkeypatch.setattr(auto, "export", write)
    monkeypatch.setattr(Clip, "encode_pixels", encoded)
    monkeypatch.setattr("vilu.export.rule.compare_rule", compared)
    paths = [tmp_path / f"{number}.safetensors" for number in (1, 2)]
    for path, checkpoint in zip(paths, cascade.checkpoints, strict=True):
        save_checkpoint(checkpoint, path)
    given = [*map(str, paths), "--cascade-threshold", str(cascade.threshold), "--output", str(tmp_path / "r")]
    given += ["--precision", "auto", "--cpu-flags", "avx2", "--max-batch-size", "8"]
    given += ["--cache", str(tower_cache.parent)]
    done = CliRunner().invoke(export_command, ["--cascade", *given], catch_exceptions=False)
    assert done.exit_code == 0
    report = json.loads((tmp_path / "r" / "parity.json").read_text())
    for number, one in enumerate((report, *report["cascade"]["stages"]), 1):
        ways = {(row["precision"], row["provider"]): row for row in one["tried"]}
        assert ways["float32", "cpu"]["images_per_second"] > 0
        assert "lacks VNNI" in ways["int8", "cpu"]["verdict"]
        assert re.search(rf"^stage {number}: float32 \w+: [\d.]+ images/s, chosen$", done.output, re.MULTILINE)
        assert f"stage {number}: int8 cpu: not faster: the processor lacks VNNI" in done.output
    text = (tmp_path / "r" / "parity.md").read_text()
    assert text.count("## Why this precision") == 2
    (first, aside), (second, _), (again, taken) = exports
    assert first == again != second
    assert report["provider"] == taken != aside
    verdicts = {row["provider"]: row["verdict"] for row in report["tried"] if row["precision"] == "float32"}
    assert verdicts[taken] == "chosen"
    assert verdicts[aside].startswith("with it the cascade sends 3.52% of the images to another stage")
    assert f"{aside} | " in text
    assert verdicts[aside] in text
    assert max(images for number, images in embedded if number == 3) <= 2, "the shape of the output alone"


def test_a_stage_over_its_budget_is_named(cascade, tmp_path):
    def write(checkpoint, *_, **__):
        if checkpoint is cascade.checkpoints[1]:
            raise OverBudgetError("export refused: a line")
        return {}

    options: dict[str, Any] = {"write": write, "precision": "float32", "threshold": 0.5}
    with pytest.raises(OverBudgetError, match=r"^stage 2: export refused: a line$"):
        export_cascade(cascade.checkpoints, cascade.clips, tmp_path / "repository", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_stage_over_its_budget_leaves_the_old_repository(cascade, tmp_path, monkeypatch, tower_cache):
    root = tmp_path / "repository"
    options = {
        "write": export,
        "precision": "float32",
        "max_batch_size": 8,
        "cache": tower_cache,
        "threshold": cascade.threshold,
    }

    def write(*given, **more):
        return export(*given, **more) | {"over_budget": ["a line"]}

    report = export_cascade(
        cascade.checkpoints, cascade.clips, root, **options | {"write": write, "allow_loss": True}, as_default=True
    )
    assert report["over_budget"] == ["stage 1: a line", "stage 2: a line"]
    for name in ("vilu", "vilu_open"):
        same = (load_config(root / one / "config.pbtxt") for one in (name, name.replace("vilu", "vilu_cascade")))
        assert len({one.ensemble_scheduling.SerializeToString(deterministic=True) for one in same}) == 1
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    real = compare_rule

    def far(*given):
        return real(*given) | {"not_near": 3}

    monkeypatch.setattr("vilu.export.rule.compare_rule", far)
    with pytest.raises(UserError, match=r"sends 1\.17% of the images to another stage"):
        export_cascade(cascade.checkpoints, cascade.clips, root, **options, as_default=True)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]
