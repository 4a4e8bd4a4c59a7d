"""The end of `vilu demo`: the promise is made, seen to be broken, and kept again."""

import pytest

from vilu.cli.demo_monitor import TARGET, promise
from vilu.export import export
from vilu.tiny.demo import checkpoint_of


@pytest.mark.slow
@pytest.mark.server
def test_a_broken_promise_raises_an_alarm_and_a_new_threshold_keeps_it(clip, tower_cache, tmp_path):
    checkpoint = checkpoint_of(clip, tmp_path / "head.safetensors", 0, lambda *_: None)
    repository = tmp_path / "model_repository"
    lines: list[str] = []
    export(checkpoint, repository, clip=clip, cache=tower_cache)
    report, picture = promise(tmp_path / "monitor", repository, clip, checkpoint, lines.append)
    old, new = report.watched
    assert (old.model_version, new.model_version) == (2, 3)
    assert old.target_risk == new.target_risk == TARGET
    assert {"risk", "drift"} == set(old.alarms)
    assert "risk" not in new.alarms
    assert new.low < TARGET
    assert "no alarm" in lines[1]
    assert "ALARM: risk and drift" in lines[2]
    assert picture.read_bytes().startswith(b"\x89PNG")
