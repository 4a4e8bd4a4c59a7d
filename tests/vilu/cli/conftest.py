"""Fixtures of the command line's tests."""

import pytest

from vilu.cli import run


@pytest.fixture
def command_line(monkeypatch, capsys):
    """command_line(command, "vilu train") -> a function of the arguments -> (exit code, stdout, stderr)."""

    monkeypatch.setattr("vilu.cli.progress.SECONDS", 600)  # no lines of progress where this machine is slow

    def of(command, name):
        def call(*arguments):
            monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
            with pytest.raises(SystemExit) as stopped:
                run(command, name)
            return stopped.value.code, *capsys.readouterr()

        return call

    return of
