"""Training a head on cached embeddings, set against the authors' loop: `python bench/train.py`.

Ours is `vilu.train.fit` itself. Theirs is an eager transcription of the work of one epoch of their closed-set training
(ykrmm/ViLU, vilu/engine/trainer.py and models/vilu_attn.py): text features made anew by the text tower every epoch;
in every step both projections over all K texts (multiplied by zero and added to the unprojected ones while frozen),
three softmaxes over all candidates, and the scores copied to NumPy for an ROC curve and an AUC. Two things are left out
in their favour: their image tower, which runs in every step (both loops start from embeddings, theirs in memory), and
their loader. Float32 on both sides; they train under bfloat16 autocast, which is timed too (`autocast`).

Epochs of theirs are extrapolated from STEPS steps and PROMPTS prompts, ours are whole. The contenders take turns.
Besides: the share of matrix products in our step, our memory for growing data, and how busy embedding keeps the cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from head import machine
from torch import Tensor, nn

from vilu import load_clip
from vilu.embeddings import BLOCK, EmbeddedSet, Embeddings
from vilu.recipes import Recipe, recipe_named
from vilu.train import fit
from vilu.training.batches import clip_answers, make_batch
from vilu.training.loss import batch_loss
from vilu.training.run import Run
from vilu.training.start import initial_head

ROOT = Path(__file__).parents[1]
CLASSES, DIM, SCALE = 1000, 512, 100.0
STEPS, PROMPTS = 25, 125  # of theirs, in a turn
MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::matmul", "aten::linear")


@dataclass(frozen=True)
class Case:
    """frozen: their projections are multiplied by zero (keep_frozen, as on ImageNet), and ours are not there."""

    name: str
    recipe: Recipe
    frozen: bool


CASES = (
    Case("paper-imagenet", recipe_named("paper-imagenet"), True),
    # After its first 1,000 steps, less than three of its 400 epochs at this size.
    Case("paper-cifar10, projections trained", recipe_named("paper-cifar10", freeze_steps=0), False),
    Case("default", recipe_named("default", validation=0, min_steps=0), True),
)


class AuthorsModel(nn.Module):
    """Their head and its forward, operation by operation."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.frozen = frozen
        self.register_buffer("iteration_count", torch.tensor(0))
        widths = (3 * DIM, 512, 256, 128)
        layers: list[nn.Module] = []
        for width, out in itertools.pairwise(widths):
            layers += [nn.Linear(width, out), nn.ReLU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(128, 1))
        self.in_proj_v, self.in_proj_t = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        nn.init.eye_(self.in_proj_v.weight)
        nn.init.eye_(self.in_proj_t.weight)

    def forward(self, v: Tensor, t: Tensor) -> Tensor:
        self.iteration_count += 1
        if self.frozen:
            q, k = self.in_proj_v(v) * 0 + v, self.in_proj_t(t) * 0 + t
        else:
            q, k = self.in_proj_v(v), self.in_proj_t(t)
        x = torch.cat((v, F.softmax(SCALE * q @ k.t(), dim=-1) @ k), dim=1)
        _, predicted = F.softmax(SCALE * v @ t.t(), dim=-1).topk(1, 1, True, True)
        return self.mlp(torch.cat((x, t[predicted[:, 0]]), dim=1))


class AuthorsLoop:
    """Their epoch, in parts: the text features, and steps with and without what they measure in each."""

    def __init__(self, data: EmbeddedSet, case: Case, clip: Any, autocast: bool = False) -> None:
        assert data.labels is not None
        self.image, self.labels, self.text = data.image.normalised.float(), data.labels, data.text.normalised
        self.batch, self.clip, self.autocast = case.recipe.batch_size, clip, autocast
        self.model = AuthorsModel(case.frozen).train()
        options = {"lr": case.recipe.learning_rate, "weight_decay": case.recipe.weight_decay}
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters(), **options)
        if case.recipe.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(self.model.parameters(), momentum=case.recipe.momentum, **options)
        self.metrics = 0.0

    def text_features(self, prompts: int) -> float:
        """Seconds to tokenize and encode them."""
        started = time.perf_counter()
        with torch.no_grad(), self._cast():
            features = self.clip.encode_tokens(self.clip.tokenize([f"a photo of a thing {i}." for i in range(prompts)]))
            features /= features.norm(dim=-1, keepdim=True)
        return time.perf_counter() - started

    def steps(self, rows: Tensor) -> tuple[float, float]:
        """Seconds of the steps over these rows, a multiple of the batch size, and those of their metrics."""
        self.metrics, started = 0.0, time.perf_counter()
        for chosen in rows.split(self.batch):
            self._step(self.image[chosen], self.labels[chosen])
        return time.perf_counter() - started, self.metrics

    def _step(self, v: Tensor, labels: Tensor) -> None:
        with torch.no_grad(), self._cast():
            probs = torch.softmax(SCALE * v @ self.text.t(), dim=-1)
        with self._cast():
            scores = self.model(v, self.text).squeeze(-1)
            correct = labels == probs.argmax(dim=-1)
            weights = torch.ones_like(probs[:, 0])
            accuracy = correct.float().mean()
            weights[~correct] *= torch.log(1 + accuracy / (1 - accuracy))
            loss = F.binary_cross_entropy_with_logits(scores, correct.float(), weights)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        started = time.perf_counter()
        wrong = labels != probs.argmax(dim=-1)
        _roc(scores[~wrong].detach().float().numpy(), scores[wrong].detach().float().numpy())
        loss.item()
        self.metrics += time.perf_counter() - started

    def _cast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.autocast)


def _roc(success: np.ndarray, failure: np.ndarray) -> None:
    """FPR at 95% TPR, then AUC, each from a concatenation of its own: what their meter gets in every step."""
    import sklearn.metrics
    from scipy.interpolate import interp1d

    def both() -> tuple[list[int], np.ndarray]:
        return [1] * len(success) + [0] * len(failure), np.concatenate((success, failure))

    if len(success) and len(failure):
        fpr, tpr, _ = sklearn.metrics.roc_curve(*both())
        float(interp1d(tpr, fpr)(0.95))
        sklearn.metrics.roc_auc_score(*both())


def write_data(folder: Path, samples: int) -> None:
    """Embeddings as a cache holds them: float16 rows in a .npy file; CLIP is right on about 3 in 4."""
    generator = torch.Generator().manual_seed(0)
    text = F.normalize(torch.randn(DIM, generator=generator) + torch.randn(CLASSES, DIM, generator=generator), dim=1)
    labels = torch.randint(CLASSES, (samples,), generator=generator)
    image = np.lib.format.open_memmap(folder / "image.npy", "w+", np.float16, (samples, DIM))
    for rows in torch.arange(samples).split(BLOCK):
        noise = torch.randn(len(rows), DIM, generator=generator) / DIM**0.5
        image[rows.numpy()] = F.normalize(text[labels[rows]] + 4.5 * noise, dim=1).numpy()
    image.flush()
    np.savez(folder / "rest.npz", labels=labels, text=text)


def read_data(folder: Path) -> EmbeddedSet:
    """The same, the images mapped as `vilu.data.cache.read` maps them."""
    image = torch.from_numpy(np.load(folder / "image.npy", mmap_mode="c"))
    rest = np.load(folder / "rest.npz")
    return EmbeddedSet(
        "bench", Embeddings(image), Embeddings(torch.from_numpy(rest["text"])), torch.from_numpy(rest["labels"])
    )


def our_epoch(data: EmbeddedSet, recipe: Recipe) -> tuple[float, float]:
    """Seconds of the second of two epochs of `fit`; seconds of all before the first one ended, less one epoch."""
    at = [time.perf_counter()]
    fit(data, recipe, log=lambda _: at.append(time.perf_counter()))
    return at[2] - at[1], max(0.0, (at[1] - at[0]) - (at[2] - at[1]))


def quantiles(seconds: list[float]) -> dict[str, float]:
    low, high = np.quantile(seconds, (0.2, 0.8))
    return {"median_s": statistics.median(seconds), "q20_s": float(low), "q80_s": float(high)}


def speed(data: EmbeddedSet, turns: int, clip: Any) -> Iterator[dict[str, Any]]:
    """Seconds of an epoch, a row for each case and contender, in turns."""
    for case in CASES:
        batches = len(data) // case.recipe.batch_size  # theirs drop the last, part batch
        loops = {name: AuthorsLoop(data, case, clip, name == "autocast") for name in ("authors", "autocast")}
        recipe = replace(case.recipe, epochs=2)
        times: dict[str, list[float]] = {}
        for turn in range(turns + 1):
            rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(turn))
            found: dict[str, float] = {}
            for name, loop in loops.items():
                text = loop.text_features(PROMPTS) * CLASSES / PROMPTS
                steps, metrics = (x * batches / STEPS for x in loop.steps(rows[: STEPS * loop.batch]))
                found[f"{name}: whole epoch"] = text + steps
                found[f"{name}: text features given"] = steps
                found[f"{name}: and no scores to NumPy"] = steps - metrics
            found["vilu"], found["vilu: once, before the first epoch"] = our_epoch(data, recipe)
            if turn:  # the first warms up
                for name, seconds in found.items():
                    times.setdefault(name, []).append(seconds)
        ours = statistics.median(times["vilu"])
        for name, values in times.items():
            ratio = None if name.startswith("vilu") else statistics.median(values) / ours
            yield {
                "case": case.name, "N": len(data), "K": CLASSES, "D": DIM, "batch": case.recipe.batch_size,
                "contender": name, "turns": turns, "times_vilu": ratio,
                "extrapolated_from": None if ratio is None else {"steps": STEPS, "prompts": PROMPTS},
                **quantiles(values),
            }  # fmt: skip


def profile(data: EmbeddedSet, case: Case, steps: int = 20) -> dict[str, Any]:
    """Share of a step's time by operation: matrix products, and the largest of the others."""
    recipe, everything = case.recipe, torch.arange(len(data))
    answers = clip_answers(data, recipe)
    run = Run(initial_head(data, answers, everything, recipe), recipe, 1)

    def step() -> None:
        rows = torch.randint(len(data), (recipe.batch_size,))
        run.before_step()
        loss = batch_loss(run.head, make_batch(data, answers, rows, recipe), recipe, recipe.batch_size, 1)
        run.step(loss, 1)

    for _ in range(5):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            step()
    took = {event.key: event.self_cpu_time_total for event in found.key_averages()}
    total = sum(took.values())
    others = sorted((name for name in took if name not in MATRIX_PRODUCTS), key=lambda name: -took[name])[:5]
    return {
        "case": case.name,
        "step_ms": total / steps / 1e3,
        "matrix_products": sum(took.get(name, 0) for name in MATRIX_PRODUCTS) / total,
        "others": {name: took[name] / total for name in others},
    }


@contextmanager
def peak_of(field: str) -> Iterator[list[int]]:
    """The largest value of a field of /proc/self/status while inside, in bytes, read every 5 ms."""
    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            peak[0] = max(peak[0], status(field))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def memory_of(folder: Path) -> dict[str, int]:
    """Bytes of this process's own (anonymous) memory with the data mapped, and at the peak of one epoch."""
    torch.ones(8, requires_grad=True).sum().backward()  # starts autograd's threads
    data = read_data(folder)
    before = status("RssAnon")
    with peak_of("RssAnon") as peak:
        fit(data, recipe_named("default", epochs=1, min_steps=0))
    return {"N": len(data), "anonymous_before": before, "anonymous_peak": peak[0], "all_peak": status("VmHWM")}


def memory(sizes: tuple[int, ...]) -> Iterator[dict[str, int]]:
    for samples in sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_data(Path(folder), samples)
            command = [sys.executable, __file__, "--memory-of", folder]
            yield json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def extraction(clip: Any, images: int) -> dict[str, Any]:
    """CPU time over wall time while photo-sized JPEGs are decoded and encoded."""
    from PIL import Image

    from vilu.data import embed, open_source

    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for i in range(images):
            path = Path(folder) / f"class{i % 4}" / f"{i}.jpg"
            path.parent.mkdir(exist_ok=True)
            small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
            small.resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=90)
        source = open_source(folder)
        embed(source, clip)  # warm: threads, oneDNN's packed weights, the files in memory
        cpu, wall = time.process_time(), time.perf_counter()
        embed(source, clip)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"images": images, "images_per_second": images / wall, "cpu_over_wall": cpu / wall}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results/train-cpu.json")
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--images", type=int, default=256, help="JPEGs to embed")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory_of:
        print(json.dumps(memory_of(given.memory_of)))
        return
    clip = load_clip("ViT-B-32", "random")
    document: dict[str, Any] = {"about": machine("cpu"), "speed": [], "profile": [], "memory": []}
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), given.samples)
        data = read_data(Path(folder))
        for row in speed(data, given.turns, clip):
            document["speed"].append(row)
            ratio = "" if row["times_vilu"] is None else f"{row['times_vilu']:6.1f}x vilu"
            print(
                f"{row['case']:36} batch {row['batch']:<4} {row['contender']:38} {row['median_s']:8.2f} s "
                f"({row['q20_s']:.2f} - {row['q80_s']:.2f}) {ratio}", flush=True,
            )  # fmt: skip
        for case in CASES:
            found = profile(data, case)
            document["profile"].append(found)
            others = ", ".join(f"{name} {share:.0%}" for name, share in found["others"].items())
            share = f"matrix products {found['matrix_products']:.0%}; {others}"
            print(f"{case.name:36} step {found['step_ms']:.1f} ms: {share}", flush=True)
    for used in memory((given.samples, 4 * given.samples)):
        document["memory"].append(used)
        grown, peak = (used["anonymous_peak"] - used["anonymous_before"]) / 1e6, used["all_peak"] / 1e6
        print(f"N = {used['N']}: own memory at the peak {grown:.0f} MB above the start; with mappings {peak:.0f} MB")
    document["extraction"] = found = extraction(clip, given.images)
    print(f"embedding: {found['images_per_second']:.1f} images/s, CPU time / wall time {found['cpu_over_wall']:.2f}")
    given.output.parent.mkdir(parents=True, exist_ok=True)
    work = given.output.with_suffix(".new")
    work.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    work.rename(given.output)


if __name__ == "__main__":
    main()
