"""Offline answers without Ray: the Scorer against the real server, bit for bit, and what an input holds."""

import io
import os
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.serving.helpers import same_bits
from vilu.errors import UserError
from vilu.serving import Client, Scorer
from vilu.serving.offline import blocks, run_job
from vilu.serving.offline.blocks import BLOCK_ROWS, IMAGE, PATH
from vilu.serving.offline.cluster import cluster
from vilu.serving.offline.embed import run_embed
from vilu.serving.offline.files import read_image
from vilu.serving.offline.inputs import open_input
from vilu.serving.offline.summary import Counts

BATCH = 8
HUGGING_FACE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@pytest.fixture(scope="module")
def scorer(repository):
    return Scorer(repository, details=True, embeddings=True, outlier_score=True)


def png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((9, 11, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.server
def test_answers_equal_the_servers_to_the_last_bit(server, scorer, repository, photos):
    images = photos[:BATCH]
    own = Scorer(repository, labels=["seven", "smörgåsbord"], details=True)
    with Client(server.grpc_url, batch_size=BATCH) as client:
        served = client.ask(images, details=True, embedding=True, outlier_score=True)
        same_bits(scorer.answers(images).to_pylist(), served)
        same_bits(scorer.answers(images, range(BATCH)).to_pylist(), served)
        same_bits(own.answers(images).to_pylist(), client.ask(images, ["seven", "smörgåsbord"], details=True))
        refused = client.ask([b"no image"])[0]
    assert scorer.answers([b"no image"])["error"].to_pylist() == [refused.error]


def test_an_answer_depends_on_its_place_alone(scorer, photos):
    whole = scorer.answers(photos, range(len(photos)))
    kept = [1, 2, 5, 9, 10]
    parts = [scorer.answers([photos[i], b""], [i, i + 1]) for i in kept]
    assert pa.concat_tables([part.slice(0, 1) for part in parts]).equals(whole.take(kept))
    assert scorer.answers([photos[i] for i in kept], kept).equals(whole.take(kept))


def test_bad_images_are_rows_with_their_reason(scorer, photos):
    table = scorer.answers([b"", photos[0], "no path", b"\x89PNG\r\n\x1a\n"])
    assert table.schema.equals(scorer.schema)
    assert [text and text[:10] for text in table["error"].to_pylist()] == ["image is e", None, "no path", "not a JPEG"]
    for name in set(table.column_names) - {"error"}:
        assert [value is None for value in table[name].to_pylist()] == [True, False, True, True], name
    assert scorer.answers([b""]).num_rows == 1
    assert scorer.answers([]).num_rows == 0


def test_a_batch_keeps_its_other_columns(scorer, photos, tmp_path):
    (tmp_path / "one.jpg").write_bytes(photos[0])
    table = pa.table({"path": [str(tmp_path / "one.jpg"), None, str(tmp_path)], "note": ["a", "b", "c"]})
    rows = scorer(table).to_pylist()
    assert [row["note"] for row in rows] == ["a", "b", "c"]
    assert [row["error"] for row in rows] == [None, "no path", "cannot be read (not a file)"]
    assert rows[0]["label"] == scorer(pa.table({"image": [photos[0]]})).to_pylist()[0]["label"]
    with pytest.raises(UserError, match="label have the names of answers"):
        scorer(pa.table({"image": [photos[0]], "label": ["x"]}))


def test_it_needs_no_torch_and_leaves_the_repository_as_it_was(repository):
    before = sorted(repository.rglob("*"))
    code = f"import sys; from vilu.serving import Scorer; Scorer({str(repository)!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr
    assert sorted(repository.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_set": "pets"}, "class set 'pets' is not served"),
        ({"labels": ["cat", "cat"]}, "repeats label 1"),
        ({"labels": ["cat"], "class_set": "pets"}, "not both"),
        ({"expected": "0" * 64}, "is another repository here"),
    ],
)
def test_what_it_refuses(repository, options, message):
    with pytest.raises(UserError, match=message):
        Scorer(repository, **options)


def test_a_repository_without_an_outlier_score_says_so(repository, tmp_path):
    shutil.copytree(repository, tmp_path / "r", ignore=shutil.ignore_patterns("outlier.onnx"))
    with pytest.raises(UserError, match="has no outlier score; export a checkpoint"):
        Scorer(tmp_path / "r", outlier_score=True)


def test_a_repository_that_does_not_load(tmp_path):
    with pytest.raises(UserError, match="no such model repository"):
        Scorer(tmp_path / "none")


# --- inputs


def rows_of(source):
    return pa.concat_tables([block for read, _, _ in source.tasks() for block in read()])


def shard(path, count, start=0):
    with tarfile.open(path, "w") as tar:
        for i in range(start, start + count):
            for name, data in ((f"{i:04}.png", png(i % 256)), (f"{i:04}.txt", b"text"), (f"{i:04}.mask.png", b"x")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_a_folder_a_list_and_a_pattern_name_the_same_images(tmp_path):
    names = [f"{i}.png" for i in range(3)] + ["späte\udcff.png"]
    for name in names:
        (tmp_path / name).write_bytes(png())
    (tmp_path / ".hidden.png").write_bytes(png())
    folder = open_input([str(tmp_path)])
    (tmp_path / "list.txt").write_bytes(b"\n".join(os.fsencode(name) for name in names))
    for other in (["list.txt"], ["*.png"], names):
        found = open_input([str(tmp_path / name) for name in other])
        assert [unit.name for unit in found.units] == [unit.name for unit in folder.units]
    uri = open_input([f"file://{tmp_path}"])
    assert uri.rows == folder.rows == 4
    paths = [os.fsdecode(path) for path in rows_of(folder)[PATH].to_pylist()]
    assert [read_image(path) for path in paths] == [png()] * 4
    assert open_input([str(tmp_path)], limit=2).rows == 2


def test_shards_are_read_whole_in_order_and_by_number(tmp_path):
    shard(tmp_path / "000.tar", BLOCK_ROWS + 3)
    shard(tmp_path / "001.tar", 2)
    for name in (str(tmp_path), str(tmp_path / "{000..001}.tar"), f"file://{tmp_path}/*.tar"):
        table = rows_of(open_input([name]))
        numbers = table["row_id"].to_pylist()
        assert numbers == [*range(BLOCK_ROWS + 3), 1 << 32, (1 << 32) + 1]
        assert table[IMAGE].to_pylist()[-1] == png(1)
    limited = open_input([str(tmp_path)], limit=BLOCK_ROWS + 4)
    assert limited.rows == rows_of(limited).num_rows == BLOCK_ROWS + 4


def test_texts_in_a_shard_are_columns(tmp_path):
    names = ("a.cls", "a.png", "b.jpg", "b.txt", "b.cls", "c.png", "d.cls", "x/d.png", "e.png", "e.TXT")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            data = b"\xff" if name == "e.TXT" else name.encode()
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    source = open_input([str(tmp_path)], columns=["cls", "txt"])
    table = rows_of(source)
    assert table["source"].to_pylist() == [f"{tmp_path}/a.tar: {n}" for n in names if n.endswith(("png", "jpg"))]
    assert table["cls"].to_pylist() == ["a.cls", "b.cls", None, None, None]
    assert table["txt"].to_pylist() == [None, "b.txt", None, None, None]
    assert rows_of(open_input([str(tmp_path)], columns=["cls"], limit=2))["cls"].to_pylist() == ["a.cls", "b.cls"]
    with pytest.raises(UserError, match=r"no image has a \.json file"):
        open_input([str(tmp_path)], columns=["cls", "json"])


def test_tables_of_paths_and_of_bytes(tmp_path):
    (tmp_path / "a.csv").write_text("path,note\none.png,x\n,y\n")
    source = open_input([str(tmp_path / "a.csv")], columns=["note"])
    table = rows_of(source)
    assert (source.rows, table["note"].to_pylist()) == (2, ["x", "y"])
    assert table[PATH].to_pylist() == [f"{tmp_path}/one.png".encode(), None]
    many = 4 * BLOCK_ROWS + 5
    image = pa.array([png(i % 9) for i in range(many)])
    path = tmp_path / "b.parquet"
    pq.write_table(pa.table({"image": image, "key": range(many)}), path, row_group_size=300)
    source = open_input([str(path)], columns=["key"])
    table = rows_of(source)
    assert table["row_id"].to_pylist() == table["key"].to_pylist() == list(range(many))
    assert table[IMAGE].to_pylist() == image.to_pylist()
    assert rows_of(open_input([str(path)], limit=301)).num_rows == 301
    struct = pa.array([{"bytes": png(), "path": "x"}])  # as Hugging Face stores images
    pq.write_table(pa.table({"image": struct}), tmp_path / "c.parquet")
    assert rows_of(open_input([str(tmp_path / "c.parquet")]))[IMAGE].to_pylist() == [png()]


def test_the_key_changes_with_the_input(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    key = open_input([str(tmp_path)]).key()
    assert open_input([str(tmp_path)]).key() == key
    os.utime(tmp_path / "a.png", ns=(1, 1))
    assert open_input([str(tmp_path)]).key() != key


def test_links_count_as_what_they_name_and_a_link_to_nothing_is_a_bad_image(tmp_path):
    (tmp_path / "a" / "real").mkdir(parents=True)
    (tmp_path / "a" / "real" / "one.png").write_bytes(png())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "folder").symlink_to(tmp_path / "a")
    (tmp_path / "b" / "gone.png").symlink_to(tmp_path / "none")
    paths = rows_of(open_input([str(tmp_path / "b")]))[PATH].to_pylist()
    assert [os.path.relpath(os.fsdecode(path), tmp_path / "b") for path in paths] == ["folder/real/one.png", "gone.png"]
    assert read_image(os.fsdecode(paths[1])) == "cannot be read (No such file or directory)"


def test_a_jobs_output_is_no_part_of_its_input(tmp_path):
    for name in ("one.png", "out/summary.png", "out2/two.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png())
    for given, without in ((tmp_path, tmp_path / "out"), (f"file://{tmp_path}", f"{tmp_path}/out2/../out/")):
        found = open_input([str(given)], without=str(without))
        assert [unit.name for unit in found.units] == [f"{tmp_path}/one.png", f"{tmp_path}/out2/two.png"]


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "shut").mkdir()
    (tmp_path / "one.png").write_bytes(png())
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"shut: cannot be listed \(Permission denied\)"):
        open_input([str(tmp_path)])


def test_no_more_of_a_member_is_read_than_is_accepted(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "READ_LIMIT", 50)
    shard(tmp_path / "a.tar", 3)
    assert [len(image) for image in rows_of(open_input([str(tmp_path)]))[IMAGE].to_pylist()] == [50, 50, 50]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a.png", None, "/b.png"]).dictionary_encode(),
        pa.array(["a.png", None, "/b.png"], pa.large_string()),
        pa.array(["a.png", None, "/b.png"], pa.string_view()),
        pa.array([{"bytes": None, "path": path} for path in ("a.png", None, "/b.png")], HUGGING_FACE),
        pa.array([{"bytes": None, "path": "a.png"}, None, {"bytes": None, "path": "/b.png"}], HUGGING_FACE),
        pa.array([{"path": path} for path in ("a.png", None, "/b.png")]),
    ],
    ids=["dictionary", "large", "view", "parts", "no parts", "path part"],
)
def test_every_type_of_text_is_a_column_of_paths(tmp_path, column):
    pq.write_table(pa.table({"image": column}), tmp_path / "a.parquet")
    table = rows_of(open_input([str(tmp_path)]))
    assert table[PATH].to_pylist() == [f"{tmp_path}/a.png".encode(), None, b"/b.png"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([b"x", None]).dictionary_encode(),
        pa.array([b"x", None], pa.binary_view()),
        pa.array([{"bytes": b"x", "path": "a"}, None], HUGGING_FACE),
    ],
    ids=["dictionary", "view", "parts"],
)
def test_every_type_of_bytes_is_a_column_of_images(tmp_path, column):
    pq.write_table(pa.table({"image": column}), tmp_path / "a.parquet")
    assert rows_of(open_input([str(tmp_path)]))[IMAGE].to_pylist() == [b"x", None]


def test_an_image_is_read_from_its_path_where_a_row_has_no_bytes(scorer, photos, tmp_path):
    (tmp_path / "one.jpg").write_bytes(photos[0])
    images, paths = (
        pa.chunked_array([[photos[0], None, None]]),
        pa.chunked_array([["x", str(tmp_path / "one.jpg"), None]]),
    )
    assert scorer.read(images, paths) == [photos[0], photos[0], "no image"]


def test_a_tsv_file_has_no_quotes(tmp_path):
    (tmp_path / "a.tsv").write_text('path\tnote\n"one.png\ta "word\ntwo.png\tb\n')
    table = rows_of(open_input([str(tmp_path)], columns=["note"]))
    assert table["note"].to_pylist() == ['a "word', "b"]
    assert table[PATH].to_pylist()[0] == f'{tmp_path}/"one.png'.encode()


def test_columns_with_names_of_the_output_are_refused_before_anything_is_written(repository, tmp_path):
    pq.write_table(pa.table({"path": ["a.png"], "label": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="columns label have the names of output columns"):
        run_job([str(tmp_path)], repository, tmp_path / "out", columns=["label"])
    assert not (tmp_path / "out").exists()


def test_a_folder_of_no_class_is_refused_before_anything_is_embedded(repository, tmp_path):
    (tmp_path / "no_such_class").mkdir()
    (tmp_path / "no_such_class" / "a.png").write_bytes(png())
    with pytest.raises(UserError, match="its class 'no such class' is not among the 10 classes"):
        run_embed([str(tmp_path / "no_such_class")], repository, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def empty(folder):
    return folder


def cut(folder):
    shard(folder / "a.tar", 20)
    (folder / "a.tar").write_bytes((folder / "a.tar").read_bytes()[:9000])
    return folder


def null_paths(folder):
    pq.write_table(pa.table({"path": pa.nulls(3, pa.string())}), folder / "a.parquet")
    return folder


def damaged(folder):
    (folder / "a.parquet").write_bytes(b"PAR1 and no more")
    return folder


def numbers(folder):
    pq.write_table(pa.table({"image": [1, 2]}), folder / "a.parquet")
    return folder


def repeated_column(folder):
    (folder / "a.csv").write_text("path,path\na,b\n")
    return folder


def mixed_columns(folder):
    pq.write_table(pa.table({"path": ["a"]}), folder / "a.parquet")
    pq.write_table(pa.table({"image": [b"a"]}), folder / "b.parquet")
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (empty, "holds no .tar, .jpg"),
        (cut, "a.tar: is cut short or damaged"),
        (null_paths, "column 'path' holds only NULL"),
        (numbers, "column 'image' holds int64, not paths or encoded images"),
        (repeated_column, "has several columns 'path'"),
        (damaged, "cannot be read as Parquet"),
        (mixed_columns, "b.parquet: has other columns"),
        (lambda folder: folder / "none", "no such file or folder"),
        (lambda folder: folder / "*.png", "matches no file"),
        (lambda folder: "https://example.org/a.png", "URLs are not read"),
        (lambda folder: "nosuch://bucket/a", "cannot be opened"),
    ],
)
def test_an_input_that_cannot_be_read(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        open_input([str(make(tmp_path))])


def test_a_damaged_shard_is_not_read_as_a_short_one(tmp_path):
    shard(tmp_path / "a.tar", 20)
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[16 * 512 : 17 * 512] = b"\xff" * 512  # a header in the middle
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"damaged|cannot be read"):
        rows_of(open_input([str(tmp_path)]))


def test_missing_and_repeated_rows_are_noticed():
    counts = Counts(rows=4)
    counts.mark(np.array([0, 1, 1 << 32, 3]))
    with pytest.raises(UserError, match="1 rows are missing and 0"):
        counts.check(None, "out")
    counts.mark(np.array([2, 3]))
    with pytest.raises(UserError, match="0 rows are missing and 1"):
        counts.check(None, "out")
    folder = Counts(folder=True, rows=2)
    folder.mark(np.array([0, 1 << 32]))
    folder.check(2, "out")
    with pytest.raises(UserError, match="1 rows are missing"):
        folder.check(3, "out")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999", "auto"])
def test_an_address_without_a_cluster_is_refused_at_once(address, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UserError, match="no Ray cluster answers at"), cluster(address):
        pass


def test_what_ended_a_job_is_one_line():
    exceptions = pytest.importorskip("ray").exceptions
    from vilu.serving.offline.cluster import reason

    def wrapped(cause):
        return exceptions.RayTaskError("map", "Traceback ...", cause).as_instanceof_cause()

    refusal = UserError("a.tar: is cut short")
    assert reason(wrapped(refusal)) is refusal
    assert reason(exceptions.RayTaskError("map", "", wrapped(refusal))) is refusal
    full = OSError(28, "No space left on device")
    assert "No space left" in str(reason(wrapped(full)))
    assert "the job ended" in str(reason(exceptions.NodeDiedError("node gone")))
    assert (
        str(reason(exceptions.RayTaskError("map", "...\nvilu.errors.UserError: too many\n\nmore", KeyError())))
        == "too many"
    )
    assert reason(wrapped(KeyError("a mistake in this program"))) is None
