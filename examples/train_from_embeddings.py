"""Train a failure predictor from embeddings that another program made.

Any vision-language model will do: only its normalised embeddings, the labels and its logit scale are read. Here the
embedded CLIP plays that model.

    python examples/train_from_embeddings.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from vilu import Checkpoint, ClassSet, load_clip, save_checkpoint
from vilu.data import embed, load_embeddings, open_source
from vilu.evaluation.evaluate import correct
from vilu.evaluation.metrics import auroc
from vilu.fingerprints import remembered
from vilu.scores import SCORES
from vilu.train import fit


def write_embeddings(file: Path, split: str) -> None:
    """Write one split of the embedded digits as the .npz file that `vilu train --embeddings` reads, too."""
    found = embed(open_source(dataset="digits", split=split), load_clip(), dtype="float32")
    np.savez(
        file,
        image_embedding=found.image.normalised,  # (N, D)
        text_embeddings=found.text.normalised,  # (K, D)
        labels=found.labels,  # (N,) integers below K
        class_names=np.array(found.class_names),
        logit_scale=found.logit_scale,
    )


def main() -> None:
    with TemporaryDirectory() as folder:
        train_file, test_file = Path(folder) / "train.npz", Path(folder) / "test.npz"
        write_embeddings(train_file, "train")
        write_embeddings(test_file, "test")

        train, test = load_embeddings(train_file), load_embeddings(test_file)
        head = fit(train).head

        right = correct(test)
        for name, score in {"MCM": SCORES["MCM"](), "ViLU": SCORES["ViLU"](head)}.items():
            confidence = score.confidence(test.image, test.text, test.logit_scale)
            print(
                f"{name}: AUC {auroc(confidence.numpy(), right):.3f} on {len(test)} images, {(~right).sum()} failures"
            )

        # `vilu export` writes such a head alone: its server takes embeddings, and `vilu ask --embeddings` asks it.
        class_set = ClassSet(train.class_names, ("{}",), train.text.normalised.float())
        samples = remembered(train.image.normalised)  # so that `vilu eval` and `vilu calibrate` know them again
        save_checkpoint(Checkpoint(head, class_set=class_set, samples=samples), Path(folder) / "head.safetensors")


if __name__ == "__main__":
    main()
