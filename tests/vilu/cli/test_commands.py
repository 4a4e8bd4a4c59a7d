"""All commands: what listing and helping need, what a missing package or a mistake says, how help texts read."""

import io
import re
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from vilu.cli import COMMANDS, group, main, run
from vilu.cli.command import Command, RenamedOption
from vilu.cli.options import DEFAULT_URL, data_options

CORE = ("click", "numpy", "rich", "safetensors")

# Runs code where only the named packages, their own needs and vilu can be imported.
_BARE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        package = name.partition(".")[0]
        if package not in {"vilu", *ALLOWED} and package not in sys.stdlib_module_names and path is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)

sys.path_importer_cache.clear()
ALLOWED = set(sys.argv.pop(1).split(","))
for module in list(sys.modules):
    assert module.partition(".")[0] not in {"torch", "PIL", "tritonclient"}, module
sys.meta_path.insert(0, Refuse())
"""


def bare(code, allowed, *arguments):
    """Run code after _BARE in a process of its own."""
    command = [sys.executable, "-c", _BARE + code, ",".join(allowed), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def every_command():
    """(words, command) of each command and sub-command."""
    for name in COMMANDS:
        command = group.get_command(click.Context(group), name)
        assert command is not None
        yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {sub}", command.commands[sub]) for sub in command.commands)


def test_listing_and_helping_need_only_click():
    code = """
from vilu.cli import COMMANDS, group
assert not {"numpy", "rich", "safetensors"} & set(sys.modules)
for arguments in ([], *([name] for name in COMMANDS), ["classes", "list"], ["classes", "put"], ["classes", "remove"]):
    group.main([*arguments, "--help"], prog_name="vilu", standalone_mode=False)
"""
    ended = bare(code, ["click"])
    assert ended.returncode == 0, ended.stderr
    overview = ended.stdout.partition("Usage: vilu ask")[0]
    for name, command in every_command():
        if " " not in name:
            assert re.search(rf"^  {name} +{re.escape(command.get_short_help_str(100))}$", overview, re.MULTILINE)
        assert f"Usage: vilu {name} " in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        ("ask image.jpg", "tritonclient", "client"),
        ("calibrate --ckpt head.safetensors --target-risk 0.1", "torch", "train"),
        ("classes list", "tritonclient", "client"),
        ("classes put pets pets.txt", "tritonclient", "client"),
        ("demo", "open_clip", "export,server"),
        ("eval --ckpt head.safetensors", "torch", "train"),
        ("export --ckpt head.safetensors", "torch", "export"),
        ("guard", None, "door"),
        ("health", "tritonclient", "client"),
        ("predict image.jpg --ckpt head.safetensors", "torch", "train"),
        ("serve", "tritonclient", "server"),
        ("train --output head.safetensors", "torch", "train"),
        ("versions repository", None, "export"),
        ("web", "uvicorn", "web"),
    ],
)
def test_a_missing_package_names_its_extra(arguments, package, extra, tmp_path):
    code = f"import os; os.chdir({str(tmp_path)!r}); from vilu.cli import main; sys.argv[0] = 'vilu'; main()"
    ended = bare(code, CORE, *arguments.split())
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    command = " ".join(arguments.split()[: 2 if arguments.startswith("classes") else 1])
    package = re.escape(package) if package else r"\w+"
    expected = rf"vilu: `vilu {command}` needs the package '{package}': pip install 'vilu\[{extra}\]'\n"
    assert re.fullmatch(expected, ended.stderr)


def test_a_missing_module_of_our_own_is_a_fault():
    """Only packages can be installed: a module of vilu or of Python that is missing must not be blamed on an extra."""

    @click.command("broken", cls=Command, extra="client")
    def broken():
        raise ModuleNotFoundError("No module named 'vilu.gone'", name="vilu.gone")

    with pytest.raises(ModuleNotFoundError):
        broken.main([], standalone_mode=False)


def test_serving_needs_no_torch_and_none_of_the_command_lines_packages():
    code = """
import vilu.serving
from vilu.serving import access, answer_file, classes, server, supervise
from vilu.serving.classes import put_set
found = {"click", "rich", "torch"} & set(sys.modules)
assert not found, found
"""
    ended = subprocess.run([sys.executable, "-c", f"import sys\n{code}"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


# ---------------------------------------------------------------------------------------------------- mistakes


@pytest.fixture
def vilu(monkeypatch, capsys):
    """vilu("ask --url") -> (exit code, stdout, stderr)."""

    def call(line):
        monkeypatch.setattr("sys.argv", ["vilu", *line.split()])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "serve"])  # its flags go to tritonserver
def test_an_unknown_option_is_one_line(vilu, name):
    code, out, err = vilu(f"{name} --no-such-thing")
    assert (code, out) == (2, "")
    assert err.startswith("vilu: No such option '--no-such-thing'")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nothing", "No such command 'nothing'"),
        ("train --ouput x", "'--output'"),
        ("train --output x --optimizer adam", "'adam' is not one of 'adamw', 'sgd'"),
        ("train", "Missing option '--output'"),
        ("export --ckpt x --parity-images 3", "3 is not in the range x>=256"),
        ("ask", "Missing argument 'IMAGES...'"),
        ("versions repository --live", "--live needs --use VERSION"),
        ("train --output x --form none", "Invalid value for '--architecture': 'none'"),
    ],
)
def test_a_mistake_is_one_line(vilu, line, said):
    code, out, err = vilu(line)
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("vilu: ")
    assert err.count("\n") == 1


def test_an_error_of_several_lines_is_made_one(monkeypatch, capsys):
    @click.command("ask")
    def talkative():
        raise click.UsageError("Choose from:\n\ta,\n\tb")

    monkeypatch.setattr(talkative, "main", lambda **options: click.Command.main(talkative, [], **options))
    with pytest.raises(SystemExit):
        run(talkative, "vilu")
    assert capsys.readouterr().err == "vilu: Choose from: a, b\n"


def test_without_a_command_the_help_is_shown(vilu):
    code, out, err = vilu("")
    assert (code, out) == (2, "")
    assert "Commands:\n  ask " in err


# ----------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        ("calibrate", "--probability platt", "--probability-calibration platt"),
        ("export", "--engines /engines", "--tensorrt-cache /engines"),
        ("train", "--estimate", "--estimate-images"),
        ("train", "--no-estimate", "--no-estimate-images"),
        ("train", "--form paper", "--architecture paper"),
        ("train", "--parts image", "--head-inputs image"),
    ],
)
def test_a_renamed_option_keeps_its_old_name_hidden(command, old, new):
    command = dict(every_command())[command]

    def read(text):
        context = click.Context(command)
        options, rest, _ = command.make_parser(context).parse_args(text.split())
        assert rest == []
        return {name: value for name, value in options.items() if isinstance(value, str | bool)}

    assert len(read(new)) == 1
    assert read(old) == read(new)
    shown = CliRunner().invoke(command, ["--help"]).output
    assert re.search(rf"{new.split()[0]}\b", shown)
    assert not re.search(rf"{old.split()[0]}(?![\w-])", shown)


def test_an_error_names_the_new_option_alone():
    @click.command()
    @click.option("--new", cls=RenamedOption, old="--old", type=int, required=True)
    def command(new):
        click.echo(new)

    for arguments in (["--old", "x"], ["--new", "x"], []):
        shown = CliRunner().invoke(command, arguments).output
        assert "'--new'" in shown
        assert "--old" not in shown
    assert CliRunner().invoke(command, ["--old", "3"]).output == "3\n"


def test_data_options(tmp_path, monkeypatch):
    @click.command()
    @data_options
    def command(data, dataset, root, image_column, caption_column, cache):
        click.echo(f"{data} {dataset} {root} {image_column} {caption_column} {cache}")

    monkeypatch.delenv("VILU_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = CliRunner().invoke(command, ["--data", "{0..1}.tar", "--cache", "c", "--root", "r", "--image-column", "f"])
    assert result.output == "{0..1}.tar None r f caption c\n"
    assert CliRunner().invoke(command, []).output == f"None None None path caption {tmp_path / 'vilu'}\n"
    monkeypatch.setenv("VILU_CACHE", "elsewhere")
    assert CliRunner().invoke(command, []).output == "None None None path caption elsewhere\n"


def test_names_on_standard_input_may_begin_with_a_byte_order_mark(monkeypatch):
    from vilu.cli.ask import find_images

    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffa.jpg\n\nb c.jpg\n"))
    assert list(find_images(["-"])) == ["a.jpg", "b c.jpg"]


def test_hidden_files_of_a_folder_are_not_asked_about(tmp_path):
    from vilu.cli.ask import find_images

    for name in (
        "a/b.JPG",
        "a/._b.jpg",
        ".cache/c.jpg",
        "__MACOSX/a/b.jpg",
        ".ipynb_checkpoints/b.jpg",
        "a.png",
        "a.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"")
    assert list(find_images([str(tmp_path)])) == [str(tmp_path / "a" / "b.JPG"), str(tmp_path / "a.png")]


def test_defaults_are_those_of_the_library():
    """The command line states them without importing the library."""
    from vilu.preprocess.image import Transform
    from vilu.serving.address import DEFAULT_URL as CLIENTS_URL

    assert DEFAULT_URL == CLIENTS_URL
    assert Transform.max_bytes == 20 << 20
    web = dict(every_command())["web"]
    assert any("[default: 20 MiB]" in (option.help or "") for option in web.params if isinstance(option, click.Option))


def test_help_is_written_in_sentences():
    seen = 0
    for name, command in every_command():
        summary, _, _ = (command.help or "").partition("\n")
        assert re.fullmatch(r"[A-Z].*\.", summary), name
        assert "..." not in command.get_short_help_str(63), f"{name}: its summary is cut in the list of commands"
        for option in command.params:
            if isinstance(option, click.Option):
                text = re.sub(r"\s*\[default: .*\]$", "", option.help or "")
                assert re.fullmatch(r"[A-Z].*\.", text), f"{name} {option.opts[0]}: {text!r}"
                assert not re.match(r"(Of|The same|As|At) ", text), f"{name} {option.opts[0]}: {text!r}"
                seen += 1
    assert seen > 100


def test_no_option_takes_nan_for_a_number():
    ranges = 0
    for name in COMMANDS:
        command = group.get_command(click.Context(group), name)
        for one in (command, *getattr(command, "commands", {}).values()):
            for option in one.params:
                if isinstance(option.type, click.FloatRange):
                    ranges += 1
                    with pytest.raises(click.BadParameter, match="nan is not a number"):
                        option.type("nan", option, None)
    assert ranges > 20
