"""Questions to a running server whose every answer is checked against the eager model, over gRPC and HTTP.

A question is serialised once and asked many times; its answer is compared as it comes. A Ledger holds what became of
every request that was sent, so that none can be lost unseen.
"""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import grpc
import numpy as np
import torch
from loadgen import INFER
from PIL import Image
from tritonclient import http as http_api
from tritonclient.grpc import service_pb2 as pb

from vilu import Checkpoint
from vilu.clip import Clip
from vilu.preprocess.image import decode
from vilu.serving.client import OUTPUTS
from vilu.tiny import data

BUDGET = 1e-4  # of a float32 export: probabilities and embeddings against the eager model's
TIE = 1e-5  # candidates whose probabilities are nearer than this may be told either way
TIMEOUT = 60.0
TYPES = {"f": "FP32", "u": "UINT8", "i": "INT64", "O": "BYTES"}
# Of mixed traffic: how often each kind of question is asked.
MIX = {"vilu": 38, "vilu_open": 20, "embeddings": 8, "embeddings+TEXT": 8, "embeddings+LABELS": 6, "vilu_full": 10,
       "clip_image": 3, "preprocess": 4, "clip_text": 2, "vilu_text": 1}  # fmt: skip
GUARDED = {kind: weight for kind, weight in MIX.items() if kind not in ("clip_image", "preprocess", "clip_text")}


@dataclass
class Answers:
    """The eager model's over one candidate set, for every image: label index, the next one where they tie, the two
    probabilities."""

    names: Sequence[str]
    rows: np.ndarray  # (K, D)
    index: np.ndarray
    second: np.ndarray  # index where there is no tie
    confidence: np.ndarray
    failure: np.ndarray


class World:
    """Images, and what the eager model says of them over the class set and over candidates of a request's own.

    Args:
        images: encoded.
        sets: candidates; those of equal size may share a request.
    """

    def __init__(self, clip: Clip, checkpoint: Checkpoint, images: Sequence[bytes], sets: Sequence[Sequence[str]]):
        assert checkpoint.class_set is not None
        self.clip, self.head, self.threshold = clip, checkpoint.head, np.float32(checkpoint.threshold)
        self.templates = checkpoint.class_set.templates
        self.images = list(images)
        self.pixels = np.stack([decode(image, clip.transform) for image in images])
        parts = [clip.embed_images([self.pixels[i : i + 64]]) for i in range(0, len(images), 64)]
        self.embedding = torch.cat(parts)
        self.closed = self.answers(checkpoint.class_set.names, checkpoint.class_set.text_embeddings)
        self.open = [self.answers(names, clip.class_set(names, self.templates).text_embeddings) for names in sets]

    def answers(self, names: Sequence[str], rows: torch.Tensor) -> Answers:
        scaled = self.clip.spec.logit_scale * self.embedding @ rows.T
        p, order = torch.softmax(scaled, dim=1).sort(dim=1, descending=True)
        other = min(1, len(names) - 1)
        tied = p[:, 0] - p[:, other] < TIE
        failure = self.head.failure_probability(self.embedding, rows)
        columns = order[:, 0], torch.where(tied, order[:, other], order[:, 0]), p[:, 0], failure
        return Answers(list(names), rows.numpy(), *(column.numpy() for column in columns))


def digits_and_shapes(count: int, seed: int = 0) -> list[bytes]:
    """`count` distinct images of both embedded worlds (split test), as JPEG, PNG and WebP of many sizes."""
    digits = data.digits("test", seed).images
    drawn = data.shapes("test", count, seed).images
    draw = np.random.default_rng(seed)
    made = []
    for i in range(count):
        image = Image.fromarray(digits[i // 2 % len(digits)] if i % 2 else drawn[i])
        image = image.resize((int(draw.integers(32, 320)), int(draw.integers(32, 320))), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        kind = ("JPEG", "PNG", "WEBP")[i % 3]
        image.save(buffer, kind, **({} if kind == "PNG" else {"quality": int(draw.integers(60, 96))}))
        made.append(buffer.getvalue())
    return made


def label_sets(count: int, seed: int = 0, largest: int = 40) -> list[list[str]]:
    """`count` candidate sets of 1 to `largest` labels, drawn from one vocabulary, some beyond ASCII; many sets share a
    size."""
    draw = np.random.default_rng(seed)
    words = [f"handwritten {word}" for word in data.DIGITS]
    words += [f"{z} {c} {s}" for z in data.SIZES for c in data.COLOURS for s in data.SHAPES]
    words += ["a cat", "ein Bär", "кот", "猫", "naïve café", "x" * 200]
    sizes = [size for size in (1, 2, 3, 5, 10, 20, largest) if size <= largest]
    return [[words[i] for i in draw.permutation(len(words))[: sizes[n % len(sizes)]]] for n in range(count)]


Check = Callable[[Mapping[str, bytes]], "str | None"]


@dataclass(frozen=True)
class Question:
    """kind: the word in MIX; body: the serialised request; json: HTTP's length of the JSON before the tensors."""

    kind: str
    model: str
    http: bool
    body: bytes
    json: int
    images: int
    check: Check


def question(
    kind: str,
    model: str,
    tensors: Mapping[str, np.ndarray],
    outputs: Sequence[str],
    check: Check,
    *,
    http: bool = False,
    parameters: Mapping[str, str] | None = None,
) -> Question:
    images = len(next(iter(tensors.values())))
    if http:
        inputs = []
        for name, value in tensors.items():
            inputs.append(http_api.InferInput(name, list(value.shape), TYPES[value.dtype.kind]))
            inputs[-1].set_data_from_numpy(value)
        wanted = [http_api.InferRequestedOutput(name) for name in outputs]
        body, length = http_api.InferenceServerClient.generate_request_body(
            inputs, outputs=wanted, parameters=dict(parameters or {})
        )
        return Question(kind, model, True, body, length or 0, images, check)
    message = pb.ModelInferRequest(model_name=model)
    for name, value in tensors.items():
        message.inputs.add(name=name, datatype=TYPES[value.dtype.kind], shape=value.shape)
        message.raw_input_contents.append(raw(value))
    for name in outputs:
        message.outputs.add(name=name)
    for key, word in (parameters or {}).items():
        message.parameters[key].string_param = word
    return Question(kind, model, False, bytes(message.SerializeToString()), 0, images, check)


def raw(value: np.ndarray) -> bytes:
    """A tensor as Triton's bytes: strings each after their length."""
    if value.dtype != object:
        return value.tobytes()
    return b"".join(len(word).to_bytes(4, "little") + word for word in value.ravel())


def strings(value: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(value):
        size = int.from_bytes(value[at : at + 4], "little")
        found.append(value[at + 4 : at + 4 + size])
        at += 4 + size
    return found


def words(rows: Sequence[Sequence[str]]) -> np.ndarray:
    """(N, K) labels as a BYTES tensor."""
    made = np.empty((len(rows), len(rows[0])), dtype=object)
    for i, row in enumerate(rows):
        made[i] = [word.encode() for word in row]
    return made


class Asking:
    """Makes questions over a world.

    Args:
        most: images in a request at most.
    """

    def __init__(self, world: World, most: int) -> None:
        self.world, self.most = world, most
        sizes = defaultdict(list)
        for answers in world.open:
            sizes[len(answers.names)].append(answers)
        self.by_size = list(sizes.values())

    def mixed(self, count: int, seed: int = 0, mix: Mapping[str, int] = MIX, http: float = 0.25) -> list[Question]:
        draw = np.random.default_rng(seed)
        kinds, weights = list(mix), np.array(list(mix.values()), float)
        return [
            self.one(str(kind), draw, http=draw.random() < http)
            for kind in draw.choice(kinds, size=count, p=weights / weights.sum())
        ]

    def one(self, kind: str, draw: np.random.Generator, *, http: bool = False) -> Question:
        world = self.world
        images = 1 if draw.random() < 0.6 else int(draw.integers(1, self.most + 1))
        chosen = draw.integers(len(world.images), size=images)
        if kind == "preprocess":
            check = same_bytes("PIXELS", world.pixels[chosen])
            return question(kind, kind, {"IMAGE": self.encoded(chosen)}, ["PIXELS"], check, http=http)
        if kind == "clip_image":
            check = near("IMAGE_EMBEDDING", world.embedding.numpy()[chosen])
            return question(kind, kind, {"PIXELS": world.pixels[chosen]}, ["IMAGE_EMBEDDING"], check, http=http)
        if kind in ("clip_text", "vilu_text"):
            answers = self.candidates(draw, 1)[0]
            some = draw.integers(len(answers.names), size=images)
            prompts = [world.templates[0].replace("{}", answers.names[i]) for i in some]
            tokens = world.clip.tokenize(prompts)
            check = near("TEXT_EMBEDDING", world.clip.encode_tokens(tokens).numpy())
            first = {"TOKENS": tokens.numpy()} if kind == "clip_text" else {"TEXT": words([[one] for one in prompts])}
            return question(kind, kind, first, ["TEXT_EMBEDDING"], check, http=http)
        if kind in ("vilu", "vilu_full", "embeddings"):
            tensors: dict[str, np.ndarray]
            if kind == "vilu":
                tensors = {"IMAGE": self.encoded(chosen)}
            elif kind == "vilu_full":
                tensors = {"PIXELS": world.pixels[chosen]}
            else:
                tensors = {"IMAGE_EMBEDDING": self.embedded(chosen, draw)}
            check = self.answer([world.closed] * images, chosen, named=True)
            return question(kind, MODELS.get(kind, kind), tensors, OUTPUTS, check, http=http)
        # Each image has candidates of its own, as many as the others'.
        sets = self.candidates(draw, images)
        if kind == "embeddings+TEXT":
            scales = draw.uniform(0.1, 10, (images, len(sets[0].names), 1)).astype(np.float32)
            extra = {"TEXT_EMBEDDINGS": np.stack([answers.rows for answers in sets]) * scales}
        else:
            extra = {"LABELS": words([answers.names for answers in sets])}
        first = {"IMAGE": self.encoded(chosen)} if kind == "vilu_open" else {
            "IMAGE_EMBEDDING": self.embedded(chosen, draw)}  # fmt: skip
        check = self.answer(sets, chosen, named=kind != "embeddings+TEXT")
        return question(kind, MODELS.get(kind, kind), first | extra, OUTPUTS, check, http=http)

    def candidates(self, draw: np.random.Generator, images: int) -> list[Answers]:
        peers = self.by_size[int(draw.integers(len(self.by_size)))]
        return [peers[int(i)] for i in draw.integers(len(peers), size=images)]

    def encoded(self, chosen: np.ndarray) -> np.ndarray:
        made = np.empty((len(chosen), 1), dtype=object)
        made[:, 0] = [self.world.images[i] for i in chosen]
        return made

    def embedded(self, chosen: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """Lengths differ: only directions may matter."""
        scale = draw.uniform(0.1, 10, (len(chosen), 1))
        return (self.world.embedding.numpy()[chosen] * scale).astype(np.float32)

    def answer(self, sets: Sequence[Answers], chosen: np.ndarray, *, named: bool) -> Check:
        pairs = list(zip(sets, chosen, strict=True))
        index, second = (np.array([getattr(a, name)[i] for a, i in pairs]) for name in ("index", "second"))
        failure, confidence = (
            np.array([getattr(a, name)[i] for a, i in pairs], np.float64) for name in ("failure", "confidence")
        )
        labels = [[name.encode() if named else b"" for name in answers.names] for answers in sets]
        threshold = self.world.threshold

        def check(got: Mapping[str, bytes]) -> str | None:
            told = np.frombuffer(got["CLASS_INDEX"], np.int32)
            p = np.frombuffer(got["FAILURE_PROBABILITY"], np.float32)
            if len(told) != len(index) or len(p) != len(index):
                return f"{len(told)} answers to {len(index)} images"
            if not ((told == index) | (told == second)).all():
                return f"CLASS_INDEX {told.tolist()} for {index.tolist()}"
            if strings(got["LABEL"]) != [row[i] for row, i in zip(labels, told, strict=True)]:
                return "LABEL is not CLASS_INDEX's"
            if not (worst := np.abs(p - failure).max()) <= BUDGET:
                return f"FAILURE_PROBABILITY off by {worst:.2g}"
            worst = np.abs(np.frombuffer(got["CONFIDENCE"], np.float32) - confidence).max()
            if not worst <= BUDGET:
                return f"CONFIDENCE off by {worst:.2g}"
            if not (np.frombuffer(got["ACCEPT"], np.bool_) == (p < threshold)).all():
                return "ACCEPT is not FAILURE_PROBABILITY's"
            return None

        return check


MODELS = dict.fromkeys(("embeddings", "embeddings+TEXT", "embeddings+LABELS"), "vilu_embeddings")


def same_bytes(name: str, expected: np.ndarray) -> Check:
    wanted = expected.tobytes()
    return lambda got: None if got[name] == wanted else f"{name} differs"


def near(name: str, expected: np.ndarray) -> Check:
    def check(got: Mapping[str, bytes]) -> str | None:
        rows = np.frombuffer(got[name], np.float32)
        if rows.size != expected.size:
            return f"{name} has {rows.size} values, not {expected.size}"
        worst = np.abs(rows - expected.ravel()).max()
        return None if worst <= BUDGET else f"{name} off by {worst:.2g}"

    return check


@dataclass
class Ledger:
    """What became of every request: sent = right + wrong + refused, or some were lost.

    refused: code -> number; wrong: what was told, the first few; latencies: seconds of right answers by (kind,
    protocol), from when they were due; refusals: seconds of the refused, from when they were sent.
    """

    sent: int = 0
    right: int = 0
    images: int = 0
    wrong: list[str] = field(default_factory=list)
    wrongs: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    latencies: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    refusals: list[float] = field(default_factory=list)
    told: Counter[str] = field(default_factory=Counter)

    @property
    def lost(self) -> int:
        return self.sent - self.right - self.wrongs - self.refused.total()

    def all(self) -> list[float]:
        return [seconds for part in self.latencies.values() for seconds in part]

    def add(self, other: Ledger) -> None:
        self.sent, self.right, self.images = (
            self.sent + other.sent,
            self.right + other.right,
            self.images + other.images,
        )
        self.wrongs += other.wrongs
        self.wrong += other.wrong[: 10 - len(self.wrong)]
        self.refused += other.refused
        self.told += other.told
        self.refusals += other.refusals
        for key, values in other.latencies.items():
            self.latencies[key] += values


class Asker:
    """Sends questions and enters what came of them. One per event loop; use `asker`."""

    def __init__(self, channel: Any, session: aiohttp.ClientSession, http_url: str, timeout: float) -> None:
        self._call = channel.unary_unary(INFER)
        self._session, self._http, self._timeout = session, http_url, timeout

    async def ask(self, asked: Question, ledger: Ledger, due: float | None = None) -> None:
        sent = time.perf_counter()
        ledger.sent += 1
        try:
            code, got = await (self._over_http(asked) if asked.http else self._over_grpc(asked))
        except asyncio.CancelledError:
            return  # stays in `lost`
        now = time.perf_counter()
        if isinstance(got, str):
            ledger.refused[code] += 1
            ledger.refusals.append(now - sent)
            ledger.told[got[:120]] += 1
            return
        problem = "an output is missing"
        try:
            told = asked.check(got)
        except KeyError:
            told = problem
        if told is None:
            ledger.right += 1
            ledger.images += asked.images
            seconds = now - (sent if due is None else due)
            ledger.latencies[asked.kind, "HTTP" if asked.http else "gRPC"].append(seconds)
        else:
            ledger.wrongs += 1
            if len(ledger.wrong) < 10:
                ledger.wrong.append(f"{asked.kind}: {told}")

    async def _over_grpc(self, asked: Question) -> tuple[str, Mapping[str, bytes] | str]:
        try:
            answer = pb.ModelInferResponse.FromString(await self._call(asked.body, timeout=self._timeout))
        except grpc.aio.AioRpcError as error:
            return str(error.code().name), str(error.details())
        names = [output.name for output in answer.outputs]
        return "OK", dict(zip(names, answer.raw_output_contents, strict=True))

    async def _over_http(self, asked: Question) -> tuple[str, Mapping[str, bytes] | str]:
        headers = {"Inference-Header-Content-Length": str(asked.json)} if asked.json else {}
        try:
            async with self._session.post(
                f"{self._http}/v2/models/{asked.model}/infer", data=asked.body, headers=headers
            ) as reply:
                body = await reply.read()
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            return type(error).__name__, str(error)
        if reply.status != 200:
            return str(reply.status), body.decode(errors="replace")
        length = int(reply.headers.get("Inference-Header-Content-Length", len(body)))
        found, at = {}, length
        for output in json.loads(body[:length])["outputs"]:
            size = output["parameters"]["binary_data_size"]
            found[output["name"]] = body[at : at + size]
            at += size
        return "OK", found


@asynccontextmanager
async def asker(
    grpc_url: str, http_url: str, timeout: float = TIMEOUT, *, keep_alive: bool = True
) -> AsyncIterator[Asker]:
    options = [("grpc.max_receive_message_length", -1)]
    limit = aiohttp.TCPConnector(limit=0, force_close=not keep_alive)
    async with (
        grpc.aio.insecure_channel(grpc_url, options=options) as channel,
        aiohttp.ClientSession(connector=limit, timeout=aiohttp.ClientTimeout(total=timeout)) as session,
    ):
        yield Asker(channel, session, http_url, timeout)


async def closed(by: Asker, questions: Iterable[Question], concurrency: int, ledger: Ledger) -> None:
    """All questions, `concurrency` of them always in flight."""
    turn: Iterator[Question] = iter(questions)

    async def worker() -> None:
        for asked in turn:
            await by.ask(asked, ledger)

    await asyncio.gather(*(worker() for _ in range(concurrency)))


async def opened(by: Asker, questions: Sequence[Question], rate: float, ledger: Ledger, seed: int = 0) -> None:
    """All questions, each at its own random (Poisson) time at `rate` a second, whatever became of the others."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, len(questions))
    begin = time.perf_counter()
    tasks = []
    for asked, due in zip(questions, begin + np.cumsum(gaps), strict=True):
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(by.ask(asked, ledger, due)))
    await asyncio.gather(*tasks)
