"""The rules for class names and prompt templates. This file needs only the standard library.

The export copies this file into the model repository. So the server accepts exactly the names that the library accepts.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

SAME = 1e-5  # largest difference of two text embeddings of the same tokens, which a batch's size rounds differently
LONGEST_SHOWN = 60  # characters of a name in a message
# Fillers, blanks and variation selectors, beside the category Cf. Cf also has the tags that tell flags apart.
_UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\ufe00-\ufe0f\uffa0]")
_TAGS = range(0xE0020, 0xE0080)
_FORMS = re.compile("[\uff01-\uffef\u3000\ufb00-\ufb06]")  # full and half width, and ligatures, as ftfy changes them
_QUOTES = dict.fromkeys([0x02BC, *range(0x2018, 0x201C)], "'") | dict.fromkeys(range(0x201C, 0x2020), '"')


def names_problem(names: object, what: str = "class name") -> str:
    """Say in a few words what is wrong with class names.

    Args:
        names: the names.
        what: what the message calls one of them.

    Returns:
        The problem, or "" for a list of at least two non-empty strings that UTF-8 can hold, that have no line breaks,
        and that a tokenizer (see `cleaned`) and a reader (see `visible`) can tell apart.
    """
    if not isinstance(names, list | tuple) or not names:
        return f"no {what}s"
    seen: dict[str, int] = {}
    looks: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not isinstance(name, str) or not name.strip():
            return f"{what} {number} is empty"
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            return f"{what} {number} is not UTF-8"
        if any(letter in "\n\r\0" for letter in name):
            return f"{what} {number} ({_shown(name)}) holds a line break"
        same = cleaned(name)
        look = visible(same)
        if not look:
            return f"{what} {number} ({_shown(name)}) is empty"
        if same in seen:
            first = seen[same]
            if names[first - 1] == name:
                return f"{what} {number} ({_shown(name)}) repeats {what} {first}"
            other = f"{what} {first} ({_shown(names[first - 1])})"
            return f"{what} {number} ({_shown(name)}) is the same to CLIP's tokenizer as {other}"
        seen[same] = number
        if (first := looks.setdefault(look, number)) != number:
            other = f"{what} {first} ({_shown(names[first - 1])})"
            return f"{what} {number} ({_shown(name)}) differs from {other} only in characters that nobody sees"
    if len(names) < 2:
        of_file = what == "class name"
        places = "names stand one on each line" if of_file else f"each {what} is given by itself"
        commas = f"; {places}, without commas between them" if "," in names[0] else ""
        several = "classes" if of_file else f"{what}s"
        return f"needs at least two {several}, found only {_shown(names[0])}{commas}"
    return ""


def rows_problem(names: Sequence[str], rows: Any, what: str = "class name") -> str:
    """Say which two names have the same text embedding, so that CLIP cannot tell them apart.

    Names that differ only beyond the context length, or in what one tokenizer ignores, have the same embedding.

    Args:
        names: K names.
        rows: NumPy array (K, D) of their text embeddings, with rows of norm 1.
        what: what the message calls a name.

    Returns:
        The problem, or "".
    """
    if len(rows) < 2:
        return ""
    # Rows that are the same lie beside each other when they are sorted by a projection, whatever their number.
    directions = [1 + (i * 2654435761 >> 7) % 1009 / 1009 for i in range(rows.shape[1])]
    values = rows @ rows.dtype.type(directions)
    order = values.argsort(kind="stable")
    for k in (1, 2, 3):
        for place in (values[order[k:]] - values[order[:-k]] < 64 * SAME).nonzero()[0].tolist():
            first, second = sorted((int(order[place]), int(order[place + k])))
            if abs(rows[first] - rows[second]).max() > SAME:
                continue
            return (
                f"{what} {second + 1} ({_shown(names[second])}) has the same text embedding as {what} {first + 1} "
                f"({_shown(names[first])}), so CLIP cannot tell them apart; a tokenizer cuts off what is too long"
            )
    return ""


def cleaned(name: str) -> str:
    """Return a name as CLIP's tokenizer sees it, so that names that are the same to it are equal.

    The steps are those of open_clip's cleaning (ftfy, HTML entities, lower case, white space), without ftfy.

    >>> cleaned("  Caf\u00e9 &amp;  Bar ") == cleaned("cafe\u0301 & bar")
    True
    """
    if name.isascii() and name.isprintable() and "&" not in name:
        return " ".join(name.lower().split())
    text = html.unescape(html.unescape(name))
    text = _FORMS.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text).translate(_QUOTES)
    text = "".join(letter for letter in text if letter.isspace() or unicodedata.category(letter) != "Cc")
    return " ".join(unicodedata.normalize("NFC", text).replace("\ufeff", "").lower().split())


def visible(name: str) -> str:
    """Return a name without the characters that have no shape of their own, such as zero-width spaces.

    >>> visible("ca\u200bt\ufe0f")
    'cat'
    """
    if name.isascii():
        return name
    shown = (c for c in _UNSEEN.sub("", name) if unicodedata.category(c) != "Cf" or ord(c) in _TAGS)
    return " ".join("".join(shown).split())


def _shown(name: str) -> str:
    return repr(name if len(name) <= LONGEST_SHOWN else f"{name[:LONGEST_SHOWN]}…")


def templates_problem(templates: object) -> str:
    """Say in a few words what is wrong with prompt templates.

    Returns:
        The problem, or "" for a list of at least one template in which each template holds exactly one `{}`.
    """
    if not isinstance(templates, list | tuple) or not templates:
        return "no prompt templates"
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            return f"template {template!r} must hold exactly one {{}}"
    return ""


def prompts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Put each of K names into each template: K · len(templates) prompts, ordered by name and then by template.

    >>> prompts(["cat", "dog"], ["a {}", "one {}"])
    ['a cat', 'one cat', 'a dog', 'one dog']
    """
    return [template.replace("{}", name) for name in names for template in templates]
