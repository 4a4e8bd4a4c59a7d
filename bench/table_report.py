"""The results of bench/table.py in words, as Markdown and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bench.common import png
from vilu.evaluation.evaluate import OURS
from vilu.evaluation.report.figures import COLOURS
from vilu.scores import SCORES

METRICS = {"auc": "AUC ↑", "fpr95": "FPR95 ↓", "aupr_error": "AUPR-err ↑", "aurc": "AURC ↓"}
# What the MLP of an ablated head sees, in the paper's order. The last is the paper's own head.
PARTS = {
    "v": ("image",),
    "v, t_pred": ("image", "predicted"),
    "v, z_attn": ("image", "attended"),
    "v, t_pred, z_attn": ("image", "predicted", "attended"),
}
WHOLE = "v, t_pred, z_attn"


def at_headline(part: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Method to its row of means at the K of the table."""
    return {row["method"]: row for row in part["means"] if row["candidates"] == part["candidates"]}


def findings(parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the numbers say of the paper's claims, one line each."""
    lines = []
    for dataset, part in parts.items():
        table = at_headline(part)
        for key, higher in (("auc", True), ("fpr95", False)):
            sign, title = (1 if higher else -1), METRICS[key].split()[0]
            rivals = [method for method in table if method in SCORES and method != OURS]
            best = max(rivals, key=lambda method: sign * table[method][key]["mean"])
            lead = table[best][key]["lead"]
            ahead = sign * lead["difference"] > 0
            sure = [
                m for m in rivals if sign * table[m][key]["lead"]["difference"] > 0 and lead_p(table[m], key) < 0.05
            ]
            lines.append(
                f"{dataset}, {title}: ViLU {'is ahead of' if ahead else 'is behind'} the best baseline, {best}, by "
                f"{100 * abs(lead['difference']):.1f} points (p {lead['p_value']:.2g}); it is significantly ahead of "
                f"{len(sure)} of {len(rivals)}."
            )
        weaker = [name for name in PARTS if name != WHOLE and table[name]["auc"]["lead"]["difference"] > 0]
        stronger = [name for name in PARTS if name != WHOLE and name not in weaker]
        parts_behind = "; ".join(
            f"{name} {-100 * table[name]['auc']['lead']['difference']:+.1f} (p {lead_p(table[name], 'auc'):.2g})"
            for name in PARTS
            if name != WHOLE
        )
        verdict = "above each part" if not stronger else f"not above {' nor '.join(stronger)}"
        spread = 100 * table[WHOLE]["auc"]["sd"]
        lines.append(
            f"{dataset}, ablation: the whole head is {verdict} in AUC. Against it: {parts_behind}; its sd over "
            f"seeds, which p does not count, is {spread:.1f}."
        )
        with_prior, without, mcm = (100 * table[name]["auc"]["mean"] for name in (OURS, WHOLE, "MCM"))
        lines.append(
            f"{dataset}, prior: AUC {with_prior:.1f} with it, {without:.1f} without (what the paper describes), "
            f"where MCM has {mcm:.1f}, from {part['train']:,} training images."
        )
        if "ProbVLM" in table and table["ProbVLM"]["auc"]["high"] < 0.5:
            lines.append(f"{dataset}: ProbVLM ranks below chance; its docstring in vilu/scores/learned.py says why.")
        if part["captions"]:
            for name in ("LVU-BCE", "LVU-MSE"):
                gap = table[name]["auc"]["mean"] - table["MCM"]["auc"]["mean"]
                lines.append(f"{dataset}: {name} is {'below' if gap < 0 else 'above'} MCM, {100 * gap:+.1f} in AUC.")
    return lines


def lead_p(row: Mapping[str, Any], key: str) -> float:
    return float(row[key]["lead"]["p_value"])


def markdown(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """OUTPUT.md."""
    any_part = next(iter(parts.values()))
    seeds = max(row["seeds"] for part in parts.values() for row in part["means"])
    lines = [
        "# Results on the embedded default",
        "",
        f"`make table`: percent, mean ± sd over {seeds} seed{'s' * (seeds > 1)}; success is the positive class. p: "
        "two-sided, that ViLU and the method are equal, from a paired bootstrap over the test images of the mean over "
        f"seeds ({any_part['resamples']} draws). Cross-validation on the train split chooses Rel-U's lambda and T and "
        "C of the class bias. What stands here is what came out.",
        "",
        *(f"- {line}" for line in findings(parts)),
    ]
    for dataset, part in parts.items():
        table = at_headline(part)
        kind = f"captions, groups of {part['candidates']:,}" if part["captions"] else f"{part['candidates']} classes"
        lines += [
            "",
            f"## {dataset}",
            "",
            f"{kind}; {part['train']:,} images to train on, {part['test']:,} to test, of which CLIP gets "
            f"{part['failures']:,} wrong. Commit {part['commit']}, torch {part['torch']}, {part['machine']}, "
            f"{part['seconds']} s of one core.",
            "",
            f"| method | {' | '.join(METRICS.values())} | p, AUC | p, FPR95 |",
            "|---" * (len(METRICS) + 3) + "|",
        ]
        shown = {method: table[method] for method in SCORES if method in table}
        lines += [line(method, row, best(shown)) for method, row in shown.items()]
        reasons = {row["method"]: row["reason"] for row in part["rows"] if "reason" in row}
        lines += ["", *(f"{method}: {reason}" for method, reason in reasons.items())] if reasons else []
        sizes = sorted({row["candidates"] for row in part["means"]})
        if len(sizes) > 1:
            lines += ["", "AUC against the number of candidates K:", ""]
            lines += [f"| method | {' | '.join(map(str, sizes))} |", "|---" * (len(sizes) + 1) + "|"]
            for method in (*shown, *PARTS):
                by_size = {row["candidates"]: row["auc"]["mean"] for row in part["means"] if row["method"] == method}
                cells = (f"{100 * by_size[size]:.1f}" if size in by_size else "" for size in sizes)
                lines.append(f"| {method} | {' | '.join(cells)} |")
    lines += ["", "## Ablation", "", 'What the head\'s MLP sees, without the prior (recipe "plain"); p against all.']
    for dataset, part in parts.items():
        table = at_headline(part)
        shown = {name: table[name] for name in PARTS if name in table}
        lines += ["", f"| {dataset} | {' | '.join(METRICS.values())} | p, AUC | p, FPR95 |"]
        lines += ["|---" * (len(METRICS) + 3) + "|"]
        lines += [line(name, row, best(shown)) for name, row in shown.items()]
        lines += [line('all, with the prior (recipe "default")', table[OURS], {})] if OURS in table else []
    return "\n".join(lines) + "\n"


def best(table: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Each metric's best mean."""
    pick = {key: max if "↑" in title else min for key, title in METRICS.items()}
    return {key: pick[key](row[key]["mean"] for row in table.values()) for key in METRICS if table}


def line(name: str, row: Mapping[str, Any], top: Mapping[str, float]) -> str:
    """A row of a markdown table; the best of a column is bold."""
    cells = []
    for key in METRICS:
        cell = f"{100 * row[key]['mean']:.1f} ± {100 * row[key]['sd']:.1f}"
        cells.append(f"**{cell}**" if row[key]["mean"] == top.get(key) else cell)
    cells += [f"{lead_p(row, key):.2g}" if "lead" in row[key] else "" for key in ("auc", "fpr95")]
    return f"| {name} | {' | '.join(cells)} |"


def draw(parts: Mapping[str, Mapping[str, Any]]) -> bytes:
    """A PNG: AUC and FPR95, a panel a data set: mean over seeds, the dark bar ± sd, the light one the 95% interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(parts), 8), layout="constrained")
    axes = figure.subplots(2, len(parts), squeeze=False)
    for column, (dataset, part) in enumerate(parts.items()):
        table = at_headline(part)
        shown = [method for method in SCORES if method in table] + [name for name in PARTS if name in table]
        places = np.arange(len(shown))[::-1] - np.array([0.6 * (method in PARTS) for method in shown])
        for axis, key in zip(axes[:, column], ("auc", "fpr95"), strict=True):
            cells = [table[method][key] for method in shown]
            mean = np.array([cell["mean"] for cell in cells])
            axis.barh(places, mean, color=[COLOURS.get(method, "#a6bddb") for method in shown], alpha=0.85)
            outer = [[cell["mean"] - cell["low"] for cell in cells], [cell["high"] - cell["mean"] for cell in cells]]
            axis.errorbar(mean, places, xerr=np.maximum(outer, 0), fmt="none", ecolor="#999999", elinewidth=1)
            axis.errorbar(mean, places, xerr=[c["sd"] for c in cells], fmt="none", ecolor="black", elinewidth=2.5)
            axis.set_yticks(places, [f"plain: {m}" if m in PARTS else m for m in shown])
            axis.set_title(f"{dataset}: {METRICS[key]}")
            axis.set_xlim(0, 1)
            axis.grid(axis="x", alpha=0.3)
            if key == "auc":
                axis.axvline(0.5, color="black", linestyle=":", linewidth=1)
    return png(figure, 90)
