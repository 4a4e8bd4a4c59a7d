"""The command in odd places: a full output, a terminal without UTF-8, no home, links and hidden files."""

import getpass
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

import vilu
from vilu import UserError, cli
from vilu.cli import options
from vilu.cli.ask import find_images
from vilu.data.cache import default_cache
from vilu.data.image_files import image_files


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", [["--version"], ["--help"]])
def test_a_full_output_is_one_line(arguments):
    with open("/dev/full", "w") as full:
        run = subprocess.run([sys.executable, "-m", "vilu", *arguments], stdout=full, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 1
    assert run.stderr == "vilu: its output cannot be written (No space left on device)\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_traceback(closed, tmp_path):
    command = f"'{sys.executable}' -m vilu --log-file '{tmp_path}/log' classes --help {closed}"
    run = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert (tmp_path / "log").read_text() == ""  # the file has not taken the number of a stream


@pytest.fixture(autouse=True)
def no_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["odd"])


def printed(monkeypatch, encoding, text):
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding=encoding))
    with pytest.raises(SystemExit) as ended:
        cli.run(click.Command("odd", callback=lambda: print(text)), "odd")
    assert ended.value.code == 0
    return output.getvalue()


def test_a_terminal_without_utf8(monkeypatch):
    assert printed(monkeypatch, "ascii", "AUC ↑ 1–2 caf\udcff") == b"AUC ? 1?2 caf\xff\n"
    assert printed(monkeypatch, "utf-8", "AUC ↑ caf\udcff") == "AUC ↑ caf".encode() + b"\xff\n"


def test_tables_without_utf8(monkeypatch):
    from vilu.cli.tables import print_answers
    from vilu.serving import Answer

    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="ascii"))
    answer = Answer("chat-\udce9.jpg", "été", 0, 0.5, 0.25, True)
    with pytest.raises(SystemExit):
        cli.run(click.Command("odd", callback=lambda: print_answers([answer])), "odd")
    assert b"?t?" in output.getvalue()


def test_an_interrupt_says_what_was_kept(capsys):
    def interrupted():
        raise KeyboardInterrupt("interrupted; the answers until then are in a.part.csv")

    with pytest.raises(SystemExit) as ended:
        cli.run(click.Command("odd", callback=interrupted), "odd")
    assert ended.value.code == 130
    assert capsys.readouterr().err.strip() == "odd: interrupted; the answers until then are in a.part.csv"


def test_no_home(monkeypatch, capsys):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_001)  # a number without an entry in passwd
    with pytest.raises(UserError, match="set VILU_CACHE"):
        default_cache()
    assert options.default_cache() is None  # nothing needs the cache but the speed of the next run
    assert "set VILU_CACHE to a folder that keeps embeddings; until then none are kept" in capsys.readouterr().err


def test_a_user_without_a_name(monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_001)
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()  # as torch does
    vilu._name_the_user()
    assert getpass.getuser() == "4000000001"


def test_links_are_followed_and_hidden_files_are_not_looked_at(tmp_path):
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    hidden = ["._a.jpg", ".DS_Store", ".cache/b.jpg", ".ipynb_checkpoints/c.png"]
    for path in (*(photos / name for name in ("a.jpg", "x.jpg/e.webp", *hidden)), elsewhere / "d.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (photos / "more").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(photos)
    (tmp_path / "link").symlink_to(photos)
    expected = ["a.jpg", "more/d.png", "x.jpg/e.webp"]
    assert [str(path.relative_to(photos)) for path in image_files(photos)] == expected
    for folder in (photos, tmp_path / "link"):
        assert list(find_images([str(folder)])) == [f"{folder}/{name}" for name in expected]


def test_images_of_other_kinds_are_named(tmp_path, capsys):
    for name in ("a.jpg", "b.bmp", "c.heic"):
        (tmp_path / name).write_bytes(b"")
    assert list(find_images([str(tmp_path)])) == [f"{tmp_path}/a.jpg"]
    assert f"left out: {tmp_path}/b.bmp is not .jpg, .png or .webp" in capsys.readouterr().err


def test_a_folder_that_hides_the_package(tmp_path):
    (tmp_path / "vilu").mkdir()
    (tmp_path / "vilu" / "__main__.py").write_text(Path(cli.__file__).parents[1].joinpath("__main__.py").read_text())
    run = subprocess.run([sys.executable, "-E", "-S", "-m", "vilu"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == "vilu: a folder 'vilu' here hides the installed package; start Python in another folder\n"


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="needs root, and setpriv of util-linux")
def test_a_folder_that_may_not_be_searched_is_one_line_or_left_out(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    os.chown(closed, 54321, 54321)
    rights = "-dac_override,-dac_read_search"  # what lets root search it
    drop = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}", sys.executable]
    asked = subprocess.run([*drop, "-m", "vilu", "info", closed / "head.safetensors"], capture_output=True, text=True)
    assert (asked.returncode, len(asked.stderr.splitlines())) == (2, 1), asked.stderr
    assert str(closed / "head.safetensors") in asked.stderr
    find = "from vilu.serving.tritonserver import find_tritonserver as find\nfrom vilu import UserError\n"
    find += "try: find()\nexcept UserError: pass"
    path = {"PATH": f"{closed}:{os.environ['PATH']}"}
    found = subprocess.run([*drop, "-c", find], env=os.environ | path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
