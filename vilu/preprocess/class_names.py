"""The rules of class names and prompt templates. Standard library only.

The same file runs in Python and in the server (export copies it beside the model that needs it), so that what one side
accepts the other does.
"""

from __future__ import annotations

from collections.abc import Sequence


def names_problem(names: object) -> str:
    """What is wrong with class names, in a few words; "" where they are distinct, non-empty strings, at least one."""
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
    """What is wrong with prompt templates; "" where there is one at least and each holds exactly one `{}`."""
    if not isinstance(templates, list | tuple) or not templates:
        return "no prompt templates"
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            return f"template {template!r} must hold exactly one {{}}"
    return ""


def prompts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every name in every template, name by name: K · len(templates) strings.

    >>> prompts(["cat", "dog"], ["a {}", "one {}"])
    ['a cat', 'one cat', 'a dog', 'one dog']
    """
    return [template.replace("{}", name) for name in names for template in templates]
