"""The numbers of the paper (arXiv 2507.07620, CLIP ViT-B/32) and of the notebooks of the authors' code, in percent."""

from __future__ import annotations

Pair = tuple[float | None, float | None]  # AUC, FPR95
OURS = "ViLU, paper's recipe"

# Means over the 13 data sets.
MEAN: dict[str, Pair] = {
    "MCM": (81.8, 70.6),
    "Entropy": (80.2, 74.0),
    "Doctor": (81.6, 71.2),
    "Rel-U": (80.7, 68.6),
    "LVU-BCE": (85.0, 57.4),
    "BayesVLM": (84.2, 65.1),
    OURS: (93.2, 29.9),
}
_NOTEBOOKS = {  # MCM, LVU (trained by squared error) and ViLU with the released weights
    "cifar10": ((89.76, 52.40), (96.57, 21.20), (98.31, 7.71)),
    "cifar100": ((82.74, 67.26), (80.22, 68.49), (91.53, 35.41)),
    "caltech101": ((88.23, 67.05), (89.84, 50.78), (96.93, 18.22)),
    "stanford_cars": ((81.44, 71.76), (78.50, 75.67), (90.26, 46.81)),
    "dtd": ((76.85, 79.96), (86.28, 58.57), (93.87, 28.20)),
    "eurosat": ((65.70, 83.05), (95.70, 21.31), (98.83, 4.47)),
    "flowers102": ((86.57, 64.51), (90.90, 36.52), (99.14, 1.93)),
    "food101": ((86.38, 64.25), (78.94, 74.78), (94.59, 28.52)),
    "oxford_pets": ((87.17, 58.81), (84.33, 55.05), (94.40, 24.89)),
    "sun397": ((78.72, 75.07), (76.63, 76.89), (88.58, 49.70)),
    "ucf101": ((84.76, 65.69), (88.54, 54.19), (95.66, 20.88)),
}
SETS: dict[str, dict[str, Pair]] = {
    name: {"MCM": mcm, "LVU-MSE": lvu, OURS: vilu} for name, (mcm, lvu, vilu) in _NOTEBOOKS.items()
}
RELEASED: dict[str, Pair] = {name: vilu for name, (_, _, vilu) in _NOTEBOOKS.items()}
CAPTIONS: dict[str, dict[str, Pair]] = {
    "cc3m": {"MCM": (83.9, None), "LVU-BCE": (69.3, None), "BayesVLM": (87.1, None), OURS: (91.4, None)},
    "cc12m": {"MCM": (88.8, None), "LVU-BCE": (74.4, None), "BayesVLM": (90.9, None), OURS: (95.2, 25.2)},
    "laion400m": {"MCM": (91.7, None), "LVU-BCE": (80.2, None), "BayesVLM": (95.1, None), OURS: (97.3, None)},
}
_SIZES = (128, 512, 1024, 2048, 4096, 8192)
BY_CANDIDATES: dict[str, dict[str, dict[int, float]]] = {
    "cc12m": {
        "MCM": dict(zip(_SIZES, (92.7, 90.1, 88.8, 87.5, 86.4, 85.3), strict=True)),
        OURS: dict(zip(_SIZES, (96.9, 95.7, 95.2, 94.4, 93.6, 92.8), strict=True)),
    }
}
_PARTS = {
    "v": ("image",),
    "v, t_pred": ("image", "predicted"),
    "v, z_attn": ("image", "attended"),
    "v, t_pred, z_attn": ("image", "predicted", "attended"),
}
ABLATION: dict[str, dict[str, tuple[tuple[str, ...], float]]] = {  # row to the head's parts, and the AUC
    name: {row: (parts, auc) for (row, parts), auc in zip(_PARTS.items(), aucs, strict=True)}
    for name, aucs in {
        "cifar10": (96.4, 97.9, 97.7, 98.3),
        "imagenet": (78.7, 88.8, 86.1, 89.5),
        "cc12m": (74.0, 88.9, 93.6, 95.2),
    }.items()
}
LOSS = {"imagenet": {"bce": 89.5, "mse": 85.7}}
AMOUNTS = (0.01, 0.05, 0.1, 0.25, 0.5)  # shares of the training data; the paper's figure is not given in numbers
