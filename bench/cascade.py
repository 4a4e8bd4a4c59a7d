"""Measures a cascade of CLIPs through the real server: against the large model alone, and three ways to route.

    python bench/cascade.py [--small vilu-tiny --large vilu-tiny-large] [--images digits] [--share 0.25] [--quick]

One server holds the cascade and, as an ensemble of the same models, the large CLIP alone. The images of a load are
chosen so that the stated share of them goes on. All loads take turns in every round, so that other work on the machine
slows all of them alike, and every answer is checked before anything is timed: the cascade must answer as the model of
the stage that it names, and route by what stage 1 answers.

Three ways to route are timed on the same models. "router": the ensemble of `vilu export --cascade`, whose last step is
a Python model that asks for the doubtful images alone. "calls": one Python model that asks for every step of every
image (BLS). "two requests": the client asks the small model and, where in doubt, the large one, as a front door would;
the image is sent and decoded twice. The second and the third are written here, for this comparison alone.

Besides these loads, which keep 16 requests in flight, the cascade and the large CLIP alone get requests that arrive at
random at one rate, 80% of what the large one answers. What the towers' times allow is 1 / (1 / small + share / large)
images a second, from the rates of the two models alone, under the same load. The images are photographs of 500 x 375
pixels, or with `--images` the embedded ones of 64 x 64.
`--repository` takes a cascade's own export, so that real heads answer. `--quick` checks the answers of 12 images,
exports with the parity of 32, and takes one round with 16 requests at a time of the two models alone and the router.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import click
import grpc
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from tritonclient.grpc import service_pb2 as pb

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the package `bench`, as this file is run by its path

from bench.common import RESULTS, machine, percentiles, ticker, write_results
from bench.inputs import jpeg, photos, stand_in
from bench.loadtest.load_generator import Load, Window, request
from bench.loadtest.processes import Processes
from vilu import Checkpoint, load_clip
from vilu.class_set import ClassSet
from vilu.cli.progress import progress_bar
from vilu.clip import Clip
from vilu.data.pipeline import cores
from vilu.errors import FailedError, UserError
from vilu.export import export, model_config
from vilu.export.cascade import export_cascade
from vilu.export.model_config import Step
from vilu.serving import Client, Server
from vilu.serving.about import CONFIG, load_config
from vilu.tiny import data

PHOTOS = 64
AT_ONCE = 16
ARRIVING = 0.8  # requests that arrive at random, as a share of what the large CLIP alone answers
# The whole cascade by calls, as short as it can be: what the router is compared with.
CALLS = """
import json
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import triton_python_backend_utils as pb_utils

NAMES = ["LABEL", "CLASS_INDEX", "CONFIDENCE", "FAILURE_PROBABILITY", "ACCEPT"]


def call(model, inputs, outputs):
    tensors = [pb_utils.Tensor(name, value) for name, value in inputs.items()]
    reply = pb_utils.InferenceRequest(model_name=model, inputs=tensors, requested_output_names=outputs).exec()
    if reply.has_error():
        raise RuntimeError(reply.error().message())
    return {name: pb_utils.get_output_tensor_by_name(reply, name).as_numpy() for name in outputs}


class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        self.threshold = float(parameters["cascade_threshold"]["string_value"])
        self.second = json.loads(parameters["stages"]["string_value"])[1]
        self.pool = ThreadPoolExecutor(64)

    def execute(self, requests):
        for request in requests:
            image = np.array(pb_utils.get_input_tensor_by_name(request, "IMAGE").as_numpy())
            self.pool.submit(self.answer, request.get_response_sender(), image, list(request.requested_output_names()))

    def answer(self, sender, image, wanted):
        try:
            pixels = call("preprocess", {"IMAGE": image}, sorted({"PIXELS", self.second["pixels"]}))
            found = call("vilu_head", call("clip_image", {"PIXELS": pixels["PIXELS"]}, ["IMAGE_EMBEDDING"]), NAMES)
            if float(found["FAILURE_PROBABILITY"][0, 0]) > self.threshold:
                prefix = self.second["prefix"]
                v = call(prefix + "clip_image", {"PIXELS": pixels[self.second["pixels"]]}, ["IMAGE_EMBEDDING"])
                found = call(prefix + "vilu_head", v, NAMES)
            response = pb_utils.InferenceResponse([pb_utils.Tensor(name, found[name]) for name in wanted])
        except Exception as error:
            response = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


class TwoRequests(Load):
    """Asks the small model, and where its answer is in doubt the large one: what a front door does, at its cheapest."""

    def __init__(self, url: str, small: Sequence[bytes], large: Sequence[bytes], threshold: float, **more: Any) -> None:
        super().__init__(url, small, **more)
        self.large, self.threshold = list(large), threshold

    async def _one(self, call: Any, index: int) -> str | None:
        try:
            reply = await call(self.requests[index % len(self.requests)], timeout=self.timeout)
            found = pb.ModelInferResponse.FromString(reply)
            place = next(i for i, output in enumerate(found.outputs) if output.name == "FAILURE_PROBABILITY")
            (failure,) = struct.unpack("<f", found.raw_output_contents[place])
            if failure > self.threshold:
                await call(self.large[index % len(self.large)], timeout=self.timeout)
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
        return None


def pair(clips: Sequence[Clip], images: Sequence[bytes]) -> list[Checkpoint]:
    """Stand-in checkpoints over equally many classes."""
    found = [stand_in(clip, images) for clip in clips]
    sets = [one.class_set for one in found if one.class_set is not None]
    least = min(len(one) for one in sets)
    return [
        replace(one, class_set=ClassSet(chosen.names[:least], ("{}",), chosen.text_embeddings[:least]))
        for one, chosen in zip(found, sets, strict=True)
    ]


def add_models(root: Path) -> None:
    """Add `large`, the last stage alone, and `calls`, the cascade by calls, to a cascade's repository.

    `large` has a decoder and a tower of its own, which share the cores with no other stage: as `vilu export` writes
    them without a cascade.
    """
    router = load_config(root / "vilu_router" / CONFIG)
    second = json.loads(router.parameters["stages"].string_value)[1]
    outputs = {name: (tensor, [1]) for name, tensor in zip(
        ("LABEL", "CLASS_INDEX", "CONFIDENCE", "FAILURE_PROBABILITY", "ACCEPT"),
        ("TYPE_STRING", "TYPE_INT32", "TYPE_FP32", "TYPE_FP32", "TYPE_BOOL"), strict=True)}  # fmt: skip
    image = {"IMAGE": ("TYPE_STRING", [1])}
    steps = [
        Step("large_preprocess", {"IMAGE": "IMAGE"}, {second["pixels"]: "pixels"}),
        Step("large_clip_image", {"PIXELS": "pixels"}, {"IMAGE_EMBEDDING": "embedding"}),
        Step(second["prefix"] + "vilu_head", {"IMAGE_EMBEDDING": "embedding"}, {name: name for name in outputs}),
    ]
    for name, source in (("large_preprocess", "preprocess"), ("large_clip_image", second["prefix"] + "clip_image")):
        shutil.copytree(root / source, root / name)
        config = load_config(root / name / CONFIG)
        config.name = name
        given = config.parameters
        for shared in ("nice", "pin_threads"):
            given.pop(shared, None)
        if "intra_op_thread_count" in given:
            given["intra_op_thread_count"].string_value = str(cores() // config.instance_group[0].count)
        model_config.save_config(root / name, config)
    model_config.write_ensemble(root / "large", image, outputs, steps, router.max_batch_size)
    config = load_config(root / "vilu_router" / CONFIG)
    config.name = "calls"
    del config.input[:], config.output[:]
    kinds = model_config.pb.DataType
    config.input.add(name="IMAGE", data_type=kinds.Value("TYPE_STRING"), dims=[1])
    for name, (kind, dims) in outputs.items():
        config.output.add(name=name, data_type=kinds.Value(kind), dims=dims)
    model_config.save_config(root / "calls", config)
    (root / "calls" / "1").mkdir()
    (root / "calls" / "1" / "model.py").write_text(CALLS)


def mixed(calm: Sequence[bytes], doubtful: Sequence[bytes], share: float, count: int = PHOTOS) -> list[bytes]:
    """`count` images of which a share is doubtful, spread evenly. Raises UserError where there is none of a kind."""
    wanted = round(share * count)
    if (wanted and not doubtful) or (wanted < count and not calm):
        raise UserError("the threshold splits none of the images")
    marks = [(i + 1) * wanted // count - i * wanted // count for i in range(count)]
    turns = [0, 0]
    chosen = []
    for mark in marks:
        pool = doubtful if mark else calm
        chosen.append(pool[turns[mark] % len(pool)])
        turns[mark] += 1
    return chosen


def checked(url: str, images: Sequence[bytes], threshold: float) -> tuple[list[bytes], list[bytes]]:
    """The images that stay and those that go on. Raises FailedError where an answer or its way is not the rule's."""
    asked = {}
    for model in ("vilu", "large", "vilu_cascade"):
        with Client(url, model=model, timeout=300, batch_size=8, in_flight=2) as client:
            asked[model] = [answer.raise_for_error() for answer in client.ask(images)]
    calm: list[bytes] = []
    doubtful: list[bytes] = []
    for image, small, large, found in zip(images, asked["vilu"], asked["large"], asked["vilu_cascade"], strict=True):
        on = small.failure_probability > threshold
        truth = large if on else small
        near = abs(small.failure_probability - threshold) < 1e-5
        alike = found.label == truth.label and abs(found.failure_probability - truth.failure_probability) < 1e-4
        if not near and not (found.stage == 1 + on and alike):
            raise FailedError(f"the cascade answers {found}, the rule {truth}")
        (doubtful if on else calm).append(image)
    return calm, doubtful


def described(window: Window, stages: Sequence[str]) -> dict[str, Any]:
    """What is kept of a window."""
    batches = {}
    for name in stages:
        share = window.models.get(name)
        if share is not None:
            batches[name] = {"images": share.images, "mean_batch": share.images / max(1, share.executions)}
    return {"images_per_second": window.throughput, "milliseconds": percentiles(window.latencies),
            "errors": dict(window.errors), "batches": batches}  # fmt: skip


def embedded(name: str, count: int) -> list[bytes]:
    """`count` images of an embedded test split as JPEG (quality 90)."""
    drawn = data.digits("test") if name == "digits" else data.shapes("test", count)
    return [jpeg(Image.fromarray(image)) for image in drawn.images[:count]]


def make_repository(
    small: str,
    large: str,
    images: Sequence[bytes],
    root: Path,
    *,
    precision: str,
    quick: bool,
    progress: Callable[[str, int, int], None],
) -> None:
    """Export a cascade of two CLIPs with stand-in heads, whose threshold splits the images in halves."""
    clips = [
        load_clip(name, None if name.startswith(("vilu-tiny", "local-dir:")) else "random") for name in (small, large)
    ]
    pixels = [np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in images]
    least = 32 if quick else 256
    with mock.patch("vilu.export.sample.MIN_INPUTS", least):
        measured = (pixels * 4)[:least]
        options: dict[str, Any] = {
            "write": export,
            "precision": precision,
            "max_batch_size": AT_ONCE,
            "images": measured,
            "allow_loss": True,
            "escalation_seconds": 120,
        }
        export_cascade(pair(clips, images), clips, root, threshold=0.5, **options, progress=progress)


def run(
    *, small: str, large: str, share: float, rounds: int, seconds: float, quick: bool, output: Path | None,
    repository: Path | None = None, keep: Path | None = None, images: str | None = None, precision: str = "float32",
) -> dict[str, Any]:  # fmt: skip
    """The whole run; returns what BASE.json holds. Raises UserError for the user's mistakes."""
    output = output or RESULTS / "cascade-cpu"
    rounds, flight = (1, (AT_ONCE,)) if quick else (rounds, (1, AT_ONCE))
    count = 12 if quick else PHOTOS
    chosen = embedded(images, count) if images else photos(count)
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vilu-bench-")))
        bar = stack.enter_context(progress_bar())
        tick = ticker(bar)
        root = work / "repository"
        if repository is not None:
            shutil.copytree(repository, root)
        else:
            make_repository(small, large, chosen, root, precision=precision, quick=quick, progress=bar)
            if keep is not None:
                shutil.copytree(root, keep)
        add_models(root)
        server = stack.enter_context(Server(root, log=work / "log", startup_seconds=300, overlay=True))
        assert server.process is not None
        url = server.grpc_url
        tick("checking the answers")
        threshold = float(load_config(root / "vilu_router" / CONFIG).parameters["cascade_threshold"].string_value)
        calm, doubtful = checked(url, chosen, threshold)
        mix = mixed(calm, doubtful, share)
        processes = Processes(server.process.pid)

        def load(model: str, asked: Sequence[bytes]) -> Load:
            return Load(url, [request(image, model) for image in asked], processes=processes, timeout=300)

        two = TwoRequests(url, [request(image) for image in mix], [request(image, "large") for image in mix], threshold,
                          processes=processes, timeout=300)  # fmt: skip
        loads = {
            "small alone": load("vilu", mix), "large alone": load("large", mix), "router": load("vilu_cascade", mix),
            "router, nothing goes on": load("vilu_cascade", mixed(calm, doubtful, 0)),
            "calls": load("calls", mix), "two requests": two,
        }  # fmt: skip
        if quick:
            loads = {name: loads[name] for name in ("small alone", "large alone", "router")}
        windows: dict[str, dict[int, list[Window]]] = {name: {level: [] for level in flight} for name in loads}
        for turn in range(rounds):
            for name, one in loads.items():
                for level in flight:
                    tick(f"round {turn + 1}: {name}, {level} at a time")
                    windows[name][level].append(one.closed(level, seconds))
        arrivals = ARRIVING * sum(one.throughput for one in windows["large alone"][AT_ONCE]) / rounds
        arriving: dict[str, list[Window]] = {} if quick else {"router": [], "large alone": []}
        for turn in range(rounds):
            for name, found in arriving.items():
                tick(f"round {turn + 1}: {name}, {arrivals:.0f} a second")
                found.append(loads[name].open(arrivals, seconds, seed=turn))
    return finish(windows, arrivals, arriving, share, threshold, small, large, output)


def finish(
    windows: dict[str, dict[int, list[Window]]],
    arrivals: float,
    arriving: dict[str, list[Window]],
    share: float,
    threshold: float,
    small: str,
    large: str,
    output: Path,
) -> dict[str, Any]:
    """Summarise, print and write the results."""
    stages = ("clip_image", "stage2_clip_image", "large_clip_image")
    rows: dict[str, Any] = {}
    for name, by_level in windows.items():
        rows[name] = {}
        for level, found in by_level.items():
            joined = Window(sum(one.seconds for one in found), [x for one in found for x in one.latencies])
            joined.answered = len(joined.latencies)
            joined.models = found[-1].models
            for one in found:
                joined.errors.update(one.errors)
            spent = sum(sum(one.server_cpu.values()) * one.seconds for one in found)
            rows[name][level] = described(joined, stages) | {
                "rounds": [one.throughput for one in found],
                "server_cpu_milliseconds": 1e3
                * spent
                / max(1, joined.answered),  # of an image; it hardly feels other work
            }

    def rate(name: str) -> float:
        return float(rows[name][AT_ONCE]["images_per_second"])

    allowed = 1 / (1 / rate("small alone") + share / rate("large alone"))
    p99 = {name: rows[name][AT_ONCE]["milliseconds"]["p99"] for name in ("router", "large alone")}
    steady: dict[str, Any] = {"a_second": arrivals}
    for name, given in arriving.items():
        unanswered = sum(sum(one.errors.values()) for one in given)
        steady[name] = percentiles([x for one in given for x in one.latencies]) | {"unanswered": unanswered}
    summary = {
        "share": share, "threshold": threshold, "small": small, "large": large, "in_flight": AT_ONCE, "loads": rows,
        "towers_allow": allowed, "of_what_towers_allow": rate("router") / allowed,
        "times_large_alone": rate("router") / rate("large alone"), "p99_ms": p99, "arriving": steady,
        "machine": machine("cpu"),
    }  # fmt: skip
    table = Table("load", "in flight", "images/s", "p50 ms", "p99 ms", "server's CPU ms", "mean batch of the towers")
    for name, by_level in rows.items():
        for level, row in by_level.items():
            batch = ", ".join(f"{one['mean_batch']:.1f}" for one in row["batches"].values())
            ms = row["milliseconds"]
            cells = ["" if ms[p] is None else f"{ms[p]:.1f}" for p in ("p50", "p99")]
            cells.append(f"{row['server_cpu_milliseconds']:.2f}")
            table.add_row(name, str(level), f"{row['images_per_second']:.1f}", *cells, batch)
    console = Console()
    console.print(table)
    console.print(
        f"{share:.0%} go on: {summary['times_large_alone']:.2f} times the large model's images a second, "
        f"{summary['of_what_towers_allow']:.0%} of the {allowed:.1f} that the towers' times allow"
    )
    write_results(output, {".json": summary})
    if arriving:
        said = (f"{name} p50 {steady[name]['p50']:.1f}, p99 {steady[name]['p99']:.1f} ms" for name in arriving)
        console.print(f"{arrivals:.0f} requests a second, at random times: {'; '.join(said)}")
    return summary


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--small", default="ViT-B-32", show_default=True, help="open_clip model (random weights) or vilu-tiny.")
@click.option("--large", default="ViT-L-14", show_default=True, help="The same for the second stage.")
@click.option("--share", type=click.FloatRange(0, 1), default=0.25, show_default=True, help="Of images that go on.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Turns of every load.")
@click.option("--seconds", type=float, default=8.0, show_default=True, help="Of one load in one round, at least.")
@click.option("--precision", default="float32", show_default=True, help="Of both towers, where they are exported here.")
@click.option("--quick", is_flag=True, help="Fewer images to check; one round with 16 requests at a time.")
@click.option("--repository", type=click.Path(path_type=Path, exists=True), help="A cascade's export, instead.")
@click.option("--keep", type=click.Path(path_type=Path), help="Folder to keep the export in, for --repository.")
@click.option("--images", type=click.Choice(["digits", "shapes"]), help="Embedded images in the place of photographs.")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Results without suffix.  [default: bench/results/cascade-cpu]"
)
def main(**given: Any) -> None:
    """Measure a cascade through the real server."""
    try:
        run(**given)
    except UserError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
