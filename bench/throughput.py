"""Measures every way to run a CLIP with a ViLU head side by side, on the same images, weights and cores.

    python bench/throughput.py [--clip ViT-B-32 --pretrained random | --ckpt FILE] [--quick] [--output BASE]

It measures (a) the image tower alone, from pixels to embedding; (b) one process, from encoded JPEG to answer; (c) the
real server over gRPC, in closed and open loop; and it computes what these cores allow. Every answer is compared with
the eager float32 model before anything is timed: a contender over the parity budget is marked and has no rank. The
contenders take turns in every round, so that other work on the machine slows all of them alike. It writes BASE.json and
BASE.png. On a GPU (not tried so far) the same program runs eager CUDA and ONNX Runtime's CUDA provider. A cascade of
two CLIPs has a program of its own, bench/cascade.py.

`--quick` takes about two minutes on two idle cores, most of it the export; with `--keep FOLDER` a later run can take it
by `--repository`. It compares float32 alone, eager PyTorch with `vilu export`, on 16 images, in one round, and
puts two closed loops (1 and 16 requests at a time) and one open loop on the server. All parity checks stay, the
export's own on 256 images among them. The full run adds torch.compile, ONNX Runtime, OpenVINO, 16-bit floats and int8,
and takes five rounds over 64 images.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the package `bench`, as this file is run by its path

from bench.common import RESULTS, cpu_flags, machine, package_versions, ticker, write_results
from bench.contenders import Way, exported, peers
from bench.exports import export_all
from bench.inputs import CLASSES, photos, stand_in
from bench.loadtest.load_generator import Load, request
from bench.loadtest.processes import Processes
from bench.throughput_report import document, picture, print_report
from bench.throughput_rows import BATCH, Reference, Row, Served, Timing, targets
from vilu import load_checkpoint, load_clip, tiny
from vilu.cli.progress import progress_bar
from vilu.clip import Clip, load_clip_for
from vilu.data.pipeline import cores
from vilu.errors import UserError
from vilu.preprocess.image import decode

PHOTOS = 384  # what an int8 export wants for parity and calibration; the timed ones are the first of them


@dataclass(frozen=True)
class Plan:
    """How long everything is measured.

    rounds: turns of every contender and every closed loop.
    timed: images that are answered and compared.
    seconds: what one contender spends in one turn at one batch size.
    window: seconds of one load on the server; an open loop takes twice as long.
    levels: requests at a time, one closed loop each.
    shares: rates of the open loops, as shares of the closed loop's images a second with 16 at a time.
    """

    rounds: int
    timed: int
    seconds: float
    window: float
    levels: tuple[int, ...]
    shares: tuple[float, ...]


FULL = Plan(5, 64, 1.0, 4.0, (1, 2, 4, 8, 16, 32), (0.5, 0.8, 0.95))
QUICK = Plan(1, BATCH, 0.2, 1.5, (1, 16), (0.8,))


class Bench:
    """One run: rows of contenders and servers over one set of images."""

    def __init__(self, plan: Plan, images: Sequence[bytes], device: str) -> None:
        self.plan, self.images, self.device = plan, images, device
        self.rows: list[Row] = []
        self.servers: list[Served] = []
        self.reference: Reference | None = None

    def add(self, found: Iterable[tuple[str, str, Callable[[], Way]]], tick: Callable[[str], None]) -> None:
        """Build contenders and check each; the first is the reference."""
        for name, precision, build in found:
            tick(f"{name}, {precision}")
            row = Row(name, precision)
            self.rows.append(row)
            try:
                row.way = build()
                row.ours, row.note = row.way.ours, row.way.note
                with torch.inference_mode():
                    self._check(row)
            except Exception as error:  # whatever a peer raises costs its own row only
                row.way = None
                row.note = f"{type(error).__name__}: {error}".splitlines()[0][:160]

    def _check(self, row: Row) -> None:
        """Parity, by way of which every shape that is timed later is warm: batches of 16 and of 1."""
        way = row.way
        assert way is not None
        parts = []
        for start in range(0, len(self.images), BATCH):
            v = way.tower(way.batch(self.images[start : start + BATCH]))
            parts.append((np.asarray(torch.as_tensor(v).float().cpu()), *way.head(v)))
        embedding, failure, index = (np.concatenate(column) for column in zip(*parts, strict=True))
        alone = way.answer(self.images[:1])
        if self.reference is None:
            self.reference = Reference(embedding, failure.astype(np.float64), index)
        row.parity = self.reference.judge(row.precision, failure, index, embedding)
        row.parity["batch_effect"] = float(abs(alone[0][0] - failure[0]))

    def measure(self, tick: Callable[[str], None]) -> None:
        """All rounds: every contender's tower and whole answer at batch 1 and 16, every server at every concurrency."""
        passed = [row for row in self.rows if row.way is not None]
        ready = {id(row): self._prepared(row) for row in passed}
        for turn in range(self.plan.rounds):
            with torch.inference_mode():
                for row in passed:
                    tick(f"round {turn + 1}: {row.name}, {row.precision}")
                    for kind, call in ready[id(row)].items():
                        timing = row.timings.setdefault(kind, Timing(int(kind.split()[1])))
                        timing.take(call, self.plan.seconds)
            for served in self.servers:
                for level in self.plan.levels:
                    tick(f"round {turn + 1}: server, {served.precision}, {level} at a time")
                    served.closed.setdefault(level, []).append(served.load.closed(level, self.plan.window))
        for served in self.servers:
            for rate in served.rates or [share * served.peak() for share in self.plan.shares]:
                tick(f"server, {served.precision}, {rate:.1f} a second")
                if rate > 0:
                    served.open[rate] = [served.load.open(rate, 2 * self.plan.window)]

    def _prepared(self, row: Row) -> dict[str, Callable[[], Any]]:
        way = row.way
        assert way is not None
        calls: dict[str, Callable[[], Any]] = {}
        batches = [self.images[i : i + BATCH] for i in range(0, len(self.images) - BATCH + 1, BATCH)]
        turns = [0, 0]

        def answer_one() -> None:
            turns[0] += 1
            way.answer([self.images[turns[0] % len(self.images)]])

        def answer_many() -> None:
            turns[1] += 1
            way.answer(batches[turns[1] % len(batches)])

        for size in (1, BATCH):
            batch = way.batch(self.images[:size])
            calls[f"tower {size}"] = synchronised(functools.partial(way.tower, batch), self.device)
        return calls | {"answer 1": answer_one, f"answer {BATCH}": answer_many}


def synchronised(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    if device != "cuda":
        return call

    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run


def serve_parity(
    url: str, images: Sequence[bytes], precision: str, reference: Reference | None
) -> dict[str, Any] | None:
    """The server's answers against the reference; None without one. Raises UserError where it answers an error."""
    from vilu.serving import Client

    with Client(url, timeout=120) as client:
        answers = [answer.raise_for_error() for answer in client.ask(images)]
    if reference is None:
        return None
    failure = np.array([answer.failure_probability for answer in answers])
    return reference.judge(precision, failure, np.array([answer.class_index for answer in answers]))


def decode_timing(images: Sequence[bytes], clip: Clip, threads: int, rounds: int) -> Timing:
    """vilu.preprocess.image.decode of all images, `threads` at a time."""
    from concurrent.futures import ThreadPoolExecutor

    timing = Timing(len(images))
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            timing.take(lambda: list(pool.map(lambda data: decode(data, clip.transform), images)), 0.2)
    return timing


def environment(device: str, threads: int) -> dict[str, Any]:
    """The machine, versions and commit that every figure belongs to."""
    found = machine(device) | {"threads": threads, "cores": cores(), "cpu_flags": cpu_flags()}
    return found | package_versions("vilu", "open_clip_torch", "onnx", "openvino", "onnxruntime-ep-openvino",
                                    "nvidia-pytriton", "tritonclient", "numpy", "pillow")  # fmt: skip


def run(
    *,
    clip_name: str = "ViT-B-32",
    pretrained: str | None = None,
    ckpt: Path | None = None,
    url: str | None = None,
    folder: Path | None = None,
    repositories: Sequence[Path] = (),
    keep: Path | None = None,
    precisions: str | None = None,
    rates: str = "",
    threads: int | None = None,
    quick: bool = False,
    output: Path | None = None,
) -> dict[str, Any]:
    """The whole run; returns what BASE.json holds. Raises UserError for the user's mistakes."""
    from vilu.serving import Server

    console = Console(width=None if sys.stdout.isatty() else 170)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = threads or cores()
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    plan = QUICK if quick else FULL
    output = output or RESULTS / f"throughput-{device}"
    asked = numbers(rates)
    if url is not None:
        url = url.removeprefix("grpc://")
        if "://" in url:
            raise UserError(f"{url}: the load is sent over gRPC, give HOST:PORT of that")
    jpegs = photos(PHOTOS, folder)
    images = jpegs[: plan.timed]
    bench = Bench(plan, images, device)
    exports: list[dict[str, Any]] = []
    decoding = None
    about = environment(device, threads)
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vilu-bench-")))
        bar = stack.enter_context(progress_bar())
        tick = ticker(bar)
        if url is None or ckpt is not None:
            if ckpt is not None:
                checkpoint = load_checkpoint(ckpt)
                if checkpoint.clip is None or checkpoint.class_set is None:
                    raise UserError(f"{ckpt}: names no CLIP and no classes")
                clip = load_clip_for(checkpoint, ckpt)
            else:
                clip = load_clip(clip_name, pretrained or (None if clip_name in tiny.FOLDERS else "random"))
                checkpoint = stand_in(clip, images if quick else jpegs)
            about |= {"clip": clip.spec.name, "pretrained": clip.spec.pretrained,
                      "classes": len(checkpoint.class_set.names) if checkpoint.class_set else CLASSES}  # fmt: skip
            ready = export_all(checkpoint, jpegs, repositories, precisions, quick, device, keep or work, exports, tick)
            bench.add(peers(clip, checkpoint, device, threads, work, quick), tick)
            for precision, repository in ready:
                bench.add(exported(repository, precision, clip, device, threads), tick)
            decoding = decode_timing(images, clip, threads, plan.rounds)
        else:
            ready = []
        requests = [request(image) for image in images]
        if url is not None:
            precision = (precisions or "float32").split(",")[0]
            parity = serve_parity(url, images, precision, bench.reference)
            bench.servers.append(Served(precision, Load(url, requests), asked, parity))
        else:
            for precision, repository in ready:
                tick(f"starting a server, {precision}")
                server = stack.enter_context(Server(repository, log=work / f"{precision}.log", startup_seconds=180))
                assert server.process is not None
                parity = serve_parity(server.grpc_url, images, precision, bench.reference)
                load = Load(server.grpc_url, requests, processes=Processes(server.process.pid))
                bench.servers.append(Served(precision, load, asked, parity))
        bench.measure(tick)
        bar("measured", 1, 1)

    goals = targets(bench.rows, bench.servers, decoding, exports)
    about["load_after"] = os.getloadavg()[0]
    extra = {"images": len(images), "export": exports, "decode": decoding and decoding.rate(), "targets": goals}
    report = document(bench.rows, bench.servers, about, extra)
    print_report(console, bench.rows, bench.servers, report, decoding)
    title = f"{about.get('clip', url)}, {about['device']}, {threads} threads"
    write_results(output, {".json": report, ".png": picture(bench.rows, bench.servers, title)})
    return report


def numbers(text: str) -> list[float]:
    """Rates above 0, by comma."""
    try:
        found = [float(word) for word in text.split(",") if word.strip()]
    except ValueError:
        found = [0.0]
    if not all(0 < rate < float("inf") for rate in found):
        raise UserError(f"--rates {text!r}: expected numbers above 0, as in 10,20")
    return found


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--clip", "clip_name", default="ViT-B-32", show_default=True, help="open_clip model name or vilu-tiny.")
@click.option("--pretrained", help="Weights: a tag, a file or 'random'.  [default: random]")
@click.option("--ckpt", type=click.Path(path_type=Path), help="A trained head; brings its CLIP and classes.")
@click.option("--url", help="HOST:PORT (gRPC) of a running server, to measure instead of starting one.")
@click.option("--images", "folder", type=click.Path(path_type=Path), help="Folder of images.  [default: sample photos]")
@click.option("--repository", "repositories", multiple=True, type=click.Path(path_type=Path, exists=True),
              help="An export of this very checkpoint, instead of exporting; may be repeated.")  # fmt: skip
@click.option(
    "--keep", type=click.Path(path_type=Path), help="Folder for the checkpoint and the exports, kept for --repository."
)
@click.option(
    "--precisions",
    default=None,
    help="What to export, by comma; with --url what the server runs.  [default: all of `vilu export`]",
)
@click.option(
    "--rates", default="", help="Images a second of the open loops, by comma.  [default: shares of the closed loop's]"
)
@click.option(
    "--threads", type=click.IntRange(1), default=None, help="CPU threads of every contender.  [default: all cores]"
)
@click.option(
    "--quick",
    is_flag=True,
    help="About two minutes on two idle cores: float32, eager against the export, 16 images, one round, three loads.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Path of the results without suffix.  [default: bench/results/throughput-DEVICE]",
)
def main(**given: Any) -> None:
    """Measure every way to run a CLIP with a ViLU head side by side."""
    try:
        run(**given)
    except UserError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
