"""How the exported stages of a cascade route images, beside the eager models, and how far they may differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vilu.export.auto import set_aside
from vilu.export.checks import OverBudgetError
from vilu.export.measure import Measured
from vilu.export.parity import Answers
from vilu.export.precision import BUDGETS, HEAD_BUDGET


def within_budget(
    reports: list[dict[str, Any]],
    measured: Mapping[int, Measured],
    threshold: float,
    write: Callable[..., dict[str, Any]],
) -> tuple[dict[str, Any], list[str]]:
    """Take slower precisions, where `export_fastest` chose them, until the routing is within its budget.

    The stage that misroutes the most images gets the fastest precision that is left and within its own budget; the
    other stages stay as they are.

    Args:
        reports: what parity.json holds of each stage; the report of a stage that is written again takes its place.
        measured: what was measured of each stage, from 0; `write` keeps it up to date.
        threshold: as `export_cascade` has it.
        write: called with the number of a stage, from 0, and `tried`, as `export_fastest` has it; writes that stage.

    Returns:
        The rule, as `compare_rule` gives it; and a line where it stays over its budget.
    """
    spent: set[int] = set()
    while True:
        rule = compare_rule([measured[number] for number in range(len(reports))], threshold)
        problems = rule_problems(rule, [one["precision"] for one in reports])
        misrouted = {n: count for n, count in enumerate(rule["misrouted"]) if count and reports[n].get("tried")}
        left = [number for number in misrouted if number not in spent]
        if problems and misrouted and not left:
            stages = " and ".join(str(number + 1) for number in misrouted)
            problems = [f"{problems[0]}; no other precision of stage {stages} is within its parity budget"]
        if not problems or not left:
            return rule, problems
        worst = max(left, key=misrouted.__getitem__)
        try:
            reports[worst] = write(worst, tried=set_aside(reports[worst]["tried"], f"with it {problems[0]}"))
        except OverBudgetError:
            spent.add(worst)


def compare_rule(measured: Sequence[Measured], threshold: float) -> dict[str, Any]:
    """How the exported stages route the sample's images, beside the eager models.

    Returns:
        "images"; "stages", the share that each stage answers; "routed_differently", the images that get the answer of
        another stage; of these "not_near", those where no stage's eager P(failure) is within the head's budget of the
        threshold, and "misrouted", how many of them each stage but the last keeps or sends on against its eager model;
        "argmax_agreement", the share of all images that get the same class.
    """
    # A stage in int8 calibrates on the first images; the others are the same ones, in the same order, for all stages.
    common = min(len(one.eager.class_index) for one in measured)
    eager = [one.eager.last(common) for one in measured]
    exported = [next(iter(one.answers.values())).last(common) for one in measured]
    stage, label = _route(eager, threshold)
    stage_served, label_served = _route(exported, threshold)
    doubt = np.stack([one.failure_probability for one in eager[:-1]])
    budget = HEAD_BUDGET.error or 0.0
    near = (np.abs(doubt.astype(np.float64) - threshold) <= budget).any(axis=0)
    moved = stage != stage_served
    # Both ways are the same up to the first of the two stages, which one of them leaves.
    parted = np.minimum(stage, stage_served)[moved & ~near]
    return {
        "images": len(stage),
        "stages": [float((stage_served == number).mean()) for number in range(len(measured))],
        "routed_differently": int(moved.sum()),
        "not_near": len(parted),
        "misrouted": np.bincount(parted, minlength=len(measured) - 1).tolist(),
        "argmax_agreement": float((label == label_served).mean()),
    }


def _route(answers: Sequence[Answers], threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """The stage (N,), from 0, and the class (N,) that each image gets."""
    stage = np.zeros(len(answers[0].class_index), np.int64)
    on = np.ones(len(stage), bool)
    for answer in answers[:-1]:
        on &= answer.failure_probability.astype(np.float64) > threshold
        stage += on
    return stage, np.choose(stage, [answer.class_index for answer in answers])


def rule_problems(rule: dict[str, Any], precisions: Sequence[str]) -> list[str]:
    """One line where the rule routes more images otherwise than the precisions' budgets allow."""
    allowed = sum(1 - BUDGETS[precision].agreement for precision in precisions)
    share = rule["not_near"] / rule["images"]
    if share <= allowed:
        return []
    return [
        f"the cascade sends {share:.2%} of the images to another stage than eager models do, the limit is {allowed:.1%}"
    ]
