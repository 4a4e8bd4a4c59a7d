"""`--config FILE` of `vilu serve` and `vilu train`, and completion in three shells."""

import os
import subprocess
import sys

import click
import pytest

from vilu.cli import COMMANDS, group
from vilu.cli.ask import ask_command
from vilu.cli.serve import serve_command
from vilu.cli.train import train_command
from vilu.errors import UserError


@pytest.fixture
def read(tmp_path):
    """read(command, text, *arguments) -> the parameters that the command would run with."""

    def call(command, text, *arguments):
        path = tmp_path / "vilu.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return command.make_context(command.name, ["--config", str(path), *arguments]).params

    return call


TRAIN = """
[train]
output = "head.safetensors"
data = "photos/train"
clip = "ViT-B-32"
epochs = 3
learning-rate = 1e-4
template = ["a {}", "the {}"]
prior = false
no-cache = true

[serve]
http-port = 9000
"""


def test_the_file_gives_options_and_the_command_line_wins(read):
    found = read(train_command, TRAIN, "--epochs", "7", "--prior")
    assert str(found["output"]) == "head.safetensors"
    assert (found["clip_name"], found["epochs"], found["learning_rate"]) == ("ViT-B-32", 7, 1e-4)
    assert (found["templates"], found["prior"], found["no_cache"]) == (("a {}", "the {}"), True, True)
    assert read(train_command, TRAIN)["prior"] is False
    assert read(serve_command, TRAIN)["http_port"] == 9000
    assert read(serve_command, TRAIN, "--http-port", "1")["http_port"] == 1
    served = read(serve_command, '[serve]\nupstream = ["a:1", "b:2"]\ntoken = "@token.txt"\nsupervise = true')
    assert (served["upstreams"], served["token"], served["supervise"]) == (("a:1", "b:2"), "@token.txt", True)


def test_home_is_known_where_a_shell_does_not_put_it(read, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    found = read(
        train_command, '[train]\ndata = "~/photos"\ntemplate = ["~{}"]', "--output=~/a.safetensors", "--cache=~"
    )
    assert (found["data"], str(found["output"]), str(found["cache"])) == (
        "/home/ann/photos",
        "/home/ann/a.safetensors",
        "~",
    )
    assert found["templates"] == ("~{}",)
    assert read(serve_command, '[serve]\ntoken = "@~/token"')["token"] == "@/home/ann/token"
    asked = ask_command.make_context("ask", ["~/photos/*.jpg", "a~/b", "--token", "@~/token"]).params
    assert (asked["images"], asked["token"]) == (("/home/ann/photos/*.jpg", "a~/b"), "@/home/ann/token")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[train]\nepoch = 3", "[train]: no option 'epoch'; did you mean 'epochs'?"),
        ("[train]\nlearning_rate = 3", "no option 'learning_rate'; did you mean 'learning-rate'?"),
        ("[train]\nform = 'paper'", "no option 'form'"),
        ("[trian]\nepochs = 3", "no section [trian]; did you mean 'train'?"),
        ("train = 3", "train must be a section"),
        ("[train]\nepochs = [3]", "epochs takes one value, got [3]"),
        ("[train]\nepochs = true", "epochs takes one value, got True"),
        ("[train]\nno-cache = 'yes'", "no-cache takes true or false, got 'yes'"),
        ("[train]\ntemplate = [['a {}']]", "template takes a list of values"),
        ("[train]\nconfig = 'other.toml'", "no option 'config'"),
        ("[train\n", "not a TOML file"),
        (b"[train]\ndata = '\xff'", "not a TOML file"),
    ],
)
def test_a_bad_file_is_one_line(read, text, said):
    with pytest.raises(UserError) as caught:
        read(train_command, text)
    assert said in str(caught.value)
    assert "vilu.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ['"s3cret-s3cret-s3cret"', '""', "7", "true", '["@a"]'])
@pytest.mark.parametrize("key", ["token", "control-token"])
def test_a_secret_in_the_file_is_refused_and_not_repeated(read, key, value):
    with pytest.raises(UserError, match=f"{key} does not belong in this file") as caught:
        read(serve_command, f"[serve]\n{key} = {value}")
    assert "s3cret" not in str(caught.value)


def test_a_value_out_of_range_names_its_option(read):
    with pytest.raises(click.BadParameter, match="0 is not in the range"):
        read(train_command, "[train]\noutput = 'x'\nepochs = 0")
    with pytest.raises(UserError, match="cannot be read"):
        train_command.make_context("train", ["--config", "absent.toml", "--output", "x"])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_in(shell):
    def ask(kind, **variables):
        environment = {**os.environ, "_VILU_COMPLETE": f"{shell}_{kind}", **variables}
        code = "import sys; sys.argv[0] = 'vilu'; from vilu.cli import main; main()"
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)

    fish = shell == "fish"
    commands = ask("complete", COMP_WORDS="vilu ", COMP_CWORD="" if fish else "1").stdout
    assert all(name in commands for name in COMMANDS)
    options = ask("complete", COMP_WORDS="vilu train --ep", COMP_CWORD="--ep" if fish else "2").stdout
    assert "--epochs" in options
    assert "--output" not in options
    assert "_VILU_COMPLETE" in ask("source").stdout or shell == "bash"  # bash's own version is asked first


def test_help_of_the_group_names_the_exit_codes():
    assert "Exit codes: 0 done, 1 it failed" in " ".join((group.help or "").split())
