"""Whole or not at all: modes, links, failures, kills and rivals."""

import errno
import os
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from vilu import atomic
from vilu.errors import UserError

AS_ROOT = os.geteuid() == 0


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def save(path: Path, content: str, kind: str) -> None:
    """Write content as a file, or as a folder that holds it in two files."""
    if kind == "file":
        atomic.write(path, content)
        return
    with atomic.folder(path) as part:
        (part / "deep").mkdir()
        for name in ("a", "deep/b"):
            (part / name).write_text(content)


def load(path: Path) -> set[str]:
    """What is there: one element where it is whole."""
    return {p.read_text() for p in ([path] if path.is_file() else [path / "a", path / "deep" / "b"])}


both = pytest.mark.parametrize("kind", ["file", "folder"])


@both
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_one_has_the_permissions_of_any_new_one(tmp_path, kind, umask):
    before = os.umask(umask)
    try:
        save(tmp_path / "ours", "x", kind)
        (tmp_path / "file").write_text("x")
        (tmp_path / "folder").mkdir()
    finally:
        os.umask(before)
    assert mode(tmp_path / "ours") == mode(tmp_path / kind)


@both
def test_one_that_is_replaced_keeps_its_permissions(tmp_path, kind):
    save(tmp_path / "x", "old", kind)
    (tmp_path / "x").chmod(0o750)
    if AS_ROOT:
        os.chown(tmp_path / "x", 1234, 4321)
    before = (tmp_path / "x").stat()
    save(tmp_path / "x", "new", kind)
    after = (tmp_path / "x").stat()
    assert load(tmp_path / "x") == {"new"}
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_the_umask_of_the_process_is_never_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("os.umask is process-wide"))
    save(tmp_path / "a", "x", "file")
    save(tmp_path / "b", "x", "folder")


def test_text_keeps_its_line_ends_and_bytes_are_bytes(tmp_path):
    atomic.write(tmp_path / "x", "ä\r\n\n")
    assert (tmp_path / "x").read_bytes() == b"\xc3\xa4\r\n\n"
    atomic.write(tmp_path / "x", memoryview(b"\0\xff"))
    assert (tmp_path / "x").read_bytes() == b"\0\xff"


@both
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyError(1), KeyboardInterrupt()])
def test_a_failure_in_the_block_changes_nothing(tmp_path, kind, there, error):
    path = tmp_path / "x"
    if there:
        save(path, "old", kind)

    def attempt():
        with getattr(atomic, kind)(path) as part:
            (part if kind == "file" else part / "a").write_text("new")
            raise error

    if isinstance(error, OSError):
        with pytest.raises(UserError) as caught:
            attempt()
        assert str(caught.value) == f"{path}: cannot be written (No space left on device)"
    else:
        with pytest.raises(type(error)):
            attempt()
    assert [p.name for p in tmp_path.iterdir()] == ["x"] * there
    assert not there or load(path) == {"old"}


@both
@pytest.mark.parametrize("exchanges", [True, False])
def test_a_refused_rename_leaves_the_old_one(tmp_path, monkeypatch, kind, exchanges):
    save(tmp_path / "x", "old", kind)

    def refuse(source, target):
        if ".old" not in str(target) and ".old" not in str(source):
            raise OSError(errno.EIO, "Input/output error")
        return rename(source, target)

    rename = os.rename
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: exchanges and refuse(one, other))
    monkeypatch.setattr(os, "rename", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match="Input/output error"):
        save(tmp_path / "x", "new", kind)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert load(tmp_path / "x") == {"old"}


@both
@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_replaced_with_and_without_an_exchange_of_folders(tmp_path, monkeypatch, kind, exchanges):
    if not exchanges:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    for content in ("one", "two"):
        save(tmp_path / "deep" / "x" if kind == "folder" else tmp_path / "x", content, kind)
    path = tmp_path / "deep" if kind == "folder" else tmp_path
    assert [p.name for p in path.iterdir()] == ["x"]
    assert load(path / "x") == {"two"}


@both
@pytest.mark.parametrize("content", ["old", None])
def test_a_link_stays_a_link(tmp_path, kind, content):
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "x"
    if content:
        save(target, content, kind)
    (tmp_path / "link").symlink_to("real/x")
    save(tmp_path / "link", "new", kind)
    assert os.readlink(tmp_path / "link") == "real/x"
    assert load(target) == {"new"}
    assert [p.name for p in target.parent.iterdir()] == ["x"]


def test_what_cannot_be_written_is_one_line_before_any_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    cases = [
        ("file", "folder", "it is not a file"),
        ("file", "pipe", "it is not a file"),
        ("file", "loop", "it is not a file"),
        ("file", "absent/x", "No such file or directory"),
        ("file", "file/x", "Not a directory"),
        ("folder", "file", "it is not a folder"),
        ("folder", "loop", "it is not a folder"),
        ("folder", "file/x", "Not a directory|File exists"),
    ]
    for kind, name, reason in cases:
        with pytest.raises(UserError, match=f"^{tmp_path / name}: cannot be written \\(({reason})\\)$"):  # noqa: SIM117
            with getattr(atomic, kind)(tmp_path / name):
                pytest.fail("the block ran")
        if kind == "folder":
            with pytest.raises(UserError, match=reason):
                atomic.check_folder(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "loop", "pipe"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_check_leaves_nothing(tmp_path):
    atomic.check_folder(tmp_path / "x")
    assert not list(tmp_path.iterdir())


READ_ONLY = """
import os
from vilu import atomic
from vilu.errors import UserError
if os.geteuid() == 0:
    os.setuid(65534)  # root may write anywhere
for attempt in (lambda: atomic.write("shut/x", "new"), lambda: atomic.check_folder("shut/y")):
    try:
        attempt()
    except UserError as error:
        print(error)
"""


def test_a_read_only_folder_is_one_line():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to all other users
        os.chmod(folder, 0o755)
        shut = Path(folder, "shut")
        shut.mkdir()
        (shut / "x").write_text("old")
        (shut / "x").chmod(0o666)
        shut.chmod(0o555)
        run = subprocess.run(
            [sys.executable, "-c", READ_ONLY],
            env={**os.environ, "PYTHONPATH": str(Path(atomic.__file__).parent.parent)},
            cwd=folder, capture_output=True, text=True, check=True,
        )  # fmt: skip
        shut.chmod(0o755)
        assert [(p.name, p.read_text()) for p in shut.iterdir()] == [("x", "old")]
    assert run.stdout.splitlines() == [f"shut/{name}: cannot be written (Permission denied)" for name in "xy"]


# Dies before each line of atomic.py in turn, in a child of its own, until one gets through.
KILLED = """
import os, sys
from pathlib import Path
from vilu import atomic
kind, path, fallback = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "fallback"

def save(content):
    if kind == "file":
        return atomic.write(path, content)
    with atomic.folder(path) as part:
        (part / "deep").mkdir()
        for name in ("a", "deep/b"):
            (part / name).write_text(content)

def load():
    files = [path] if kind == "file" else [path / "a", path / "deep" / "b"]
    return {p.read_text() if p.exists() else "nothing" for p in files}

if fallback:
    atomic._exchange = lambda *_: False
save("old")
lines, found = 0, []
while True:
    lines += 1
    child = os.fork()
    if child == 0:
        left = lines
        def trace(frame, event, _):
            global left
            if frame.f_code.co_filename != atomic.__file__:
                return None
            left -= event == "line"
            if not left:
                os._exit(9)
            return trace
        sys.settrace(trace)
        save("new")
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found.append(load())
    if status == 0:
        break
    if found[-1] != {"old"}:
        save("old")
print(lines, *("+".join(sorted(each)) for each in found))
"""


@pytest.mark.parametrize("kind", ["file", "folder", "folder fallback"])
def test_a_kill_at_any_line_leaves_the_old_one_or_the_new_one(tmp_path, kind):
    kind, _, fallback = kind.partition(" ")
    run = subprocess.run(
        [sys.executable, "-c", KILLED, kind, tmp_path / "x", fallback],
        env={**os.environ, "PYTHONPATH": str(Path(atomic.__file__).parent.parent)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines, *found = run.stdout.split()
    assert int(lines) > 20
    assert found[0] == "old"
    assert found[-1] == "new"
    assert set(found) == ({"old", "new", "nothing"} if fallback else {"old", "new"})


@both
def test_rivals_each_write_all_of_theirs(tmp_path, kind):
    save(tmp_path / "x", "start", kind)
    errors, seen = [], set()

    def work(content):
        try:
            for _ in range(20):
                save(tmp_path / "x", content * 5000, kind)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(letter,)) for letter in "abc"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) and kind == "file":
        seen |= {(text[0], len(text)) for text in load(tmp_path / "x")}
    for thread in threads:
        thread.join()
    assert not errors
    assert seen <= {("s", 5), ("a", 5000), ("b", 5000), ("c", 5000)}
    assert len(load(tmp_path / "x")) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
