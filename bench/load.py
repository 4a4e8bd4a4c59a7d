"""Tests a served model under traffic, hostile requests, overload and faults; checks every answer.

    python bench/load.py [--requests N] [--hostile N] [--faults] [--recording] [--quick] [--output BASE]

The parts and the files are described in bench/loadtest. The server is the real one, on a head trained here over the
embedded CLIP. Instead of that, --repository takes an export, or --url both ports of a running server; each needs
--ckpt, the checkpoint that is served. Writes BASE.json and BASE.md; the exit code is 1 where a promise was not kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import aiohttp
import click
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the package `bench`, as this file is run by its path

from bench.common import RESULTS, machine, package_versions, percentiles, ticker, write_results
from bench.loadtest import client_faults, hostile, phases
from bench.loadtest.phases import FULL, QUICK, At, Plan
from bench.loadtest.processes import Processes
from bench.loadtest.questions import MIX, QuestionMaker
from bench.loadtest.recording import recording_cost
from bench.loadtest.report import markdown
from bench.loadtest.scene import Promise, Scene, guarding, launched
from bench.loadtest.world import World, digits_and_shapes, label_sets
from vilu import Checkpoint, load_checkpoint, load_clip
from vilu.cli.progress import progress_bar
from vilu.clip import Clip, load_clip_for
from vilu.data.pipeline import cores
from vilu.errors import UserError
from vilu.serving import Server


def run(
    *,
    requests: int | None = None,
    hostile_count: int | None = None,
    with_faults: bool = False,
    with_recording: bool = False,
    quick: bool = False,
    ckpt: Path | None = None,
    repository: Path | None = None,
    url: str | None = None,
    output: Path | None = None,
    plan: Plan | None = None,
) -> dict[str, Any]:
    """The whole run; returns what BASE.json holds. Raises UserError for the user's mistakes."""
    plan = plan or (QUICK if quick else FULL)
    requests = plan.requests if requests is None else requests
    hostile_count = plan.hostile if hostile_count is None else hostile_count
    plan = replace(plan, requests=requests, hostile=hostile_count)
    if (url or repository) and ckpt is None:
        raise UserError(
            "--url and --repository need --ckpt, the checkpoint that is served: answers are checked with it"
        )
    if url and (with_faults or with_recording):
        raise UserError("--faults and --recording need a server of the bench's own, not --url")
    torch.set_num_threads(1)  # the server has the cores
    about = environment()
    console = Console(width=None if sys.stdout.isatty() else 160)
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vilu-load-")))
        bar = stack.enter_context(progress_bar())
        tick = ticker(bar)
        tick("the eager model")
        checkpoint, clip = model(ckpt)
        if repository is None and url is None:
            from vilu.export import export

            tick("exporting")
            repository = work / "model_repository"
            export(checkpoint, repository, clip=clip)
        world = World(clip, checkpoint, digits_and_shapes(plan.images), label_sets(plan.sets))
        processes, server = None, None
        if url is not None:
            at = At(*addresses(url))
        else:
            assert repository is not None
            tick("starting a server")
            server = Server(repository, log=work / "log", startup_seconds=180, stop_seconds=3)
            stack.enter_context(server)
            assert server.process is not None
            processes = Processes(server.process.pid)
            at = At(server.grpc_url, server.http_url)
        most = asyncio.run(largest_batch(at))
        asking = QuestionMaker(world, most)
        report: dict[str, Any] = {"environment": about, "largest_batch": most}
        found: list[Promise] = []
        if plan.requests:
            total, rows, memory = asyncio.run(phases.traffic_phase(asking, at, plan, processes, tick))
            latencies = {f"{kind}, {protocol}": {"requests": len(values), **percentiles(values)}
                         for (kind, protocol), values in sorted(total.latencies.items())}  # fmt: skip
            report["traffic"] = {"total": phases.row("all", total, sum(r["seconds"] for r in rows)), "phases": rows,
                                 "by_question": latencies, "memory": memory, "mix": MIX}  # fmt: skip
            found.append(phases.mixed(total, memory))
            capacity = max(r["requests_per_second"] for r in rows if r["phase"].startswith("closed"))
        else:
            capacity = 150.0
        if plan.hostile:
            tally, good = asyncio.run(phases.hostile_phase(asking, at, plan.hostile, most, tick))
            report["hostile"] = phases.tallied(tally)
            found.append(phases.judged(tally, good, server))
            tick("the guard")
            with guarding(at.grpc_url) as guarded:
                tally, good = asyncio.run(phases.hostile_phase(asking, at, plan.hostile, most, tick, guarded))
                found.append(phases.judged(tally, good, server, guarded=True))
                report["guard"] = asyncio.run(phases.guard_cost(asking, at, guarded, plan.sets * 10))
        if server is not None:
            assert repository is not None
            if plan.hostile:
                tick("the front door")
                with launched(repository, work / "door.log", "--startup-seconds=180", door=True) as door:
                    asyncio.run(door.answering(180))
                    there = At(door.url, door.http_url)
                    report["door"] = asyncio.run(phases.door_cost(asking, at, there, plan.sets * 10))
            if with_recording:
                tick("recording")
                report["recording"] = recording_cost(server, work)
            server.stop()
            if plan.hostile:
                stuck = hostile.in_flight((work / "log").read_text(errors="replace"))
                found[-1].expect(not stuck, f"in flight for ever: {stuck}")
            scene = Scene(repository, asking, work / "faults")
            if plan.requests or plan.hostile or with_faults or not with_recording:
                tick("overload")
                with Server(repository, log=work / "overload.log", startup_seconds=180, stop_seconds=3) as calm:
                    overload = client_faults.overload(scene, calm, 3 * capacity, plan.overload, capacity)
                    found.append(asyncio.run(overload))
            if with_faults:
                found += phases.all_faults(scene, tick)
        bar("done", 1, 1)
    about["load_after"] = os.getloadavg()[0]
    report["promises"] = [asdict(promise) | {"kept": promise.fine} for promise in found]
    text = markdown(report)
    console.print(text, markup=False, highlight=False)
    output = output or RESULTS / f"load{'-quick' if quick else ''}-cpu"
    write_results(output, {".json": report, ".md": text})
    return report


def model(ckpt: Path | None) -> tuple[Checkpoint, Clip]:
    if ckpt is None:
        clip = load_clip()
        return phases.trained(clip), clip
    checkpoint = load_checkpoint(ckpt)
    if checkpoint.clip is None or checkpoint.class_set is None:
        raise UserError(f"{ckpt}: names no CLIP and no classes")
    return checkpoint, load_clip_for(checkpoint, ckpt)


def addresses(text: str) -> tuple[str, str]:
    """(gRPC's HOST:PORT, HTTP's URL) of "HOST:PORT,http://HOST:PORT"."""
    grpc_url, _, http_url = text.partition(",")
    if "://" in grpc_url or not http_url.startswith("http://"):
        raise UserError(f"--url {text}: expected both ports, as in 127.0.0.1:8001,http://127.0.0.1:8000")
    return grpc_url, http_url.rstrip("/")


async def largest_batch(at: At) -> int:
    async with aiohttp.ClientSession() as session:
        try:
            async with session.get(f"{at.http_url}/v2/models/vilu/config") as reply:
                return max(1, int((await reply.json())["max_batch_size"]))
        except (aiohttp.ClientError, KeyError, ValueError) as error:
            raise UserError(f"{at.http_url}: tells nothing of the model vilu ({error})") from None


def environment() -> dict[str, Any]:
    """What the figures belong to: machine, cores, command and the versions of what takes part."""
    about = machine("cpu") | {"cores": cores(), "command": " ".join(["load.py", *sys.argv[1:]])}
    return about | package_versions("nvidia-pytriton", "tritonclient", "grpcio", "numpy", "openvino")


@click.command()
@click.option(
    "--requests", type=click.IntRange(0), help=f"Requests of mixed traffic; 0 for none.  [default: {FULL.requests}]"
)
@click.option(
    "--hostile",
    "hostile_count",
    type=click.IntRange(0),
    help=f"Hostile requests; 0 for none.  [default: {FULL.hostile}]",
)
@click.option("--faults", "with_faults", is_flag=True, help="Also kill processes, break models and fill /dev/shm.")
@click.option("--recording", "with_recording", is_flag=True, help="Also measure what `vilu serve --record` costs.")
@click.option("--quick", is_flag=True, help=f"A small run: {QUICK.requests} requests, {QUICK.hostile} hostile ones.")
@click.option("--ckpt", type=click.Path(path_type=Path), help="The checkpoint that --repository or --url serves.")
@click.option("--repository", type=click.Path(path_type=Path), help="A model repository, in place of an export.")
@click.option("--url", help="A running server: HOST:PORT of gRPC, comma, http://HOST:PORT.")
@click.option("--output", type=click.Path(path_type=Path), help="Without suffix.  [default: bench/results/load-cpu]")
def main(**given: Any) -> None:
    """Test a served model under traffic, hostile requests, overload and faults."""
    try:
        report = run(**given)
    except UserError as error:
        raise click.ClickException(str(error)) from None
    if not all(seen["kept"] for seen in report["promises"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
