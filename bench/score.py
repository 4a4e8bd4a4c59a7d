"""Measures offline scoring: `vilu score` beside what a user would otherwise run, on the same cores.

    python bench/score.py [--clip ViT-B-32] [--images 256] [--rounds 3] [--small 100000] [--output FILE]

The weights are random, which changes no speed; every contender answers the same photographs with the same head. All
contenders run one after the other in each round, and their medians and the medians of each round's ratio to the loop
are given.

    loop       the exported graphs in a plain loop of one process (`Scorer`), with all cores
    score N    `vilu score` with N actors that share the cores
    authors    open_clip in float32 and the authors' head in a plain loop, with all cores
    recipe     Ray's documented recipe for batch inference: open_clip in float32 in `map_batches`

Speed and CPU time leave out a contender's first quarter of batches, so no start is counted. CPU time is that of all
processes, Ray's own among them; unlike the speed it hardly depends on what else the machine does. `--small` answers so
many small images from Parquet with the embedded CLIP, and reports the most memory that all of its processes held.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the package `bench`, as this file is run by its path

from bench.common import RESULTS, machine, markdown_table, write_results
from bench.exports import export_measured
from bench.inputs import photos, stand_in
from vilu.checkpoint import save_checkpoint
from vilu.clip import load_clip
from vilu.serving.offline import Answers, Scorer, Workers
from vilu.serving.offline.cluster import cluster
from vilu.serving.offline.inputs import open_input
from vilu.serving.offline.job import dataset_of

CORES = len(os.sched_getaffinity(0))
OBJECTS = 300 << 20  # bytes of Ray's object store
BATCH = 16
SAMPLE = 256  # photographs that the export measures its parity on


class Clock:
    """Notes when each batch is answered, and the CPU time that a process and all below it have taken by then."""

    def __init__(self, pid: int) -> None:
        self.pid, self.seen = pid, list[tuple[float, float, int]]()
        self.ticks = dict[tuple[int, int], int]()  # of each process seen: Ray ends idle ones, and their time counts

    def add(self, rows: int, bad: int = 0) -> None:
        self.ticks |= _ticks(self.pid)
        cpu = sum(self.ticks.values()) / os.sysconf("SC_CLK_TCK")
        self.seen.append((time.perf_counter(), cpu, rows))

    def found(self, workers: int = 1) -> dict[str, float]:
        """Images per second, and CPU seconds an image. The first quarter is left out: some workers still load then."""
        first = max(workers, len(self.seen) // 4)
        (start, cpu, _), (end, cpu_end, _) = self.seen[first - 1], self.seen[-1]
        rows = sum(rows for _, _, rows in self.seen[first:])
        return {"images_per_second": rows / (end - start), "cpu_seconds": (cpu_end - cpu) / rows}


def loop(files: Sequence[Path], answer: Callable[[list[bytes]], Any]) -> dict[str, float]:
    clock = Clock(os.getpid())
    for i in range(0, len(files), BATCH):
        answer([path.read_bytes() for path in files[i : i + BATCH]])
        clock.add(len(files[i : i + BATCH]))
    return clock.found()


class Recipe:
    """The callable class of Ray's documentation, with open_clip: decode, transform, encode in float32."""

    def __init__(self, clip: str, checkpoint: str, threads: int, clock: Any) -> None:
        import torch

        from bench.contenders import peers
        from vilu.checkpoint import load_checkpoint

        torch.set_num_threads(threads)
        loaded = load_clip(clip, "random" if clip != "vilu-tiny" else None)
        _, _, build = next(iter(peers(loaded, load_checkpoint(Path(checkpoint)), "cpu", threads, Path(), True)))
        self.way, self.clock = build(), clock

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        with torch.inference_mode():
            failure, index = self.way.answer(list(batch["bytes"]))
        self.clock.add.remote(len(failure))
        return {"failure_probability": failure, "class_index": index}


def recipe(folder: Path, clip: str, checkpoint: Path, workers: int) -> dict[str, float]:
    import ray

    clock = ray.remote(num_cpus=0)(Clock).remote(os.getpid())
    dataset = ray.data.read_binary_files(str(folder)).map_batches(
        Recipe,
        fn_constructor_args=(clip, str(checkpoint), max(CORES // workers, 1), clock),
        batch_size=BATCH,
        num_cpus=max(CORES // workers, 1),
        compute=ray.data.ActorPoolStrategy(size=workers),
    )
    return _consume(dataset, clock, workers)


def scored(folder: Path, repository: Path, workers: int) -> dict[str, float]:
    import ray

    clock = ray.remote(num_cpus=0)(Clock).remote(os.getpid())
    asked = Workers(workers, workers, max(CORES // workers, 1), batch_size=BATCH)
    dataset = dataset_of(open_input([str(folder)]), Scorer(repository), Answers(), asked, clock)
    return _consume(dataset, clock, workers)


def _consume(dataset: Any, clock: Any, workers: int) -> dict[str, float]:
    import ray

    for _ in dataset.iter_internal_ref_bundles():
        pass
    found: dict[str, float] = ray.get(clock.found.remote(workers))
    return found


def _ticks(pid: int) -> dict[tuple[int, int], int]:
    """Ticks of CPU time of a process and all below it, by id and start: the system uses an id again."""
    found = {}
    for one in _family(pid):
        with suppress(OSError):
            stat = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            found[one, int(stat[19])] = int(stat[11]) + int(stat[12])
    return found


class Memory(threading.Thread):
    """The most memory (PSS, bytes) that a process and all below it held, looked at every half second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.most, self.ended = pid, 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.5):
            self.most = max(self.most, sum(_pss(pid) for pid in _family(self.pid)))


def _family(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with suppress(OSError):
                found += [int(child) for child in task.read_text().split()]
    return found


def _pss(pid: int) -> int:
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return 0


def small(count: int, repository: Path, work: Path) -> dict[str, Any]:
    """Answer `count` small images from Parquet, in 20 files, and report time and memory."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from vilu.tiny import data

    images = []
    for image in data.digits("test").images:
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(image)).resize((32, 32)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    folder = work / f"small-{count}"
    folder.mkdir()
    for number in range(20):
        rows = [images[i % len(images)] for i in range(count // 20)]
        pq.write_table(pa.table({"image": rows}), folder / f"{number:02}.parquet", row_group_size=5000)
    command = [sys.executable, "-m", "vilu", "score", folder, "--model-repository", repository, "--json"]
    command += ["--output", work / f"out-{count}", "--workers", CORES, "--object-store-memory", OBJECTS >> 20]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    memory = Memory(process.pid)
    memory.start()
    out, _ = process.communicate()
    memory.ended.set()
    memory.join()
    if process.returncode:
        raise SystemExit(f"vilu score ended with {process.returncode}")
    return {"images": count, "peak_mib": memory.most >> 20, **json.loads(out)["this_run"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clip", default="ViT-B-32")
    parser.add_argument("--images", type=int, default=256, help="photographs for each contender in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", type=int, default=100_000, help="small images for the memory; a tenth too; 0: none")
    parser.add_argument("--output", type=Path, default=RESULTS / "score-cpu")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="vilu-score-"))
    try:
        found = measure(arguments, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    lines = markdown_table(
        ("contender", "images/s", "of the loop", "CPU ms an image", "of the loop"),
        [
            (name, f"{m['images_per_second']:.1f}", f"{m['speed_ratio']:.2f}", f"{1000 * m['cpu_seconds']:.1f}",
             f"{m['cpu_ratio']:.2f}")
            for name, m in found["medians"].items()
        ],
    )  # fmt: skip
    if found["small"]:
        table = [(r["images"], r["images_per_second"], r["peak_mib"]) for r in found["small"]]
        lines += ["", *markdown_table(("small images", "images/s", "peak MiB of all processes"), table)]
    write_results(arguments.output, {".json": found, ".md": "\n".join(lines) + "\n"})
    print("\n".join(lines))


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    import torch

    from bench.contenders import peers

    random = None if arguments.clip == "vilu-tiny" else "random"
    clip = load_clip(arguments.clip, random)
    jpegs = photos(max(arguments.images, SAMPLE))
    folder, checkpoint = work / "photos", work / "checkpoint.safetensors"
    folder.mkdir()
    files = [folder / f"{i:05}.jpg" for i in range(len(jpegs))]
    for path, jpeg in zip(files, jpegs, strict=True):
        path.write_bytes(jpeg)
    made = stand_in(clip, jpegs[:32])
    save_checkpoint(made, checkpoint)
    repository = work / "model_repository"
    sample = work / "sample"
    sample.mkdir()
    for path in files[:SAMPLE]:
        shutil.copy(path, sample)
    export_measured(checkpoint, repository, sample, "float32", "cpu", ["--max-batch-size", str(BATCH)])
    scorer = Scorer(repository, threads=CORES)
    _, _, build = next(iter(peers(clip, made, "cpu", CORES, work, True)))
    way = build()
    files = files[: arguments.images]
    for path in sorted(folder.iterdir())[arguments.images :]:
        path.unlink()
    with cluster(cpus=CORES + 1, object_store_bytes=OBJECTS), torch.inference_mode():
        rounds = []
        for number in range(arguments.rounds):
            rounds.append(
                {
                    "loop": loop(files, scorer.answers),
                    "score 1": scored(folder, repository, 1),
                    "score 2": scored(folder, repository, 2),
                    "authors": loop(files, way.answer),
                    "recipe": recipe(folder, arguments.clip, checkpoint, 1),
                }
            )
            print(f"round {number + 1}: {rounds[-1]}", file=sys.stderr, flush=True)
    tiny = work / "tiny"
    small_rows = []
    if arguments.small:
        embedded = load_clip()
        save_checkpoint(stand_in(embedded, jpegs[:32]), work / "tiny.safetensors")
        export_measured(work / "tiny.safetensors", tiny, sample, "float32", "cpu", ["--max-batch-size", "64"])
        small_rows = [small(count, tiny, work) for count in (arguments.small // 10, arguments.small)]
    return {
        "machine": machine("cpu"),
        "clip": arguments.clip,
        "batch": BATCH,
        "provider": scorer.stages[0].tower.provider,
        "medians": medians(rounds),
        "rounds": rounds,
        "small": small_rows,
    }


def medians(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Each contender's median speed and CPU time, and the medians of their ratios to the loop of the same round."""
    found = {}
    for name in rounds[0]:
        own = {key: statistics.median(r[name][key] for r in rounds) for key in rounds[0][name]}
        for ratio, key in (("speed_ratio", "images_per_second"), ("cpu_ratio", "cpu_seconds")):
            own[ratio] = statistics.median(r[name][key] / r["loop"][key] for r in rounds)
        found[name] = own
    return found


if __name__ == "__main__":
    main()
