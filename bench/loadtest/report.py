"""A load test's figures as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bench.common import markdown_table


def number(value: Any) -> str:
    return "" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A table in Markdown and an empty line."""
    return [*markdown_table(head, [[number(cell).replace("|", "/") for cell in line] for line in rows]), ""]


def markdown(report: Mapping[str, Any]) -> str:
    about = report["environment"]
    where = f"{about['cores']} cores of an {about['device']}"
    lines = [f"# {about['command']}", "", f"{where}, tritonserver of nvidia-pytriton "
             f"{about['nvidia-pytriton']}, commit {about['commit']}, {about['time']}", ""]  # fmt: skip
    rows: list[Sequence[Any]] = []
    for promise in report["promises"]:
        figures = json.dumps(short(promise["seen"]), ensure_ascii=False).replace('"', "")[1:-1]
        rows.append((promise["fault"], promise["promised"], kept(promise), figures))
    lines += table(("what", "promised", "kept?", "seen"), rows)
    if "traffic" in report:
        part = report["traffic"]
        lines += ["## Mixed traffic", "", "Milliseconds; open loop: from when a request was due.", ""]
        keys = ("phase", "requests", "images", "requests_per_second", "images_per_second", "p50", "p90", "p99")
        rows = [[line[key] for key in keys] + [line["wrong"], line["lost"], sum(line["refused"].values())]
                for line in (*part["phases"], part["total"])]  # fmt: skip
        lines += table(
            ("phase", "requests", "images", "requests/s", "images/s", "p50", "p90", "p99", "wrong", "lost", "refused"),
            rows,
        )
        rows = [
            (name, *(line[key] for key in ("requests", "p50", "p90", "p99")))
            for name, line in part["by_question"].items()
        ]
        lines += table(("question", "requests", "p50", "p90", "p99"), rows)
        if part["memory"]:
            grown = part["memory"]
            rows = [(name.upper(), grown[name]["first_mb"], grown[name]["last_mb"], grown[name]["peak_mb"],
                     f"{grown[name]['growth']:+.2%}", f"{grown[name]['slope_kb_per_1000_requests']:+.0f}")
                    for name in ("pss", "uss")]  # fmt: skip
            lines += ["Memory of the server and its stubs, MB, after warm-up:", ""]
            lines += table(("", "first tenth", "last tenth", "peak", "growth", "KB per 1000 requests"), rows)
    if "guard" in report:
        lines += ["## The cost of vilu guard", "", "`vilu` with one image, closed loop, medians of three rounds.", ""]
        rows = [(line["at_a_time"], line["straight_per_second"], line["guarded_per_second"], f"{line['ratio']:.2f}",
                 line["straight_p50"], line["guarded_p50"]) for line in report["guard"]]  # fmt: skip
        lines += table(("at a time", "straight/s", "guarded/s", "ratio", "straight p50", "guarded p50"), rows)
    if "door" in report:
        lines += [
            "## The cost of the front door",
            "",
            "`vilu` with one image over gRPC, closed loop, medians of five.",
            "",
        ]
        rows = [(line["at_a_time"], line["direct_per_second"], line["door_per_second"], f"{line['ratio']:.2f}",
                 line["direct_p50"], line["door_p50"], line["door_refused"]) for line in report["door"]]  # fmt: skip
        titles = ("at a time", "direct/s", "door/s", "ratio", "direct p50", "door p50", "refused by the door")
        lines += table(titles, rows)
    if "recording" in report:
        seen = report["recording"]
        lines += ["## The cost of recording", "", f"`vilu serve` with and without `--record`, in turn: {seen['pairs']} "
                  f"pairs of {seen['questions']} questions, {seen['at_a_time']} at a time. Recording costs the door "
                  f"{seen['cost']:.1%} of the CPU time of an answer.", ""]  # fmt: skip
        parts = ("_door_cpu_ms", "_cpu_ms")
        rows = [(name, seen[f"{name}_per_second"], *(f"{seen[name + part]:.3f}" for part in parts))
                for name in ("plain", "recording")]  # fmt: skip
        lines += table(("", "answers/s", "CPU ms an answer, door", "door and server"), rows)
    if report.get("hostile", {}).get("known"):
        lines += ["## What tritonserver itself tells otherwise", ""]
        rows = [(line["request"], line["code"], line["number"], line["why"]) for line in report["hostile"]["known"]]
        lines += table(("request", "answer", "number", "why"), rows)
    return "\n".join(lines)


def kept(promise: Mapping[str, Any]) -> str:
    words = ["**not kept**: " + "; ".join(promise["problems"])] if promise["problems"] else []
    words += ["not by tritonserver itself: " + "; ".join(promise["of_the_server"])] if promise["of_the_server"] else []
    return "; ".join(words) or "kept"


def short(value: Any) -> Any:
    """The same with numbers rounded, for a table."""
    if isinstance(value, dict):
        return {key: short(part) for key, part in value.items()}
    if isinstance(value, list):
        return [short(part) for part in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value
