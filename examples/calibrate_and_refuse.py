"""Choose a threshold whose risk is guaranteed, and refuse the answers above it.

python examples/calibrate_and_refuse.py
"""

import numpy as np
import torch

from vilu import load_clip
from vilu.data import embed, open_source
from vilu.evaluation.calibration import TargetNotMetError, guaranteed_risk
from vilu.evaluation.evaluate import correct
from vilu.train import fit

TARGETS = (0.01, 0.1)  # share of accepted answers that may be wrong


def main() -> None:
    clip = load_clip()
    head = fit(embed(open_source(dataset="digits", split="train"), clip)).head
    held_out = embed(open_source(dataset="digits", split="test"), clip)
    probability = head.failure_probability(held_out.image.normalised.float(), held_out.text.normalised.float()).numpy()
    right = correct(held_out)

    # The guarantee rests on data that neither the head nor the threshold has seen before: one half chooses the
    # threshold, the other shows what it does.
    order = torch.randperm(len(right), generator=torch.Generator().manual_seed(0)).numpy()
    choose, show = np.array_split(order, 2)
    for target in TARGETS:
        try:
            found = guaranteed_risk(probability[choose], right[choose], target, confidence=0.95)
        except TargetNotMetError as error:
            print(f"risk {target:.1%}: refused. {error}")
            continue
        accept = probability[show] < found.threshold
        risk = (~right[show][accept]).mean() if accept.any() else 0.0
        print(
            f"risk {target:.1%}: accept below {found.threshold:.3f}; on new images {accept.mean():.1%} are accepted, "
            f"{risk:.2%} of them wrong (of all answers {(~right[show]).mean():.1%})"
        )


if __name__ == "__main__":
    main()
