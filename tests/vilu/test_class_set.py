"""The rules of class names: one place, the same words everywhere, no torch needed."""

import subprocess
import sys
from pathlib import Path

import pytest

from vilu import UserError
from vilu.class_set import check_names, check_templates, prompts, read_names
from vilu.preprocess import class_names


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (("cat", "dog"), ""),
        (["cat"], ""),
        ((), "no class names"),
        ("cat", "no class names"),
        (None, "no class names"),
        (["cat", " "], "class name 2 is empty"),
        (["cat", 7], "class name 2 is empty"),
        (["cat", "\udce9"], "class name 2 is not UTF-8"),
        (["cat", "dog", "cat"], "class name 3 ('cat') repeats class name 1"),
    ],
)
def test_names(names, problem):
    assert class_names.names_problem(names) == problem
    if problem:
        with pytest.raises(UserError) as caught:
            check_names(names, "a.txt")
        assert str(caught.value) == f"a.txt: {problem}"
    else:
        check_names(names)


@pytest.mark.parametrize(
    ("templates", "problem"),
    [
        (("a {}.",), ""),
        ((), "no prompt templates"),
        ("a {}.", "no prompt templates"),
        (("a {}", "two {} {}"), "template 'two {} {}' must hold exactly one {}"),
        ((7,), "template 7 must hold exactly one {}"),
    ],
)
def test_templates(templates, problem):
    assert class_names.templates_problem(templates) == problem
    if problem:
        with pytest.raises(UserError, match=r"^class set: "):
            check_templates(templates)


def test_prompts_go_name_by_name():
    assert prompts(["{}", "dog"], ["a {}", "{}s"]) == ["a {}", "{}s", "a dog", "dogs"]


def test_names_of_a_file(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text(" cat \nhot dog\n\n\n")
    assert read_names(file) == ("cat", "hot dog")
    for content, problem in ((b"a\n\nb\n", "class name 2 is empty"), (b"caf\xe9\n", "cannot be read as UTF-8 text")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"names\.txt: {problem}"):
            read_names(file)
    with pytest.raises(UserError, match=r"absent: cannot be read \(No such file or directory\)$"):
        read_names(tmp_path / "absent")


def test_no_torch_is_needed_and_the_servers_copy_needs_nothing():
    code = "import sys, vilu.class_set; assert not {'torch', 'numpy'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], check=True)
    folder = Path(class_names.__file__).parent
    subprocess.run([sys.executable, "-S", "-E", "-c", "import class_names"], cwd=folder, check=True)
