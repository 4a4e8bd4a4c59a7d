"""What README, docs/ and the project's other pages say exists: commands, options, files, variables, programs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import click
import pytest

from vilu.cli import group
from vilu.cli.demo import NEXT

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
# What the reader makes, gets from elsewhere, or that an export writes.
MADE = ("demo/", "photos/", "site/", "serving/model_repository", "class_sets/", "server/bin", "models/")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def by_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code(page: Path) -> list[tuple[str, str]]:
    """(language, text) of a page's blocks, fenced or indented; "" for an indented one."""
    text = page.read_text("utf-8")
    found = FENCE.findall(text)
    for block in re.findall(r"(?:^(?: {4}.*)?\n)+", FENCE.sub("", text), re.MULTILINE):
        if block.strip():
            found.append(("", textwrap.dedent(block).strip() + "\n"))
    return found


def commands(page: Path) -> list[list[str]]:
    """The words of each `vilu` command on a page, in blocks and in backticks."""
    text = page.read_text("utf-8")
    lines = [line for _, block in code(page) for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(vilu [^`]+)`", FENCE.sub("", text).replace("\n", " "))
    return [shlex.split(line, comments=True) for line in lines if line.lstrip().startswith("vilu ")]


def check(words: list[str]) -> None:
    """Fail where a command or an option does not exist."""
    command: click.Command = group
    context = click.Context(group, info_name="vilu")
    rest = words[1:]
    while rest and isinstance(command, click.Group) and re.fullmatch(r"[a-z-]+", rest[0]) and rest[0][0] != "-":
        name = rest.pop(0)
        found = command.get_command(context, name)
        assert found is not None, f"{shlex.join(words)}: no command {name!r}"
        command = found
    options = {
        option for parameter in command.get_params(context) for option in (*parameter.opts, *parameter.secondary_opts)
    }
    for word in rest:
        if word == "--":
            break
        if word.startswith("--"):
            assert word.split("=")[0] in options, f"{shlex.join(words)}: no option {word}"


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_commands_and_options_exist(page):
    for words in commands(page):
        check(words)


def test_the_checks_fail_where_they_should():
    check(["vilu", "export", "--version", "2"])
    with pytest.raises(AssertionError, match="no option --absent"):
        check(["vilu", "export", "--absent"])
    with pytest.raises(AssertionError, match="no command 'absent'"):
        check(["vilu", "absent"])
    assert ["vilu", "health"] in commands(ROOT / "docs" / "serve.md")
    assert sum(len(commands(page)) for page in PAGES) > 40


def test_the_demo_ends_with_commands_that_exist():
    lines = [line.strip() for line in NEXT]
    named = [shlex.split(part) for line in lines for part in line.split(", then ") if part.startswith("vilu ")]
    assert [words[1] for words in named] == ["train", "export", "serve", "ask"]
    for words in named:
        check(words)


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_files_and_make_targets_exist(page):
    text = page.read_text("utf-8")
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"(?:`| {4}|- run: )make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"no target {target}"
    for folder, rest in re.findall(
        r"`(?:python )?((?:bench|docs|examples|export|kernels|serving|tests|vilu)/)([^\s`]*)", text
    ):
        path = folder + rest
        if not path.startswith(MADE):
            assert (ROOT / path).exists(), f"{path} does not exist"
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), f"the link {link} leads nowhere"


LONG = [pytest.param(page, marks=pytest.mark.slow) if page.name == "extend.md" else page for page in PAGES]


@pytest.mark.parametrize("page", LONG, ids=by_name)
def test_python_blocks_run(page):
    """A block runs as a program of its own; one that asks a server must at least be Python."""
    for language, block in code(page):
        if language != "python":
            continue
        compile(block, by_name(page), "exec")
        if "Client(" in block:
            continue
        done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr


def test_every_variable_is_in_the_table():
    sources = [path for folder in ("vilu", "kernels", "export", "serving") for path in (ROOT / folder).rglob("*.py")]
    read = {name for path in sources for name in re.findall(r'"(VILU_[A-Z_]+)"', path.read_text("utf-8"))}
    table = set(re.findall(r"^\| `(\w+)`", (ROOT / "docs" / "environment.md").read_text("utf-8"), re.MULTILINE))
    assert read == table


def test_the_pages_are_in_the_site():
    named = set(re.findall(r"(\w+\.md)", (ROOT / "mkdocs.yml").read_text("utf-8")))
    assert named == {page.name for page in (ROOT / "docs").glob("*.md")}


def test_readme_is_one_screen():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 60
