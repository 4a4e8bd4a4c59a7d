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

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the package `bench`, as this file is run by its path

from bench.authors import AuthorsLoop
from bench.common import RESULTS, machine, quantiles, write_results
from vilu import load_clip
from vilu.embeddings import BLOCK, EmbeddedSet, Embeddings
from vilu.recipes import Recipe, recipe_named
from vilu.train import fit
from vilu.training.batches import clip_answers, make_batch
from vilu.training.loss import batch_loss
from vilu.training.run import Run
from vilu.training.start import initial_head

CLASSES, DIM = 1000, 512
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


def speed(data: EmbeddedSet, turns: int, clip: Any) -> Iterator[dict[str, Any]]:
    """Seconds of an epoch, a row for each case and contender, in turns."""
    for case in CASES:
        batches = len(data) // case.recipe.batch_size  # theirs drop the last, part batch
        loops = {
            name: AuthorsLoop(data, case.recipe, case.frozen, clip, name == "autocast")
            for name in ("authors", "autocast")
        }
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
                **quantiles(values, unit="_s"),
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
    parser.add_argument("--output", type=Path, default=RESULTS / "train-cpu.json")
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
    write_results(given.output.with_suffix(""), {".json": document})


if __name__ == "__main__":
    main()
