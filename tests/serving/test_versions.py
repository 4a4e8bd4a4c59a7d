"""Versions beside each other, one served, and the way back; with the real server."""

import asyncio
import json
import shutil
import threading
import time
from dataclasses import replace
from typing import Any

import onnx_ir
import pytest
from click.testing import CliRunner

from vilu import UserError, save_checkpoint
from vilu.cli import group
from vilu.export import export, versions
from vilu.export.model_config import save_config
from vilu.export.threshold import add_threshold
from vilu.serving import AccessDenied, AsyncClient, Client, RequestRefused, Server
from vilu.serving.about import load_config
from vilu.serving.access import Access

CONTROL = "control-token-4567"
PUT = "class_sets/sets/pets@1"  # a class set that was put while a server ran


@pytest.fixture(scope="module")
def two(repository, clip, checkpoint, tmp_path_factory):
    """The shared export with a second version, of another threshold, beside its first."""
    root = tmp_path_factory.mktemp("versions") / "model_repository"
    shutil.copytree(repository, root, ignore=shutil.ignore_patterns("sets"))  # that other tests put there
    (root / PUT).parent.mkdir()
    (root / PUT).write_bytes(b"{}")
    export(replace(checkpoint, threshold=1.0), root, clip=clip, max_batch_size=8, version=2)
    return root


@pytest.fixture
def copy(two, tmp_path):
    return shutil.copytree(two, tmp_path / "model_repository")


def files(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.suffix != ".pyc"}


def accepted(root, photos, log):
    with Server(root, log=log) as server, Client(server.grpc_url) as client:
        return [answer.raise_for_error().accept for answer in client.ask(photos)]


def test_a_version_is_added_beside_the_old_one(two, repository):
    assert versions.versions(two) == [1, 2]
    assert versions.served(two) == 2
    assert versions.served(repository) == 1
    before, after = files(repository), files(two)
    assert after[PUT] == b"{}"
    kept = [name for name in before if "/1/" in name]
    assert kept
    assert all(after[name] == before[name] for name in kept)
    assert {name.split("/")[1] for name in after if name.count("/") > 1 and name != PUT} == {"1", "2"}


def test_there_and_back_again(copy, repository, photos, tmp_path):
    assert all(accepted(copy, photos, tmp_path / "log"))
    both = files(copy)
    changed = versions.use(copy, 1)
    assert not set(changed) & {"preprocess", "clip_image", "clip_text"}
    assert {"vilu_head", "vilu_embeddings", "vilu_full"} <= set(changed)
    assert versions.served(copy) == 1
    first = files(repository)
    assert {name: data for name, data in files(copy).items() if name in versions.ABOUT} == {
        name: first[name] for name in versions.ABOUT
    }
    assert not all(accepted(copy, photos, tmp_path / "log"))
    versions.use(copy, 2)
    assert files(copy) == both


class Asking(threading.Thread):
    """Asks two photos again and again until it is stopped: the pairs of decisions, and every error."""

    def __init__(self, url, photos, **asked):
        super().__init__()
        self.url, self.photos, self.asked = url, photos, asked
        self.ended = threading.Event()
        self.seen, self.errors = [], []

    def run(self):
        with Client(self.url) as client:
            while not self.ended.is_set():
                try:
                    answers = [a.raise_for_error() for a in client.ask(self.photos, **self.asked)]
                    self.seen.append(tuple((a.failure_probability, a.accept) for a in answers))
                except UserError as error:
                    self.errors.append(str(error))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.join()


@pytest.mark.server
@pytest.mark.parametrize("scheme", ["grpc", pytest.param("http", marks=pytest.mark.slow)])
def test_a_running_server_changes_version_there_and_back_again(copy, photos, tmp_path, scheme):
    """Under load: every answer is whole, none is lost, and the last ones are of the version asked for."""
    threshold = {1: 0.5, 2: 1.0}
    with Server(copy, log=tmp_path / "log", access=Access(control_token=CONTROL)) as server:
        url = server.grpc_url if scheme == "grpc" else server.http_url
        asked: tuple[dict[str, Any], ...] = ({}, {"details": True}, {"labels": ["red circle", "blue star"]})
        asking = [Asking(url, photos[:2], **options) for options in asked]
        with asking[0], asking[1], asking[2], Client(url) as client:
            for version in (1, 2, 1):
                changed = client.run(versions.switch, copy, version, control_token=CONTROL)
                assert "vilu_head" in changed
                assert not {"clip_image", "preprocess"} & set(changed)
                assert versions.served(copy) == version
                assert client.run(AsyncClient.versions, "vilu_head") == [version]
                for labels in (None, ["red circle", "blue star"]):
                    for answer in client.ask(photos[:4], labels, details=True):
                        assert answer.raise_for_error().accept == (answer.failure_probability < threshold[version])
                time.sleep(0.3)
        for one in asking:
            assert not one.errors
            assert {accept for pair in one.seen for _, accept in pair} == {True, False}
            # Both versions have the same head: what may differ is the decision, and that by whole requests.
            decisions = {tuple(p < t for p, _ in pair) for pair in one.seen for t in threshold.values()}
            assert {tuple(accept for _, accept in pair) for pair in one.seen} <= decisions


@pytest.mark.server
def test_a_change_that_fails_leaves_the_version_before(copy, photos, tmp_path):
    arguments = ["versions", str(copy), "--use", "1", "--live", "--url"]
    with (
        Server(copy, log=tmp_path / "log", access=Access(control_token=CONTROL)) as server,
        Client(server.grpc_url) as client,
    ):
        before = files(copy)

        def same():
            assert files(copy) == before
            assert all(answer.raise_for_error().accept for answer in client.ask(photos))
            assert client.run(AsyncClient.versions, "vilu_full") == [2]

        for token in ((), ("--control-token", "another-control-token")):
            with pytest.raises(AccessDenied, match="control token"):
                group.main([*arguments, server.grpc_url, *token], standalone_mode=False)
            same()
        broken = copy / "vilu_head" / "1" / "ragged.onnx"
        whole = broken.read_bytes()
        broken.write_bytes(whole[: len(whole) // 2])
        before = files(copy)
        with pytest.raises(RequestRefused, match="version 2 is served as before"):
            client.run(versions.switch, copy, 1, control_token=CONTROL)
        same()
        broken.write_bytes(whole)
        with (copy / "preprocess" / "1" / "model.py").open("a") as file:
            file.write("# another\n")
        before = files(copy)
        with pytest.raises(UserError, match="differ in preprocess"):
            client.run(versions.switch, copy, 1, control_token=CONTROL)
        with pytest.raises(UserError, match="has no version 7"):
            client.run(versions.switch, copy, 7, control_token=CONTROL)
        same()
        with pytest.raises(UserError, match="--live needs --use"):
            group.main(["versions", str(copy), "--live"], standalone_mode=False)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_a_version_that_cannot_be_added(two, clip, checkpoint, version):
    before = files(two)
    with pytest.raises(UserError, match=r"has a version|at least 1"):
        export(checkpoint, two, clip=clip, version=version)
    assert files(two) == before


def test_a_live_change_to_a_version_with_fewer_outputs_is_refused(copy):
    """A request under way would ask the new step for an output that only the old one has."""

    class Running(AsyncClient):
        async def versions(self, model):
            return [2]

    async def change():
        async with Running() as client:
            await versions.switch(client, copy, 1)

    path = copy / "vilu" / "1" / "config.pbtxt"
    config = load_config(path)
    kept = [output for output in config.output if output.name != "OUTLIER_SCORE"]
    assert len(kept) == len(config.output) - 1
    del config.output[:]
    config.output.extend(kept)
    save_config(path.parent, config)
    before = files(copy)
    with pytest.raises(UserError, match=r"version 1 does not give OUTLIER_SCORE as version 2 does: .* restart"):
        asyncio.run(change())
    assert files(copy) == before


def test_another_set_of_models_is_refused(copy, repository, tmp_path):
    staging = shutil.copytree(repository, tmp_path / "staging")
    shutil.rmtree(copy / "vilu_full")
    before = files(copy)
    with pytest.raises(UserError, match="other models"):
        versions.add(staging, copy, 3)
    assert files(copy) == before


def test_the_command(copy, tmp_path):
    document = json.loads(CliRunner().invoke(group, ["versions", str(copy), "--json"]).stdout)
    assert document == {"repository": str(copy), "versions": [1, 2], "served": 2, "changes": None}
    listed = CliRunner().invoke(group, ["versions", str(copy)])
    assert listed.output.splitlines() == ["1", "2 served"]
    CliRunner().invoke(group, ["versions", str(copy), "--use", "1"])
    listed = CliRunner().invoke(group, ["versions", str(copy)])
    assert listed.output.splitlines() == ["1 served", "2"]
    before = files(copy)
    for arguments, told in ((["--use", "7"], "has no version 7; it has 1, 2"), ([], "not a repository")):
        folder = copy if arguments else tmp_path
        with pytest.raises(UserError, match=told):
            group.main(["versions", str(folder), *arguments], standalone_mode=False)
    assert files(copy) == before


@pytest.mark.slow
def test_another_threshold_is_a_version_that_shares_the_towers(repository, photos, tmp_path, checkpoint):
    """It is rolled out while the server answers, without an export, and the way back is --use."""
    root = shutil.copytree(repository, tmp_path / "model_repository", ignore=shutil.ignore_patterns("sets"))
    with pytest.raises(UserError, match="another head"):
        add_threshold(root, 0.5, checkpoint="0" * 64)
    with pytest.raises(UserError, match="in \\[0, 1\\]"):
        add_threshold(root, 2)
    assert versions.versions(root) == [1]
    access = Access(control_token=CONTROL)
    with Server(root, log=tmp_path / "log", access=access) as server, Client(server.grpc_url) as client:

        def change(*options):
            arguments = ["versions", str(root), *options, "--live", "--url", server.grpc_url]
            done = CliRunner().invoke(group, [*arguments, "--control-token", CONTROL], standalone_mode=False)
            assert done.exception is None, done.exception

        def decided():
            for labels in (None, ["zero", "one"]):
                yield {answer.raise_for_error().accept for answer in client.ask(photos, labels)}

        change("--threshold", "1.0")
        assert list(decided()) == [{True}, {True}]
        save_checkpoint(replace(checkpoint, threshold=0.0), tmp_path / "none.safetensors")
        change("--threshold", str(tmp_path / "none.safetensors"))
        assert list(decided()) == [{False}, {False}]
        assert {answer.class_set for answer in client.ask(photos[:1], class_set="default")} == {"default@3"}
        change("--use", "1")
        assert client.ask(photos[:1], class_set="default")[0].class_set == "default@1"
    first, third = (onnx_ir.load(root / "vilu_full" / version / "model.onnx") for version in "13")
    limits = [next(v for v in m.graph.outputs if v.name == "ACCEPT").producer().inputs[1] for m in (first, third)]
    assert [float(limit.const_value.numpy()) for limit in limits] == pytest.approx([0.505, 0.0])
    assert json.loads((root / "vilu" / "3" / "parity.json").read_text())["threshold"] == 0.0
