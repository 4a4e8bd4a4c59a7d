"""Versions beside each other, one served, and the way back; with the real server."""

import shutil
from dataclasses import replace

import pytest
from click.testing import CliRunner

from vilu import UserError
from vilu.cli import group
from vilu.export import export, versions
from vilu.serving import Client, Server

PUT = "class_sets/sets/pets@1"  # a class set that was put while a server ran


@pytest.fixture(scope="module")
def two(repository, clip, checkpoint, tmp_path_factory):
    """The shared export with a second version, of another threshold, beside its first."""
    root = tmp_path_factory.mktemp("versions") / "model_repository"
    shutil.copytree(repository, root)
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


@pytest.mark.parametrize("version", [0, 1, 2])
def test_a_version_that_cannot_be_added(two, clip, checkpoint, version):
    before = files(two)
    with pytest.raises(UserError, match=r"has a version|at least 1"):
        export(checkpoint, two, clip=clip, version=version)
    assert files(two) == before


def test_another_set_of_models_is_refused(copy, repository, tmp_path):
    staging = shutil.copytree(repository, tmp_path / "staging")
    shutil.rmtree(copy / "vilu_full")
    before = files(copy)
    with pytest.raises(UserError, match="other models"):
        versions.add(staging, copy, 3)
    assert files(copy) == before


def test_the_command(copy, tmp_path):
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
