"""`vilu eval --cascade` on the embedded pair with heads that `vilu train` trains here, and its one-line errors."""

import json

import pytest
from click.testing import CliRunner
from PIL import Image

from tests.serving.browser import Browser, find_chromium
from vilu import load_checkpoint, save_checkpoint, tiny
from vilu.checkpoint import Checkpoint
from vilu.cli.eval import eval_command
from vilu.cli.train import train_command
from vilu.evaluation.cascade_curve import METHODS
from vilu.evaluation.report.tables import HTML


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Checkpoints of a small and a large head on the digits, and the folder of their embeddings."""
    folder = tmp_path_factory.mktemp("pair")
    for name in tiny.FOLDERS:
        arguments = ["--clip", name, "--dataset", "digits", "--epochs", "5", "--no-estimate-images"]
        arguments += ["--output", str(folder / f"{name}.safetensors"), "--cache", str(folder / "cache")]
        CliRunner().invoke(train_command, arguments, catch_exceptions=False, standalone_mode=False)
    return folder


@pytest.fixture(scope="module")
def evaluated(pair):
    """What `vilu eval --cascade --json` prints of them, and its report's folder."""
    paths = [str(pair / f"{name}.safetensors") for name in (tiny.NAME, tiny.LARGE)]
    options = ["--dataset", "digits", "--resamples", "50", "--cache", str(pair / "cache"), "--json"]
    arguments = ["--cascade", *paths, *options, "--output", str(pair / "out")]
    result = CliRunner().invoke(eval_command, arguments, catch_exceptions=False, standalone_mode=False)
    assert result.stderr == ""
    return json.loads(result.stdout), pair / "out"


@pytest.fixture
def ask(command_line, pair):
    call = command_line(eval_command, "vilu eval")

    def of(*options, names=(tiny.NAME, tiny.LARGE)):
        paths = [pair / f"{name}.safetensors" for name in names]
        return call("--cascade", *paths, "--cache", pair / "cache", *options)

    return of


def test_the_embedded_pair(ask, evaluated):
    document, folder = evaluated
    small, large = document["alone"]
    assert (small["name"], large["name"]) == (tiny.NAME, tiny.LARGE)
    assert large["accuracy"]["value"] > small["accuracy"]["value"] + 0.05
    assert 15 < large["cost"]["multiply_adds"] / small["cost"]["multiply_adds"] < 30
    assert [line["method"] for line in document["lines"]] == list(METHODS)
    ours, *others = document["lines"]
    assert ours["cheapest"]["accuracy"]["value"] >= large["accuracy"]["value"] - document["margin"]
    assert 0 < ours["cheapest"]["reached"][1] < 1
    assert ours["share"]["value"] < min(line["share"]["value"] for line in others)
    assert json.loads((folder / "evaluation.json").read_text())["lines"] == document["lines"]
    code, out, err = ask("--dataset", "digits", "--resamples", 5, "--margin", 0.02)
    assert (code, err) == (0, "")
    for words in ("vilu-tiny-large", "P(failure)", "Entropy", "loses at most 2 points against the last stage"):
        assert words in out


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium: apt-get install chromium")
def test_the_page_of_the_report_is_drawn(evaluated, tmp_path):
    _, folder = evaluated
    with Browser(find_chromium()) as browser:
        browser.go((folder / HTML).as_uri())
        browser.wait("document.images.length === 1 && document.images[0].complete")
        assert browser.run("document.images[0].naturalWidth") > 400
        assert browser.run("document.images[0].getBoundingClientRect().height") > 200
        rows = browser.run("[...document.querySelectorAll('tbody tr')].map((row) => row.cells[0].textContent)")
        assert rows[: 2 + len(METHODS)] == [tiny.NAME, tiny.LARGE, *METHODS]
        browser.screenshot(tmp_path / "page.png")
        box = browser.run(
            "(({x, y, right, bottom}) => [x, y, right, bottom])(document.images[0].getBoundingClientRect())"
        )
        drawn = Image.open(tmp_path / "page.png").convert("L").crop(box)
        assert drawn.getextrema()[0] < 60, "the picture is not blank"
        assert browser.complaints == []
        assert all(one.startswith(("file:", "data:")) for one in browser.requests)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "takes one data set"),
        (("--dataset", "digits", "--dataset", "shapes"), "takes one data set"),
        (("--dataset", "digits", "--clip", "vilu-tiny"), "--clip has no meaning beside --cascade"),
        (("--dataset", "digits", "--methods", "MCM"), "--methods has no meaning beside --cascade"),
        (("--dataset", "digits", "--ckpt", "{d}/vilu-tiny.safetensors"), "two or more checkpoints"),
        (("--dataset", "shapes-captions"), "answers with classes, not with captions"),
        (("--dataset", "digits", "--split", "train"), "nothing can be promised on them"),
        (("--dataset", "digits", "--output", "{d}"), "not part of an earlier report"),
    ],
)
def test_a_mistake_is_one_line(ask, pair, options, said):
    code, out, err = ask(*(str(option).format(d=pair) for option in options))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


def test_stages_that_do_not_fit(ask, pair, command_line):
    assert "two or more checkpoints" in ask("--dataset", "digits", names=(tiny.NAME,))[2]
    large = load_checkpoint(pair / f"{tiny.LARGE}.safetensors")
    save_checkpoint(Checkpoint(large.head), pair / "nameless.safetensors")
    assert "names no CLIP" in ask("--dataset", "digits", names=(tiny.NAME, "nameless"))[2]
    plain = command_line(eval_command, "vilu eval")
    assert "or give --cascade" in plain(pair / "nameless.safetensors", "--dataset", "digits")[2]
    assert "give --ckpt" in plain("--dataset", "digits")[2]
    assert "--margin is for --cascade" in plain("--dataset", "digits", "--margin", 0.01)[2]
