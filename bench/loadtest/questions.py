"""Questions to a running server, each with the check of its answer against the eager model, over gRPC and HTTP.

A question is serialised once and asked many times.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tritonclient import http as http_api

from bench.loadtest.wire import message, pack_strings, unpack_strings
from bench.loadtest.world import Answers, World
from vilu.serving.answers import OUTPUTS

BUDGET = 1e-4  # of a float32 export: probabilities and embeddings against the eager model's
TYPES = {"f": "FP32", "u": "UINT8", "i": "INT64", "O": "BYTES"}
# Of mixed traffic: how often each kind of question is asked.
MIX = {"vilu": 38, "vilu_open": 20, "embeddings": 8, "embeddings+TEXT": 8, "embeddings+LABELS": 6, "vilu_full": 10,
       "clip_image": 3, "preprocess": 4, "clip_text": 2, "vilu_text": 1}  # fmt: skip
GUARDED = {kind: weight for kind, weight in MIX.items() if kind not in ("clip_image", "preprocess", "clip_text")}
MODELS = dict.fromkeys(("embeddings", "embeddings+TEXT", "embeddings+LABELS"), "vilu_embeddings")
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


def make_question(
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
    sent = [(name, TYPES[value.dtype.kind], value.shape, raw_bytes(value)) for name, value in tensors.items()]
    request = message(model, sent, outputs)
    for key, word in (parameters or {}).items():
        request.parameters[key].string_param = word
    return Question(kind, model, False, bytes(request.SerializeToString()), 0, images, check)


def raw_bytes(value: np.ndarray) -> bytes:
    """A tensor as Triton's bytes: strings each after their length."""
    return value.tobytes() if value.dtype != object else pack_strings(*value.ravel())


def label_tensor(rows: Sequence[Sequence[str]]) -> np.ndarray:
    """(N, K) labels as a BYTES tensor."""
    made = np.empty((len(rows), len(rows[0])), dtype=object)
    for i, row in enumerate(rows):
        made[i] = [word.encode() for word in row]
    return made


class QuestionMaker:
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
            return make_question(kind, kind, {"IMAGE": self.encoded(chosen)}, ["PIXELS"], check, http=http)
        if kind == "clip_image":
            check = near("IMAGE_EMBEDDING", world.embedding.numpy()[chosen])
            return make_question(kind, kind, {"PIXELS": world.pixels[chosen]}, ["IMAGE_EMBEDDING"], check, http=http)
        if kind in ("clip_text", "vilu_text"):
            answers = self.candidates(draw, 1)[0]
            some = draw.integers(len(answers.names), size=images)
            prompts = [world.templates[0].replace("{}", answers.names[i]) for i in some]
            tokens = world.clip.tokenize(prompts)
            check = near("TEXT_EMBEDDING", world.clip.encode_tokens(tokens).numpy())
            first = (
                {"TOKENS": tokens.numpy()}
                if kind == "clip_text"
                else {"TEXT": label_tensor([[one] for one in prompts])}
            )
            return make_question(kind, kind, first, ["TEXT_EMBEDDING"], check, http=http)
        if kind in ("vilu", "vilu_full", "embeddings"):
            tensors: dict[str, np.ndarray]
            if kind == "vilu":
                tensors = {"IMAGE": self.encoded(chosen)}
            elif kind == "vilu_full":
                tensors = {"PIXELS": world.pixels[chosen]}
            else:
                tensors = {"IMAGE_EMBEDDING": self.embedded(chosen, draw)}
            check = self.answer([world.closed] * images, chosen, named=True)
            return make_question(kind, MODELS.get(kind, kind), tensors, OUTPUTS, check, http=http)
        # Each image has candidates of its own, as many as the others'.
        sets = self.candidates(draw, images)
        if kind == "embeddings+TEXT":
            scales = draw.uniform(0.1, 10, (images, len(sets[0].names), 1)).astype(np.float32)
            extra = {"TEXT_EMBEDDINGS": np.stack([answers.rows for answers in sets]) * scales}
        else:
            extra = {"LABELS": label_tensor([answers.names for answers in sets])}
        first = {"IMAGE": self.encoded(chosen)} if kind == "vilu_open" else {
            "IMAGE_EMBEDDING": self.embedded(chosen, draw)}  # fmt: skip
        check = self.answer(sets, chosen, named=kind != "embeddings+TEXT")
        return make_question(kind, MODELS.get(kind, kind), first | extra, OUTPUTS, check, http=http)

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
            answered = np.frombuffer(got["CLASS_INDEX"], np.int32)
            p = np.frombuffer(got["FAILURE_PROBABILITY"], np.float32)
            if len(answered) != len(index) or len(p) != len(index):
                return f"{len(answered)} answers to {len(index)} images"
            if not ((answered == index) | (answered == second)).all():
                return f"CLASS_INDEX {answered.tolist()} for {index.tolist()}"
            if unpack_strings(got["LABEL"]) != [row[i] for row, i in zip(labels, answered, strict=True)]:
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
