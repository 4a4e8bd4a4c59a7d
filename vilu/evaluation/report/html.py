"""An evaluation as one HTML file that needs nothing beside it: no script, nothing fetched."""

from __future__ import annotations

import base64
from html import escape

from vilu.evaluation.bootstrap import COLUMNS
from vilu.evaluation.evaluate import COMPARED, OURS, Evaluation, Result, Row
from vilu.evaluation.report.tables import best, caption, compared, text, versions

METHODS = {
    "MCM": "CLIP's largest probability max p. States P(failure) = 1 − max p.",
    "Entropy": "Σ p log p / log K.",
    "Doctor": "−(1 − g) / g with g = Σ p².",
    "Rel-U": "−p D pᵀ, D learned from the training split's mistakes.",
    "LVU-BCE": "The failure MLP on the image alone, weighted cross-entropy.",
    "LVU-MSE": "The same, regressed on CLIP's probability of the true class.",
    "ConfidNet": "An MLP on the image, regressed on CLIP's probability of the true class.",
    "ProbVLM": "−(aleatoric + epistemic variance) of an adapter that reproduces the embedding.",
    "BayesVLM": "Probability of CLIP's answer under a Laplace posterior over its projections.",
    "ViLU": "1 − P(failure) of the checkpoint's head.",
}


def as_html(evaluation: Evaluation, drawn: dict[str, bytes]) -> str:
    """One HTML file: no script, nothing fetched; pictures are inside it.

    Args:
        drawn: file name to PNG, as `pictures.pictures` gives them.
    """
    names = ", ".join(result.name for result in evaluation.results)
    sections = [_html_result(evaluation.mean, "")] if evaluation.mean else []
    for i, result in enumerate(evaluation.results, 1):
        images = "".join(
            f'<figure><img alt="{escape(f"{result.name}: {name}")}" '
            f'src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>'
            for name, png in drawn.items()
            if name.startswith(f"{i}-")
        )
        extra = _html_sweep(evaluation, result) + _html_curve(evaluation, result)
        sections.append(_html_result(result, f'{extra}<div class="pictures">{images}</div>'))
    level = f"{evaluation.level:.0%}"
    definitions = [(c.title, f"{c.definition} {'Higher' if c.higher else 'Lower'} is better.") for c in COLUMNS] + [
        (
            "Intervals",
            f"Percentile bootstrap over the test images, {level}, {evaluation.resamples:,} draws, seed "
            f"{evaluation.seed}; all methods and metrics on the same draws. Of a mean: of the means of one draw each.",
        ),
        (
            f"{OURS} − it",
            "The difference on the same draws; p is two-sided, from the share of draws on the other side of 0, and "
            f"never below {2 / (1 + evaluation.resamples):.2g}. A p-value is for one comparison: none is adjusted "
            "for the number of methods.",
        ),
        ("Captions", "The candidates are the K captions of an image's group, its own included; a tie counts as right."),
        ("Empty cell", "Not defined: the method states no probability, or the test set is one-sided."),
        *((m, METHODS[m]) for m in evaluation.methods if m in METHODS),
    ]
    settings = {**evaluation.settings, **versions()}
    return _PAGE.format(
        title=escape(f"Failure prediction: {names}"),
        lede=escape(summary(evaluation)),
        sections="".join(sections),
        definitions="".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in definitions),
        settings="".join(f"<tr><th>{escape(str(k))}</th><td>{escape(str(v))}</td></tr>" for k, v in settings.items()),
    )


def summary(evaluation: Evaluation) -> str:
    """ViLU against the best of the others, in a sentence a data set."""
    said = []
    for result in evaluation.results:
        ours = next((row for row in result.rows if row.method == OURS and "auc" in row.cells), None)
        others = [row for row in result.rows if row.method != OURS and "auc" in row.against]
        if ours is None or not others:
            continue
        rival = max(others, key=lambda row: row.cells["auc"].value)
        pair = rival.against["auc"]
        verdict = "no significant difference"
        if pair.p_value < 0.05:
            verdict = f"significantly {'better' if pair.difference > 0 else 'worse'}"
        said.append(
            f"{result.name}: {OURS}'s AUC is {ours.cells['auc'].value:.1%}, that of the best other method "
            f"({rival.method}) {rival.cells['auc'].value:.1%}: {verdict} (p = {pair.p_value:.2g})."
        )
    return " ".join(said) or "No comparison with ViLU could be made."


def _html_result(result: Result, more: str) -> str:
    top = best(result)
    head = "".join(f"<th>{escape(c.title)} {'↑' if c.higher else '↓'}</th>" for c in COLUMNS)
    head += "".join(f"<th>{OURS} − it, {escape(c.title)}</th>" for c in compared())
    rows = "".join(_html_row(row, top) for row in result.rows)
    note = f'<p class="note">{escape(result.note)}</p>' if result.note else ""
    return (
        f"<section><h2>{escape(result.name)}</h2><p>{escape(caption(result))}</p>{note}"
        f'<div class="wide"><table><thead><tr><th>method</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f"{more}</section>"
    )


def _html_row(row: Row, top: dict[str, float]) -> str:
    ours = ' class="ours"' if row.method == OURS else ""
    start = f"<tr{ours}><th>{escape(row.method)}</th>"
    if row.reason:
        return f'{start}<td class="reason" colspan="{len(COLUMNS) + len(COMPARED)}">{escape(row.reason)}</td></tr>'
    cells = []
    for column in COLUMNS:
        cell = row.cells.get(column.key)
        if cell is None:
            cells.append("<td></td>")
            continue
        mark = ' class="best"' if cell.value == top[column.key] else ""
        bounds = f"{text(column, cell.low)}–{text(column, cell.high)}"
        cells.append(f"<td{mark}>{text(column, cell.value)}<small>{bounds}</small></td>")
    for column in compared():
        pair = row.against.get(column.key)
        if pair is None:
            cells.append("<td></td>")
            continue
        bounds = f"{100 * pair.low:+.1f} to {100 * pair.high:+.1f}"
        cells.append(f"<td>{100 * pair.difference:+.1f}<small>{bounds}; p {pair.p_value:.2g}</small></td>")
    return f"{start}{''.join(cells)}</tr>"


def _html_sweep(evaluation: Evaluation, result: Result) -> str:
    sweep = evaluation.sweeps.get(result.name, ())
    if len(sweep) < 2:
        return ""
    head = "".join(f"<th>{escape(method)}</th>" for method in evaluation.methods)
    body = ""
    for one in sweep:
        cells = [row.cells.get("auc") for row in one.rows]
        top = best(one).get("auc")
        body += f"<tr><th>{one.candidates:,}</th>" + "".join(
            "<td></td>"
            if c is None
            else f"<td{' class=best' if c.value == top else ''}>{100 * c.value:.1f}"
            f"<small>{100 * c.low:.1f}–{100 * c.high:.1f}</small></td>"
            for c in cells
        )
        body += "</tr>"
    return (
        "<h3>AUC against the number of candidates K</h3>"
        f'<div class="wide"><table><thead><tr><th>K</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _html_curve(evaluation: Evaluation, result: Result) -> str:
    curve = evaluation.curves.get(result.name)
    if curve is None:
        return ""
    rows = ""
    for point in curve.points:
        if point.mean is None:
            rows += f'<tr><th>{point.size:,}</th><td class="reason" colspan="3">{escape(point.reason)}</td></tr>'
            continue
        bounds = "" if point.low is None or point.high is None else f"{100 * point.low:.1f}–{100 * point.high:.1f}"
        rows += (
            f"<tr><th>{point.size:,}</th><td>{100 * point.mean:.1f}<small>{bounds}</small></td>"
            f"<td>{100 * (point.difference or 0):+.1f}</td><td>{point.p_value:.2g}</td></tr>"
        )
    return (
        f"<h3>Learning curve</h3><p>{escape(curve.needed.text)}. Mean over {len(curve.seeds)} seeds, with Student's "
        f"95% interval; MCM needs no training and has {curve.mcm.value:.1%}.</p>"
        f"<table><thead><tr><th>training images</th><th>AUC</th><th>AUC − MCM's</th><th>p</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1c2330; background: #f6f7f9; margin: 0 }}
main {{ max-width: 1280px; margin: 0 auto; padding: 24px }}
h1 {{ font-size: 26px; margin: 8px 0 }} h2 {{ font-size: 20px; margin: 0 }} h3 {{ margin: 24px 0 4px }}
section {{ background: #fff; border: 1px solid #e2e5ea; border-radius: 8px; padding: 20px 24px; margin: 20px 0 }}
.lede {{ font-size: 17px; max-width: 75ch }} .wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: 5px 10px; text-align: right; border-bottom: 1px solid #eceef1; vertical-align: top }}
thead th {{ font-size: 13px; color: #5a6474; white-space: nowrap; border-bottom: 2px solid #cfd4db }}
tbody th, thead th:first-child {{ text-align: left; font-weight: 600; white-space: nowrap }}
small {{ display: block; color: #7a8494; font-size: 11px; white-space: nowrap }}
.ours {{ background: #eef3ff }} .best {{ font-weight: 700; color: #12408f }}
.reason {{ text-align: left; color: #8a5a00; font-style: italic }} .note {{ color: #8a5a00 }}
.pictures {{ display: flex; flex-wrap: wrap; gap: 12px; margin-top: 16px }}
figure {{ margin: 0; flex: 1 1 480px }} img {{ max-width: 100%; height: auto }}
dt {{ font-weight: 600 }} dd {{ margin: 0 0 8px 0; color: #3c4656 }} .settings td {{ text-align: left }}
</style></head><body><main>
<h1>{title}</h1><p class="lede">{lede}</p>
<p>All numbers in percent; below each its interval. Bold: the best of a column.</p>
{sections}
<section><h2>How each number is defined</h2><dl>{definitions}</dl></section>
<section><h2>Settings and versions</h2><table class="settings"><tbody>{settings}</tbody></table></section>
</main></body></html>
"""
