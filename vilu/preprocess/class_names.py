"""The rules for class names and prompt templates. This file needs only the standard library.

The export copies this file into the model repository. So the server accepts exactly the names that the library accepts.
"""

from __future__ import annotations

from collections.abc import Sequence


def names_problem(names: object) -> str:
    """Say in a few words what is wrong with class names.

    Returns:
        The problem, or "" for a list of distinct, non-empty strings that UTF-8 can hold.
    """
    if not isinstance(names, list | tuple) or not names:
        return "no class names"
    seen: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not isinstance(name, str) or not name.strip():
            return f"class name {number} is empty"
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            return f"class name {number} is not UTF-8"
        if name in seen:
            return f"class name {number} ({name!r}) repeats class name {seen[name]}"
        seen[name] = number
    return ""


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
