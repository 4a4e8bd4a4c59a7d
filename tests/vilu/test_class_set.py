"""The rules of class names: one place, the same words everywhere, no torch needed."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vilu import UserError, load_clip
from vilu.class_set import check_names, check_templates, prompts, read_names
from vilu.preprocess import class_names

NO_COMMAS = "; names stand one on each line, without commas between them"


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (("cat", "dog"), ""),
        (["cat"], "needs at least two classes, found only 'cat'"),
        (["a, b"], "needs at least two classes, found only 'a, b'" + NO_COMMAS),
        ((), "no class names"),
        ("cat", "no class names"),
        (None, "no class names"),
        (["cat", " "], "class name 2 is empty"),
        (["cat", 7], "class name 2 is empty"),
        (["cat", "\udce9"], "class name 2 is not UTF-8"),
        (["cat", "hot\ndog"], "class name 2 ('hot\\ndog') holds a line break"),
        (["cat", "&nbsp;"], "class name 2 ('&nbsp;') is empty"),
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


SAME = [
    ("red star", "Red STAR"),
    ("red star", " red \u00a0 star\t"),
    ("salt & pepper", "salt &amp; pepper"),
    ("salt & pepper", "salt &amp;amp; pepper"),
    ("caf\u00e9", "cafe\u0301"),
    ("\u212bngstr\u00f6m", "\u00c5ngstr\u00f6m"),
    ("dog's", "dog\u2019s"),
    ("fish", "\ufb01sh"),
    ("cat", "\uff43\uff41\uff54"),
    ("cat", "\ufeffcat"),
]


@pytest.mark.parametrize(("first", "second"), SAME)
def test_names_that_are_the_same_to_the_tokenizer(first, second):
    """The rule needs no tokenizer, and agrees with the one that open_clip's CLIP has."""
    problem = f"class name 3 ({second!r}) is the same to CLIP's tokenizer as class name 1 ({first!r})"
    assert class_names.names_problem([first, "owl", second]) == problem
    from vilu.preprocess.text import clean

    assert clean(first) == clean(second)


def test_names_that_a_tokenizer_tells_apart():
    names = ["red star", "red-star", "redstar", "red star!", "re\u0301d star", "m2", "m\u00b2", "caf\u00e9", "cafe"]
    assert class_names.names_problem(names) == ""


@pytest.mark.parametrize("second", ["ca\u200bt", "cat\u200d", "\u200fcat", "c\u00adat", "cat\ufe0f", "\u202eCAT\u202c"])
def test_names_that_look_the_same(second):
    problem = class_names.names_problem(["cat", "owl", second])
    assert problem.endswith("differs from class name 1 ('cat') only in characters that nobody sees")
    assert problem.isprintable()


def test_signs_that_look_different():
    flags = [f"\U0001f3f4{''.join(chr(0xE0000 + ord(c)) for c in f'gb{part}')}\U000e007f" for part in ("eng", "sct")]
    assert class_names.names_problem([*flags, "\U0001f44d", "\U0001f44d\U0001f3fd", "חתול", "כלב"]) == ""
    assert class_names.names_problem(["cat", "\u200b"]).endswith("is empty")


@pytest.mark.parametrize("ending", ["x", "y"])
def test_names_that_differ_only_where_the_tokenizer_cuts_them_off(ending):
    """One prompt is in another batch, so the rows are equal only up to rounding."""
    clip = load_clip()
    long = "very " * 100
    with pytest.raises(UserError, match=r"class name 300 .* has the same text embedding as class name 2 "):
        clip.class_set(["cat", f"{long}dog", *(f"thing {i}" for i in range(297)), f"{long}{ending}"])
    rows = clip.class_set([f"thing number {i}" for i in range(300)]).text_embeddings
    assert class_names.rows_problem([""] * 300, rows.numpy()) == ""


def test_rows_that_are_the_same():
    rows = np.random.default_rng(0).normal(size=(5000, 64)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    names = [f"n{i}" for i in range(5000)]
    assert class_names.rows_problem(names, rows) == ""
    rows[4321] = rows[17] + np.float32(1e-7)
    assert class_names.rows_problem(names, rows).startswith("class name 4322 ('n4321') has the same text embedding as")
    assert "class name 18 ('n17')" in class_names.rows_problem(names, rows)


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


def test_labels_of_a_request_are_not_lines_of_a_file():
    problem = class_names.names_problem(["a,b"], "label")
    assert problem == (
        "needs at least two labels, found only 'a,b'; each label is given by itself, without commas between them"
    )


def test_names_of_a_file(tmp_path):
    file = tmp_path / "names.txt"
    for start in ("", "\ufeff"):
        file.write_text(f"{start} cat \r\nhot dog\r\n\r\n\n")
        assert read_names(file) == ("cat", "hot dog")
    for content, problem in (
        (b"cat, dog, owl\n", r"needs at least two classes, found only 'cat, dog, owl'; names stand one on each line"),
        (b"\xff\xfec\0a\0t\0", "cannot be read as UTF-8 text"),
        (b"a\n\nb\n", "class name 2 is empty"),
        (b"caf\xe9\n", "cannot be read as UTF-8 text"),
    ):
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
