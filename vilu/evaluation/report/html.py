"""An evaluation as one HTML file that stands alone: it holds no script and loads nothing."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from vilu.evaluation.columns import COLUMNS
from vilu.evaluation.report.formatting import best, caption, compared, percent, versions
from vilu.evaluation.report.samples import ClassRow, Samples, Shot, by_class, galleries
from vilu.evaluation.results import OURS, SIGNIFICANCE, Evaluation, LearningCurve, Result, too_few

CLASSES = 50  # rows of the table by class; the JSON file has all
METHODS = {
    "MCM": "Maximum concept matching: CLIP's largest probability, max p. It gives P(failure) = 1 − max p.",
    "Entropy": "The negative normalised entropy of CLIP's probabilities: Σ p log p / log K.",
    "Doctor": "−(1 − g) / g with g = Σ p².",
    "Rel-U": "−p D pᵀ with a matrix D learned from CLIP's mistakes on the training data. λ and T are cross-validated.",
    "TrustVLM": "max p plus the similarity of the image to the mean training image of the predicted class.",
    "class bias": "A logistic regression on MCM's log-odds and a shrunk weight per predicted class.",
    "LVU-BCE": "The failure MLP on the image alone, trained with weighted cross-entropy.",
    "LVU-MSE": "The failure MLP on the image alone, regressed on CLIP's probability of the true class.",
    "ConfidNet": "An MLP on the image, regressed on CLIP's probability of the true class.",
    "ProbVLM": "−(aleatoric + epistemic variance) of an adapter that reproduces the image embedding.",
    "BayesVLM": "The probability of CLIP's answer under a Laplace posterior over CLIP's two projections.",
    "ViLU": "1 − P(failure) from the head in the checkpoint.",
}


@dataclass(frozen=True)
class _Section:
    """What the template shows of one data set, or of the mean over data sets.

    result: the numbers.
    best: by metric key, the best value.
    sweep: the results over the number of candidates K, each with its best values.
    curve: the learning curve, or None.
    figures: (file name, PNG in base64).
    classes: the classes with the most wrong answers.
    galleries: (title, pictures).
    file: name of the file with every image's scores, or "".
    """

    result: Result
    best: Mapping[str, float]
    sweep: Sequence[tuple[Result, Mapping[str, float]]] = ()
    curve: LearningCurve | None = None
    figures: Sequence[tuple[str, str]] = ()
    classes: Sequence[ClassRow] = ()
    galleries: Sequence[tuple[str, Sequence[Shot]]] = ()
    file: str = ""


def as_html(
    evaluation: Evaluation,
    images: Mapping[str, bytes],
    samples: Mapping[str, Samples] | None = None,
    files: Sequence[str] = (),
) -> str:
    """The report as one HTML file. Every text of the user is escaped.

    Args:
        evaluation: what to report.
        images: by file name, PNG files as `figures.figures` gives them; they are put inside the HTML file.
        samples: by the name of a result, its single images.
        files: names of the files with every image's scores, each beginning with the number of its result.
    """
    return template("template.html").render(
        title=f"Failure prediction: {', '.join(result.name for result in evaluation.results)}",
        summary=summary(evaluation),
        sections=_sections(evaluation, images, samples or {}, files),
        most_classes=CLASSES,
        columns=COLUMNS,
        compared=compared(),
        methods=evaluation.methods,
        ours=OURS,
        caption=caption,
        percent=percent,
        definitions=_definitions(evaluation),
        settings={**evaluation.settings, **versions()},
    )


def template(name: str) -> Template:
    """A template of this folder, which escapes every text and refuses a name that it was not given."""
    environment = Environment(
        loader=PackageLoader("vilu.evaluation", "report"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(name)


def summary(evaluation: Evaluation) -> str:
    """ViLU beside the best other method, in one sentence for each data set."""
    sentences = []
    for result in evaluation.results:
        ours = next((row for row in result.rows if row.method == OURS and "auc" in row.cells), None)
        few = too_few(result.failures, result.samples)
        if ours is not None and few and not result.known:
            sentences.append(f"{result.name}: {few}, which are too few to say which method is better.")
        others = [row for row in result.rows if row.method != OURS and "auc" in row.against]
        if ours is None or not others:
            continue
        rival = max(others, key=lambda row: row.cells["auc"].value)
        pair = rival.against["auc"]
        verdict = "the difference is not significant"
        if pair.p_value < SIGNIFICANCE:
            verdict = f"{OURS} is significantly {'better' if pair.difference > 0 else 'worse'}"
        sentences.append(
            f"{result.name}: {OURS} has an AUC of {ours.cells['auc'].value:.1%}, the best other method "
            f"({rival.method}) {rival.cells['auc'].value:.1%}; {verdict} (p = {pair.p_value:.2g})."
        )
    return " ".join(sentences) or f"{OURS} could not be compared with any other method."


def _sections(
    evaluation: Evaluation, images: Mapping[str, bytes], samples: Mapping[str, Samples], files: Sequence[str]
) -> list[_Section]:
    sections = [_Section(evaluation.mean, best(evaluation.mean))] if evaluation.mean else []
    for i, result in enumerate(evaluation.results, 1):
        sections.append(
            _Section(
                result,
                best(result),
                [(swept, best(swept)) for swept in evaluation.sweeps.get(result.name, ())],
                evaluation.curves.get(result.name),
                [(name, base64.b64encode(png).decode()) for name, png in images.items() if name.startswith(f"{i}-")],
                by_class(result, samples[result.name]) if result.name in samples else (),
                galleries(result, samples[result.name]) if result.name in samples else (),
                next((name for name in files if name.startswith(f"{i}-")), ""),
            )
        )
    return sections


def _definitions(evaluation: Evaluation) -> list[tuple[str, str]]:
    return [
        *((c.title, f"{c.definition} {'Higher' if c.higher else 'Lower'} is better.") for c in COLUMNS),
        (
            "Intervals",
            f"The {evaluation.level:.0%} percentile interval of a bootstrap over the test images, with "
            f"{evaluation.resamples:,} resamples and seed {evaluation.seed}. All methods and metrics share the same "
            "resamples. The interval of a mean over data sets comes from the means over one resample of each.",
        ),
        (
            f"{OURS} − method",
            f"{OURS}'s value minus that of the method in the row, on the same resamples. The p-value is two-sided; "
            "it comes from the share of resamples whose difference has the other sign, and the smallest possible value "
            f"is {2 / (1 + evaluation.resamples):.2g}. Each p-value is for one comparison; none is adjusted for the "
            "number of methods.",
        ),
        (
            "Captions",
            "The candidates of an image are the K captions of its group, its own caption included. A tie with its own "
            "caption counts as right.",
        ),
        (
            "Empty cell",
            "The metric is not defined: the method gives no probability, or all answers of the test set are right, or "
            "all are wrong.",
        ),
        *((method, METHODS[method]) for method in evaluation.methods if method in METHODS),
    ]
