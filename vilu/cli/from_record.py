"""What `vilu calibrate --from-record` and `vilu train --from-record` share: a server's recorded answers as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vilu.cli import output as said
from vilu.cli.options import all_of
from vilu.errors import UserError

if TYPE_CHECKING:
    from vilu.checkpoint import Checkpoint
    from vilu.embeddings import EmbeddedSet

# A command receives these options as `from_record` and `since`.
record_data_options: Callable[[Any], Any] = all_of(
    click.option(
        "--from-record",
        metavar="DIR|postgresql://...|@FILE",
        help="Use a server's recorded answers and their feedback as the data (docs/monitor.md).",
    ),
    click.option(
        "--since",
        type=click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]),
        help="With --from-record: leave out answers before this time (UTC).",
    ),
)


def calibrate(
    ckpt: Path, where: str, since: datetime | None, target_risk: float, confidence: float, output: Path
) -> None:
    """Choose the threshold of a checkpoint from recorded answers, and write it."""
    import torch

    from vilu.checkpoint import digest, load_checkpoint, save_checkpoint
    from vilu.evaluation.labelled import guaranteed_risk_of_labelled
    from vilu.evaluation.reference import summarise

    checkpoint = load_checkpoint(ckpt)
    if checkpoint.class_set is None:
        raise UserError(f"{ckpt}: has no class set, so no answers of its own are recorded")
    found = _read(where, digest(checkpoint), since, embeddings=True)
    failure, chance = found.failure_probability, found.probability
    chosen = guaranteed_risk_of_labelled(
        failure[found.rows], found.correct, chance[found.rows], failure, target_risk, confidence, chance
    )
    reference = summarise(failure, found.class_index, len(checkpoint.class_set.names), found.embedding)
    note: dict[str, Any] = {
        "data": "record",
        "split": since.isoformat() if since else "",
        "samples": len(failure),
        "candidates": len(checkpoint.class_set.names),
        "threshold": asdict(chosen),
        "reference": reference | {"target_risk": target_risk},
    }
    before = checkpoint.meta.get("calibration") or {}
    note |= {name: before[name] for name in ("probability", "outlier") if name in before}
    meta = {**checkpoint.meta, "calibration": note}
    with torch.no_grad():
        save_checkpoint(replace(checkpoint, threshold=chosen.threshold, meta=meta), output)
    said.result(
        f"threshold {chosen.threshold:.4f} on {len(failure)} recorded answers, {chosen.samples} of them labelled: "
        f"accepts {chosen.coverage:.1%} of answers, {chosen.risk:.2%} of them wrong, promised at {confidence:.0%}: at "
        f"most {chosen.target:.2%}"
    )
    said.result(f"{output}: written")


def training_set(where: str, checkpoint: Checkpoint, since: datetime | None) -> EmbeddedSet:
    """Return the recorded answers with feedback as training data over the checkpoint's class set.

    People label an answer by a policy that sees P(failure) alone, which is a function of the embedding. So the share
    of wrong answers given an embedding is as among all answers, and no weights are needed. Where people only said that
    an answer is wrong, the likeliest other class stands in for the true one.

    Raises:
        UserError: no such answers, or their embeddings were not recorded.
    """
    import torch

    from vilu.checkpoint import digest
    from vilu.embeddings import EmbeddedSet, Embeddings
    from vilu.preprocess.class_names import cleaned

    if checkpoint.class_set is None or checkpoint.clip is None:
        raise UserError("--from-record: the checkpoint has no class set, or no CLIP")
    found = _read(where, digest(checkpoint), since, embeddings=True)
    if found.embedding is None:
        raise UserError("--from-record: embeddings are missing; record with `vilu serve --record-embeddings`")
    names = checkpoint.class_set.names
    place = {cleaned(name): i for i, name in enumerate(names)}
    t = torch.nn.functional.normalize(checkpoint.class_set.text_embeddings.float(), dim=1)
    v = torch.nn.functional.normalize(torch.from_numpy(found.embedding[found.rows]), dim=1)
    kept, labels = [], []
    for row, (true, predicted) in enumerate(zip(found.labels, found.class_index[found.rows], strict=True)):
        if true is None:
            others = v[row] @ t.T
            others[int(predicted)] = -torch.inf
            kept.append(row)
            labels.append(int(others.argmax()))
        elif cleaned(true) in place:  # a label that the class set lacks cannot be learned
            kept.append(row)
            labels.append(place[cleaned(true)])
    if not kept:
        raise UserError("--from-record: none of the labels is in the checkpoint's class set")
    return EmbeddedSet(
        "record", Embeddings(v[kept]), Embeddings(t), torch.tensor(labels), tuple(names), checkpoint.clip.logit_scale
    )


def _read(where: str, checkpoint: str, since: datetime | None, *, embeddings: bool) -> Any:
    from vilu.serving.record import open_record
    from vilu.serving.record.labelled import read_labelled

    after = None if since is None else since.replace(tzinfo=timezone.utc)
    return read_labelled(open_record(where), checkpoint, after, embeddings=embeddings)
