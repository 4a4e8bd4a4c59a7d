"""Compare ViLU with other confidence scores on held-out images, and write the report.

python examples/evaluate.py [FOLDER]
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from vilu import load_clip
from vilu.data import embed, open_source
from vilu.evaluation.evaluate import Case, evaluate
from vilu.evaluation.report import tables
from vilu.train import fit


def main(folder: Path) -> None:
    clip = load_clip()
    train = embed(open_source(dataset="digits", split="train"), clip)
    test = embed(open_source(dataset="digits", split="test"), clip)
    head = fit(train).head

    evaluation = evaluate([Case(test, train, head)], ("MCM", "Entropy", "Doctor", "Rel-U", "ViLU"), resamples=200)
    for row in evaluation.results[0].rows:
        auc = row.cells["auc"]
        print(f"{row.method:8} AUC {auc.value:.3f} [{auc.low:.3f}, {auc.high:.3f}]")
    print(*tables.write(evaluation, folder / "report"), sep="\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with TemporaryDirectory() as temporary:
            main(Path(temporary))
