"""Class sets of several replicas, as the chart offers them: one folder for all, and a ConfigMap's folder."""

import shutil

import pytest

from tests.deploy.helpers import serving
from vilu.serving import Client
from vilu.serving.classes import put_set

pytestmark = [pytest.mark.server, pytest.mark.slow]
CONTROL = "control-token-4567"


def answer(replica, photo):
    """(class set and version, label) of an answer from the class set "pets"."""
    with Client(f"127.0.0.1:{replica.grpc}") as client:
        (found,) = client.ask([photo], class_set="pets")
    assert found.error is None
    return found.class_set, found.label


def put(replica, names):
    with Client(f"127.0.0.1:{replica.grpc}") as client:
        client.run(put_set, "pets", names, control_token=CONTROL)


def mount(folder, name, *files):
    """Write a ConfigMap's files as the kubelet does: a new folder, a link to it that moves, links through that link."""
    new = folder / f"..{name}"
    new.mkdir(parents=True)
    for file in files:
        shutil.copy(file, new)
    (folder / "..data_tmp").symlink_to(new.name)
    (folder / "..data_tmp").replace(folder / "..data")
    for file in files:
        (folder / file.name).symlink_to(f"..data/{file.name}")
    for link in folder.iterdir():
        if not link.name.startswith("..") and not link.exists():
            link.unlink()


def test_a_change_through_one_replica_reaches_all_and_a_config_map_is_read(repository, photos, tmp_path):
    shared, mounted = tmp_path / "shared", tmp_path / "mounted"
    env = {"VILU_CLASS_SETS": str(shared), "VILU_CONTROL_TOKEN": CONTROL}
    with (
        serving(repository, tmp_path, name="a", env=env) as a,
        serving(repository, tmp_path, name="b", env=env) as b,
    ):
        put(a, ["cat", "dog"])
        assert answer(b, photos[0])[0] == "pets@1"
        put(b, ["red star", "blue cross"])
        for replica in (a, b):
            version, label = answer(replica, photos[0])
            assert version == "pets@2"
            assert label in ("red star", "blue cross")

    mount(mounted, "first", shared / "pets@1")
    with serving(repository, tmp_path, name="c", env={"VILU_CLASS_SETS": str(mounted)}) as c:
        assert answer(c, photos[0])[0] == "pets@1"
        mount(mounted, "second", shared / "pets@2")
        assert answer(c, photos[0])[0] == "pets@2"
