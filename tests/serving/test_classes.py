"""Class sets put, replaced and removed while the real server answers; every answer is the eager model's for its set."""

import base64
import functools
import json
import os
import shutil
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tests.serving.helpers import agree, vilu
from tests.support.embeddings import unit_rows
from vilu import UserError
from vilu.preprocess.image import decode
from vilu.serving import AccessDenied, Answer, Client, RequestRefused, Scorer, Server
from vilu.serving.access import Access
from vilu.serving.classes import _change, get_set, list_sets, put_set, read_set, remove_set

pytestmark = pytest.mark.server
CONTROL = "control-token-4567"
TOLERANCE = 1e-4
DIM = 128
NAMES = ("red circle", "blue star", "a cat", "smörgåsbord")
TEMPLATES = ("a photo of a {}.", "a drawing of the {}")


@pytest.fixture(scope="module")
def open_repository(repository, tmp_path_factory):
    return shutil.copytree(repository, tmp_path_factory.mktemp("classes") / "model_repository")


def start(repository, log):
    return Server(repository, access=Access(control_token=CONTROL), log=log)


@pytest.fixture(scope="module")
def steered(open_repository, tmp_path_factory):
    with start(open_repository, tmp_path_factory.mktemp("log") / "log") as server:
        yield server


@pytest.fixture(scope="module")
def expected(clip, checkpoint):
    """Image bytes and text embeddings (K, D) to (class index, confidence, failure probability) by the eager model."""

    def answer(image, t):
        v = clip.embed_images([decode(image, clip.transform)[None]])
        p = torch.softmax(clip.spec.logit_scale * v @ t.T, dim=1)
        return int(p.argmax()), float(p.max()), float(checkpoint.head.failure_probability(v, t))

    return answer


def same(answers, photos, names, t, expected, told):
    for answer, photo in zip(answers, photos, strict=True):
        index, confidence, failure = expected(photo, t)
        assert answer.error is None
        assert (answer.label, answer.class_index, answer.class_set) == (names[index], index, told)
        assert answer.confidence == pytest.approx(confidence, abs=TOLERANCE)
        assert answer.failure_probability == pytest.approx(failure, abs=TOLERANCE)


def run(server, work, *arguments, url=None, **options):
    """One of the library's coroutines on a client of its own."""
    with Client(url or server.grpc_url, batch_size=8) as client:
        return client.run(work, *arguments, **options)


def put(server, name, names, t=None, **options):
    rows = None if t is None else np.asarray(t, np.float32)
    return run(server, put_set, name, names, text_embeddings=rows, control_token=CONTROL, **options)


def test_a_set_is_put_listed_replaced_and_removed_by_the_command(steered, photos, clip, expected, eager, tmp_path):
    url = ("--url", steered.grpc_url)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(NAMES) + "\n\n", "utf-8")
    (tmp_path / "token").write_text(CONTROL)
    control = ("--control-token", f"@{tmp_path / 'token'}")
    first = vilu("classes", "put", "pets", names, *url, *control)
    assert (first.returncode, first.stdout) == (0, "pets@1: 4 classes, accepted below 0.505\n")
    t = clip.class_set(NAMES).text_embeddings
    for address in (steered.grpc_url, steered.http_url):
        with Client(address, batch_size=5) as client:
            same(client.ask(photos, class_set="pets"), photos, NAMES, t, expected, "pets@1")
            agree(client.ask(photos[:2], class_set="default"), photos[:2], eager)

    given = [part for template in TEMPLATES for part in ("--template", template)]
    more = vilu("classes", "put", "pets", names, *given, "--threshold", "0.1", "--url", steered.http_url, *control)
    assert more.stdout == "pets@2: 4 classes, accepted below 0.1\n"
    (tmp_path / "a.jpg").write_bytes(photos[0])
    asked = vilu("ask", tmp_path / "a.jpg", "--class-set", "pets", "--json", *url)
    (answer,) = json.loads(asked.stdout)
    index, _, failure = expected(photos[0], clip.class_set(NAMES, TEMPLATES).text_embeddings)
    assert (answer["label"], answer["class_set"], answer["accept"]) == (NAMES[index], "pets@2", False)
    assert answer["failure_probability"] == pytest.approx(failure, abs=TOLERANCE)

    listed = {row["name"]: row for row in json.loads(vilu("classes", "list", "--json", *url).stdout)}
    assert listed["pets"] == {
        "name": "pets", "version": 2, "classes": 4, "threshold": 0.1, "templates": list(TEMPLATES)
    }  # fmt: skip
    assert listed["default"]["classes"] == 10
    assert "pets" in vilu("classes", "list", *url).stdout
    assert run(steered, get_set, "pets").names == NAMES

    assert vilu("classes", "remove", "pets", *url, *control).stdout == "pets: removed\n"
    with Client(steered.grpc_url) as client:
        (gone,) = client.ask(photos[:1], class_set="pets")
        assert gone.error == "class set 'pets' is not served; there are default"
    assert put(steered, "pets", NAMES).version == 4  # versions go on: an answer's name is never another set's
    run(steered, remove_set, "pets", control_token=CONTROL)


def change_of(**change):
    """A change as `put_set` sends it, with something wrong in it."""
    rows = np.ones((2, DIM), "<f4")
    rows[1, 0] = 5
    good = {"put": "kept", "names": ["a", "b"], "templates": ["a {}"], "threshold": None, "fingerprint": ""}
    rows = change.pop("rows", rows)
    return good | {"text_embeddings": base64.b64encode(rows.astype("<f4").tobytes()).decode()} | change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"names": ["a", "a"]}, r"class name 2 \('a'\) repeats class name 1"),
        ({"names": ["a", " "]}, "class name 2 is empty"),
        ({"names": ["a"], "rows": np.ones((1, DIM))}, "at least two classes, found only 'a'"),
        ({"names": ["Caf\u00e9", "cafe\u0301"]}, "is the same to CLIP's tokenizer as class name 1"),
        ({"rows": np.ones((2, DIM))}, "has the same text embedding as class name 1"),
        ({"names": []}, "no class names"),
        ({"names": "ab"}, "no class names"),
        ({"names": ["a", 7]}, "class name 2 is empty"),
        ({"names": ["a", "\ud800"]}, "class name 2 is not UTF-8"),
        ({"names": ["a", "b" * 257]}, "class name 2 has 257 bytes, the limit is 256"),
        ({"names": list(map(str, range(100_001)))}, "100001 class names, the limit is 100000"),
        ({"rows": np.full((2, DIM), np.nan)}, "text_embeddings holds a value that is not finite"),
        ({"rows": np.zeros((2, DIM))}, "text_embeddings holds a row of zeros"),
        ({"rows": np.ones((2, DIM - 1))}, "embeddings of 127 numbers each, 128 are needed"),
        ({"text_embeddings": "no base64!"}, "not base64"),
        ({"text_embeddings": 7}, "not base64"),
        ({"fingerprint": "00" * 32}, "another CLIP's"),
        ({"threshold": 2}, "threshold 2 is not between 0 and 1"),
        ({"threshold": float("nan")}, "threshold nan is not between"),
        ({"templates": ["no place"]}, "must hold exactly one"),
        ({"put": "default"}, "this name is taken"),
        ({"put": "open"}, "this name is taken"),
        ({"put": "../../etc/passwd"}, "1 to 64 of a-z"),
        ({"put": "A"}, "1 to 64 of a-z"),
        ({"put": "a@1"}, "1 to 64 of a-z"),
        ({"put": "a" * 65}, "1 to 64 of a-z"),
        ({"put": None}, "1 to 64 of a-z"),
    ],
)
def test_a_bad_set_is_refused_in_one_line_and_the_old_one_stays(steered, photos, change, told):
    before = {one.name: one.version for one in run(steered, list_sets)}
    if "kept" not in before:
        before["kept"] = put(steered, "kept", ["one", "two"], unit_rows(2, DIM, seed=5)).version
    with pytest.raises(RequestRefused, match=told) as caught:
        run(steered, _change, change_of(**change), CONTROL)
    assert "\n" not in str(caught.value)
    assert "model.py" not in str(caught.value)
    assert {one.name: one.version for one in run(steered, list_sets)} == before
    with Client(steered.grpc_url) as client:
        (answer,) = client.ask(photos[:1], class_set="kept")
    assert answer.class_set == f"kept@{before['kept']}"
    assert answer.label in ("one", "two")


def test_what_is_not_there_cannot_be_removed_and_without_the_token_nothing_changes(steered, server):
    with pytest.raises(RequestRefused, match="class set nothing is not served"):
        run(steered, remove_set, "nothing", control_token=CONTROL)
    for token in (None, "another-token-0123"):
        for url in (steered.grpc_url, steered.http_url):
            with pytest.raises(AccessDenied, match="needs the control token of"):
                run(steered, remove_set, "kept", control_token=token, url=url)
    with pytest.raises(AccessDenied, match="needs the control token of"):
        run(server, put_set, "mine", ["a", "b"], control_token=CONTROL)  # model control was not opened
    for bad, told in ((["a", "b", "a"], r"class name 3 \('a'\) repeats class name 1"), ([], "no class names")):
        with pytest.raises(UserError, match=told):
            put(steered, "mine", bad)


def test_a_set_outlives_the_server_that_took_it(open_repository, photos, expected, tmp_path):
    t = unit_rows(3, DIM, seed=11).float()
    with start(open_repository, tmp_path / "first") as server:
        version = put(server, "lasting", ("x", "y", "z"), t, threshold=0.9).version
        server.stop(seconds=1)
    with start(open_repository, tmp_path / "second") as server, Client(server.grpc_url) as client:
        answers = client.ask(photos[:3], class_set="lasting")
        same(answers, photos[:3], ("x", "y", "z"), t, expected, f"lasting@{version}")
        assert all(answer.accept for answer in answers)  # by its own threshold
        # Its second file, from another CLIP's export, is not taken for one of this one's.
        folder = open_repository / "class_sets" / "sets"
        header, _, rows = (folder / f"lasting@{version}").read_bytes().partition(b"\n")
        stranger = json.dumps(json.loads(header) | {"fingerprint": "00"}).encode() + b"\n" + rows
        (folder / ".part").write_bytes(stranger)
        os.rename(folder / ".part", folder / f"lasting@{version + 1}")
        (answer,) = client.ask(photos[:1], class_set="lasting")
        assert "made with another CLIP" in answer.error
        assert "lasting" not in [one.name for one in run(server, list_sets)]
        (folder / f"lasting@{version + 1}").unlink()
        (answer,) = client.ask(photos[:1], class_set="lasting")
        assert answer.class_set == f"lasting@{version}"


def test_offline_answers_are_those_of_a_set_that_was_put(steered, open_repository, photos):
    put(steered, "offline", NAMES, threshold=0.5)
    with Client(steered.grpc_url, batch_size=8) as client:
        served = client.ask(photos[:8], class_set="offline")
    rows = Scorer(open_repository, class_set="offline").answers(photos[:8]).to_pylist()
    for row, answer in zip(rows, served, strict=True):
        assert row.pop("error") is answer.error is None
        assert row == {name: getattr(answer, name) for name in row}
    run(steered, remove_set, "offline", control_token=CONTROL)


def test_sets_and_candidates_of_ones_own_are_not_asked_for_together(steered, photos):
    with Client(steered.grpc_url) as client:
        (answer,) = client.ask(photos[:1], ["a", "b"], class_set="kept")
        assert answer.error == "give LABELS or class_set, not both"
        (answer,) = client.ask(photos[:1], class_set="../secret")
        assert answer.error.startswith("class set '../secret' is not served")


@pytest.mark.slow
def test_every_answer_is_of_one_whole_set_while_it_is_replaced(steered, photos, expected):
    """Sets of other names, sizes and thresholds follow each other; all that an answer says is of the one it names."""
    sizes = [2, 3, 12, 5]
    banks: dict[int, torch.Tensor] = {}
    thresholds: dict[int, float] = {}
    found: list[tuple[bytes, Answer]] = []
    errors: list[str] = []
    done = threading.Event()

    def replace(version):
        banks[version] = unit_rows(sizes[version % 4], DIM, seed=version).float()
        thresholds[version] = [0.0, 1.0][version % 2]
        names = [f"v{version} class {i}" for i in range(len(banks[version]))]
        assert put(steered, "moving", names, banks[version], threshold=thresholds[version]).version == version

    def ask(number):
        url = (steered.grpc_url, steered.http_url)[number % 2]
        with Client(url, batch_size=2) as client:
            while not done.is_set():
                photo = photos[(len(found) + number) % len(photos)]
                for answer in client.ask([photo, photo], class_set="moving", details=number < 2):
                    if answer.error:
                        errors.append(answer.error)
                    else:
                        found.append((photo, answer))

    replace(1)
    clients = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for client in clients:
        client.start()
    try:
        for version in range(2, 32):
            replace(version)
    finally:
        done.set()
        for client in clients:
            client.join()
    assert errors == []
    eager = functools.cache(lambda photo, version: expected(photo, banks[version]))
    seen = set()
    for photo, answer in found:
        version = int(answer.class_set.removeprefix("moving@"))
        index, confidence, failure = eager(photo, version)
        assert (answer.label, answer.class_index) == (f"v{version} class {index}", index)
        assert answer.confidence == pytest.approx(confidence, abs=TOLERANCE)
        assert answer.failure_probability == pytest.approx(failure, abs=TOLERANCE)
        assert answer.accept == (answer.failure_probability < thresholds[version])
        assert all(label.startswith(f"v{version} ") for label, _ in (*answer.top, *answer.concepts))
        assert len(answer.top) in (0, min(5, len(banks[version])))
        seen.add(version)
    assert len(seen) > 15
    kept = sorted(path.name for path in (steered.repository / "class_sets" / "sets").glob("moving@*"))
    assert kept == ["moving@29", "moving@30", "moving@31"]


def samples(server):
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=10) as reply:
        lines = [line for line in reply.read().decode().splitlines() if line.startswith("vilu_")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_answers_are_counted_by_class_set(steered, photos):
    put(steered, "counted", ["one", "two"], unit_rows(2, DIM, seed=3), threshold=0.0)

    def now():
        found = samples(steered)

        def total(*parts):
            return sum(value for row, value in found.items() if all(part in row for part in parts))

        return {
            "errors": total("vilu_decode_errors_total"),
            "strangers": total("nobody"),
            **{
                (name, key): total(f"vilu_{name}{{", f'class_set="{key}"')
                for name in ("answers_total", "rejected_total", "failure_probability_count")
                for key in ("default", "open", "counted")
            },
        }

    before = now()
    with Client(steered.grpc_url) as client:
        client.ask(photos[:3], class_set="counted")
        client.ask(photos[:2], ["a", "b"])
        client.ask(photos[:4], details=True)
        client.ask(photos[:4], class_set="nobody")
        client.ask([b"no image"])
    moved = {key: value - before[key] for key, value in now().items()}
    for key, count in (("default", 4), ("open", 2), ("counted", 3)):
        assert moved["answers_total", key] == moved["failure_probability_count", key] == count
    assert moved["rejected_total", "counted"] == 3
    assert (moved["errors"], moved["strangers"]) == (1, 0)  # a name that a stranger made up is no label


@pytest.fixture
def set_files(tmp_path):
    rows = np.random.default_rng(0).normal(size=(2, 4))
    np.savez(tmp_path / "a.npz", text_embeddings=rows, class_names=np.array(["cat", "dög"]), fingerprint="f")
    save_file(
        {"text_embeddings": rows}, tmp_path / "b.safetensors", {"class_names": '["cat", "dög"]', "fingerprint": "f"}
    )
    np.savez(tmp_path / "c.npz", text_embeddings=rows)
    (tmp_path / "c.txt").write_text("cat\ndög\n", "utf-8")
    return tmp_path, rows


@pytest.mark.parametrize("name", ["a.npz", "b.safetensors", "c.npz"])
def test_files_with_embeddings(set_files, name):
    folder, rows = set_files
    found = read_set(folder / name)
    assert (found.names, found.fingerprint) == (("cat", "dög"), "" if name == "c.npz" else "f")
    assert found.text_embeddings is not None
    np.testing.assert_array_equal(found.text_embeddings, rows.astype(np.float32))


def test_files_that_hold_no_class_set(tmp_path):
    (tmp_path / "gap.txt").write_text("a\n\nb\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 cut")
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 20)
    np.savez(tmp_path / "object.npz", text_embeddings=np.array([[{}]], dtype=object), class_names=["a"])
    np.savez(tmp_path / "nameless.npz", text_embeddings=np.ones((2, 3)))
    np.savez(tmp_path / "flat.npz", text_embeddings=np.ones(3), class_names=["a"])
    np.savez(tmp_path / "few.npz", text_embeddings=np.ones((2, 3)), class_names=["a"])
    for name, told in (
        ("gap.txt", "class name 2 is empty"),
        ("latin.txt", "cannot be read as UTF-8"),
        ("absent.txt", "cannot be read"),
        ("cut.npz", "cannot be read"),
        ("cut.safetensors", "cannot be read"),
        ("object.npz", "cannot be read"),
        ("nameless.npz", "no class_names"),
        ("flat.npz", "holds no text_embeddings"),
        ("few.npz", "1 names but"),
    ):
        with pytest.raises(UserError, match=told) as caught:
            read_set(Path(tmp_path / name))
        assert "\n" not in str(caught.value)
