"""`vilu score` on real Ray nodes: killed nodes and drivers, jobs that go on, bad inputs, what is written."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.serving.helpers import BIN
from vilu.serving import Scorer
from vilu.serving.address import free_port
from vilu.tiny import data

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray")
SMALL = ["--workers", "1", "--object-store-memory", "100"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """2,000 images, one of them bad. Most are large, so that a job takes long enough to be killed."""
    folder = tmp_path_factory.mktemp("images")
    digits = data.digits("test").images
    made = []
    for i in range(100):
        buffer = io.BytesIO()
        side = 30 + i if i % 4 else 1000 + i
        Image.fromarray(np.asarray(digits[i])).resize((side, side)).save(buffer, ("JPEG", "PNG", "WEBP")[i % 4 % 3])
        made.append(buffer.getvalue())
    for i in range(1999):
        (folder / f"{i:04}.jpg").write_bytes(made[i % 100])
    (folder / "bad.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def expected(images, repository):
    """Each file's row as the Scorer gives it, without Ray."""
    scorer = Scorer(repository, embeddings=True)
    paths = sorted(images.iterdir())
    table = scorer.answers([path.read_bytes() for path in paths], range(len(paths)))
    return dict(zip(map(str, paths), table.to_pylist(), strict=True))


def command(*arguments):
    return [str(BIN / "vilu"), "score", *map(str, arguments)]


def score(*arguments):
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def written(output):
    rows = ds.dataset(output / "data").to_table().to_pylist()
    ids = [row.pop("row_id") for row in rows]
    assert len(set(ids)) == len(ids)
    return {row.pop("source"): row for row in rows}


def committed(output):
    return [path for path in (output / "checkpoint").glob("*.parquet") if ".pending" not in path.name]


def wait_for(check, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not check():
        assert process.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_job_that_loses_a_node_and_then_its_driver_ends_with_the_same_rows(images, repository, expected, tmp_path):
    from ray.cluster_utils import Cluster

    output = tmp_path / "out"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 << 20})
    try:
        nodes = [cluster.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(2)]
        job = [images, "--model-repository", repository, "--output", output, "--embeddings"]
        job += ["--address", cluster.address, "--workers", "1-2", "--rows-per-file", "64"]
        process = subprocess.Popen(command(*job), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            wait_for(lambda: committed(output), process)
            nodes[0].kill_raylet()  # SIGKILL
            before = len(committed(output))
            wait_for(lambda: len(committed(output)) > before, process)
        finally:
            process.kill()
            process.communicate()
        done = len(committed(output))
        code, out, err = score(*job, "--json")
    finally:
        cluster.shutdown()
    assert code == 0, err
    summary = json.loads(out)
    assert written(output) == expected
    assert (summary["rows"], summary["bad_images"], summary["answered"]) == (2000, 1, 1999)
    assert 0 < summary["this_run"]["rows"] <= 2000 - 64 * done  # what was committed was not answered again


def test_a_commit_that_was_begun_again_is_withdrawn(tmp_path):
    """Ray's recovery removes a file with a pending commit, so its rows must not count as done."""
    from pyarrow import fs

    from vilu.serving.offline.job import _settle

    names = ["a.parquet", "a.pending.parquet", "b.parquet", "c.pending.parquet"]
    (tmp_path / "checkpoint").mkdir()
    for name in names:
        (tmp_path / "checkpoint" / name).touch()
    assert set(_settle(fs.LocalFileSystem(), str(tmp_path))) == {"a", "c"}
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == names[1:]


def test_a_job_here_is_quiet_and_is_not_done_twice(images, repository, expected, tmp_path):
    job = [images, "--model-repository", repository, "--output", tmp_path / "out", *SMALL]
    code, out, err = score(*job, "--limit", 40, "--accept-only", "--rows-per-file", 16)
    assert (code, err) == (0, "")
    assert "40 rows" in out
    first = sorted(expected)[:40]
    assert set(written(tmp_path / "out")) == {source for source in first if expected[source]["accept"]}
    file = next((tmp_path / "out" / "data").rglob("*.parquet"), None)
    if file is not None:
        schema = pq.read_schema(file)
        job_of = json.loads(schema.metadata[b"vilu"])
        assert job_of["repository"] == Scorer(repository).identity
        assert pq.ParquetFile(file).metadata.row_group(0).column(0).compression == "ZSTD"
    assert score(*job, "--limit", 40, "--accept-only")[0] == 0
    code, _, err = score(*job, "--limit", 41, "--accept-only")
    assert (code, err.count("\n")) == (2, 1)
    assert "was begun with another state of the input" in err


def test_a_cascade_answers_with_every_stage(images, cascade, tmp_path):
    job = [images, "--model-repository", cascade.root, "--output", tmp_path / "out", *SMALL, "--limit", 200]
    code, out, err = score(*job)
    assert (code, err) == (0, "")
    paths = sorted(images.iterdir())[:200]
    table = Scorer(cascade.root).answers([path.read_bytes() for path in paths], range(200))
    assert written(tmp_path / "out") == dict(zip(map(str, paths), table.to_pylist(), strict=True))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    stages = table["stage"].to_pylist()
    assert summary["stages"] == {str(number): stages.count(number) for number in (1, 2)}
    assert f"{stages.count(2) / 200:.1%} by stage 2" in out
    code, _, err = score(*job, "--first-stage")
    assert (code, err.count("\n")) == (2, 1)
    assert "was begun with another state of the model repository" in err


def test_bad_inputs_are_one_line_and_write_nothing(repository, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "some.png").write_bytes(b"x")
    for arguments, message in (
        ([tmp_path / "empty", "--model-repository", repository], "holds no"),
        ([tmp_path / "some.png", "--model-repository", tmp_path / "broken"], "holds no models"),
        ([tmp_path / "some.png", "--model-repository", repository, "--class-set", "pets"], "not served"),
    ):
        code, out, err = score(*arguments, "--output", tmp_path / "out")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err
    assert not (tmp_path / "out").exists()


def test_too_many_bad_images_stop_the_job_and_a_higher_limit_goes_on(repository, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.png").write_bytes(b"no image")
    job = [folder, "--model-repository", repository, "--output", tmp_path / "out", *SMALL]
    code, _, err = score(*job)
    assert (code, err.count("\n")) == (2, 1), err
    assert "images are bad" in err
    assert score(*job, "--max-bad", "0.99")[0] == 2  # noticed at the end, where no batch follows
    code, out, _ = score(*job, "--max-bad", "1", "--json")
    assert (code, json.loads(out)["reasons"]) == (0, {"not a JPEG, PNG or WEBP image": 40})


def test_a_data_set_without_an_accepted_row_has_its_schema(repository, tmp_path):
    duckdb = pytest.importorskip("duckdb")
    (tmp_path / "bad.png").write_bytes(b"no image")
    out = tmp_path / "out"
    job = [tmp_path / "bad.png", "--model-repository", repository, "--output", out, *SMALL, "--max-bad", 1]
    assert score(*job, "--accept-only", "--details", "--embeddings")[0] == 0
    schema = ds.dataset(out / "data", partitioning="hive").schema
    assert {"label", "image_embedding", "kept"} < set(schema.names)
    assert b"vilu" in schema.metadata
    assert duckdb.sql(f"SELECT count(*), max(label) FROM '{out}/data/**/*.parquet'").fetchall() == [(0, None)]


def test_a_full_disk_is_one_line_and_the_job_goes_on_with_more_room(images, repository, expected, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True)
    if mount.returncode:
        pytest.skip("only root can mount a small disk")
    job = [images, "--model-repository", repository, "--output", disk / "out", "--embeddings", "--limit", 700, *SMALL]
    try:
        code, out, err = score(*job, "--rows-per-file", 128)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert "No space left on device" in err
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert score(*job)[0] == 0
        assert written(disk / "out") == {source: expected[source] for source in sorted(expected)[:700]}
    finally:
        subprocess.run(["umount", disk], check=True)


def accepts(port):
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The environment of an S3-compatible store. Its packages need older versions than ours, so they lie apart."""
    port = free_port()
    command = [
        str(BIN / "uv"),
        "tool",
        "run",
        "--from",
        "moto==5.1.22",
        "--with",
        "flask",
        "--with",
        "flask-cors",
        "moto_server",
    ]
    log = open(tmp_path_factory.mktemp("store") / "log", "wb")
    process = subprocess.Popen([*command, "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log)
    try:
        while not accepts(port):
            if process.poll() is not None:
                pytest.skip("uv cannot install moto here")
            time.sleep(0.2)
        keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        yield {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1", **keys}
    finally:
        process.terminate()
        process.wait()


def test_images_and_answers_in_a_store(images, repository, expected, store, tmp_path, monkeypatch):
    from pyarrow import fs

    for name, value in store.items():
        monkeypatch.setenv(name, value)
    endpoint = store["AWS_ENDPOINT_URL"].partition("://")[2]
    system = fs.S3FileSystem(endpoint_override=endpoint, scheme="http", allow_bucket_creation=True)
    system.create_dir("bucket")
    sources = sorted(expected)[:40]
    for source in sources:
        with system.open_output_stream(f"bucket/images/{os.path.basename(source)}") as file:
            file.write(Path(source).read_bytes())
    job = ["--model-repository", repository, "--output", "s3://bucket/out", "--embeddings", *SMALL]
    code, out, err = score("s3://bucket/images/*.jpg", *job, "--limit", 30, "--json")
    assert (code, err) == (0, "")
    rows = {row.pop("source"): row for row in ds.dataset("bucket/out/data", filesystem=system).to_table().to_pylist()}
    assert [row.pop("row_id") >> 32 for _, row in sorted(rows.items())] == list(range(30))
    assert rows == {f"s3://bucket/images/{os.path.basename(s)}": expected[s] for s in sources[:30]}
    assert score("s3://bucket/images/*.jpg", *job, "--limit", 30, "--json") == (0, out, "")
    code, _, err = score("s3://nobody/images", *job)
    assert (code, err.count("\n")) == (2, 1)


def test_the_library_gives_a_lazy_dataset(images, repository, expected):
    code = (
        "import json, sys, ray\nfrom vilu.serving import Scorer, score\n"
        "ray.init(address='local', num_cpus=4, object_store_memory=100 << 20, log_to_driver=False)\n"
        "dataset = score(sys.argv[1], sys.argv[2], limit=30)\n"
        "own = dataset.select_columns(['source']).map_batches(lambda t: t.rename_columns(['path']), "
        "batch_format='pyarrow').map_batches(Scorer, fn_constructor_args=[sys.argv[2]], batch_format='pyarrow', "
        "batch_size=8, concurrency=1)\n"
        "print(json.dumps([dataset.take_all(), own.take_all()]))"
    )
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_LOG_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, "-c", code, images, repository], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    rows, own = json.loads(done.stdout.strip().splitlines()[-1])
    assert {row["source"]: row["failure_probability"] for row in rows} == {
        source: expected[source]["failure_probability"] for source in sorted(expected)[:30]
    }
    assert {row["path"]: row["label"] for row in own} == {row["source"]: row["label"] for row in rows}
    assert all(Path(row["path"]).is_file() for row in own)


def test_embeddings_are_what_train_reads(images, repository, expected, tmp_path):
    from vilu.data import load_embeddings

    folder = tmp_path / "images"
    names = Scorer(repository).bank.labels
    first = [source for source in sorted(expected) if expected[source]["error"] is None][:12]
    for i, source in enumerate(first):
        place = folder / names[i % 2].decode().replace(" ", "_")
        place.mkdir(parents=True, exist_ok=True)
        (place / os.path.basename(source)).write_bytes(Path(source).read_bytes())
    arguments = [folder, "--model-repository", repository, "--output", tmp_path / "out", *SMALL]
    done = subprocess.run([BIN / "vilu", "embed", *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    found = load_embeddings(tmp_path / "out" / "embeddings")
    order = [first[i] for i in (*range(0, 12, 2), *range(1, 12, 2))]  # sorted by folder
    if names[1] < names[0]:
        order = order[6:] + order[:6]
    assert found.labels.tolist() == ([0] * 6 + [1] * 6 if names[0] < names[1] else [1] * 6 + [0] * 6)
    assert found.class_names == tuple(name.decode() for name in names)
    kept = np.array([expected[source]["image_embedding"] for source in order], np.float32)
    assert np.allclose(found.image.normalised.numpy().astype(np.float32), kept, atol=1e-3)


def test_embeddings_of_shards_take_their_classes_from_cls_files(images, repository, tmp_path):
    from vilu.data import load_embeddings

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(10):
            for ending, content in (("cls", str(i % 10).encode()), ("jpg", (images / f"{i:04}.jpg").read_bytes())):
                member = tarfile.TarInfo(f"{i}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    arguments = [tmp_path / "a.tar", "--model-repository", repository, "--output", tmp_path / "out", *SMALL]
    command = [str(BIN / "vilu"), "embed", *map(str, arguments), "--label-column", "cls"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert load_embeddings(tmp_path / "out" / "embeddings").labels.tolist() == list(range(10))
