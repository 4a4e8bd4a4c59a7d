"""Sources: the 13 data sets on miniature folders laid out as the real ones, tables, shards, and what is refused."""

import io
import itertools
import json
import os
import pickle
import sys
import tarfile
import threading
from contextlib import closing

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support.files import captioned, captions_of, folder, jpeg, put, shard
from vilu.data import augment, batches, check_same_classes, open_source
from vilu.data.cifar import _load
from vilu.data.coop import SPLIT_FILES
from vilu.data.pipeline import Augment
from vilu.data.shards import expand
from vilu.data.source import ArraySource, inside
from vilu.errors import UserError
from vilu.preprocess.image import ImageError

SMALL = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def colour_of(source, i):
    return tuple(int(x) for x in np.asarray(Image.open(io.BytesIO(source.read(i))))[0, 0])


# ---------------------------------------------------------------------- the 13 data sets

# Paths and class names as they stand in the real split files.
REAL = {
    "caltech101": ("Faces/image_0274.jpg", "face", "accordion/image_0001.jpg", "accordion"),
    "dtd": ("banded/banded_0133.jpg", "banded", "blotchy/blotchy_0003.jpg", "blotchy"),
    "eurosat": ("AnnualCrop/AnnualCrop_1381.jpg", "Annual Crop Land", "SeaLake/SeaLake_1.jpg", "Sea or Lake"),
    "flowers102": ("image_00190.jpg", "passion flower", "image_05094.jpg", "pink primrose"),
    "food101": ("apple_pie/1005649.jpg", "apple_pie", "baby_back_ribs/10085.jpg", "baby_back_ribs"),
    "oxford_pets": ("Abyssinian_122.jpg", "abyssinian", "american_bulldog_1.jpg", "american_bulldog"),
    "stanford_cars": ("cars_train/05266.jpg", "2012 Audi TTS Coupe", "cars_test/00001.jpg", "2007 Suzuki Aerio Sedan"),
    "sun397": ("a/abbey/sun_aaa.jpg", "abbey", "a/airport_terminal/sun_b.jpg", "airport_terminal"),
    "ucf101": ("Apply_Eye_Makeup/v_A_g12_c03.jpg", "Apply_Eye_Makeup", "Archery/v_Archery_g01.jpg", "Archery"),
}
FOLDERS = {  # from CoOp's DATASETS.md, written out here on their own
    "caltech101": "caltech-101/101_ObjectCategories",
    "dtd": "dtd/images",
    "eurosat": "eurosat/2750",
    "flowers102": "oxford_flowers/jpg",
    "food101": "food-101/images",
    "oxford_pets": "oxford_pets/images",
    "stanford_cars": "stanford_cars",
    "sun397": "sun397/SUN397",
    "ucf101": "ucf101/UCF-101-midframes",
}
FILES = {
    "caltech101": "caltech-101/split_zhou_Caltech101.json",
    "dtd": "dtd/split_zhou_DescribableTextures.json",
    "eurosat": "eurosat/split_zhou_EuroSAT.json",
    "flowers102": "oxford_flowers/split_zhou_OxfordFlowers.json",
    "food101": "food-101/split_zhou_Food101.json",
    "oxford_pets": "oxford_pets/split_zhou_OxfordPets.json",
    "stanford_cars": "stanford_cars/split_zhou_StanfordCars.json",
    "sun397": "sun397/split_zhou_SUN397.json",
    "ucf101": "ucf101/split_zhou_UCF101.json",
}


def miniature(root, dataset):
    first, first_name, second, second_name = REAL[dataset]
    put(root / FOLDERS[dataset] / first, jpeg((250, 0, 0)))
    put(root / FOLDERS[dataset] / second, jpeg((0, 0, 250)))
    split = {
        "train": [[second, 1, second_name], [first, 0, first_name]],
        "val": [[first, 0, first_name]],
        "test": [[second, 1, second_name]],
    }
    (root / FILES[dataset]).write_text(json.dumps(split))
    return split


@pytest.mark.parametrize("dataset", sorted(REAL))
def test_a_coop_data_set(tmp_path, dataset):
    miniature(tmp_path, dataset)
    split_file = tmp_path / FILES[dataset]
    split_file.write_text(split_file.read_text(), "utf-8-sig")  # as editors on Windows save it
    names = (REAL[dataset][1].replace("_", " "), REAL[dataset][3].replace("_", " "))
    train = open_source(dataset=dataset, root=tmp_path)
    assert train.name == dataset
    assert train.class_names == names
    assert train.labels.tolist() == [1, 0]
    assert train.captions is None
    assert colour_of(train, 0)[2] > 200 > colour_of(train, 0)[0]
    assert colour_of(train, 1)[0] > 200
    assert open_source(dataset=dataset, root=tmp_path, split="val").labels.tolist() == [0]
    test = open_source(dataset=dataset, root=tmp_path, split="test")
    assert test.labels.tolist() == [1]
    check_same_classes(train, test)
    # The root may also be the data set's own folder.
    own = open_source(dataset=dataset, root=(tmp_path / FILES[dataset]).parent)
    assert own.labels.tolist() == [1, 0]


def imagenet(root):
    (root / "imagenet").mkdir()
    lines = ["n01440764 tench", "n03773504 missile", "n04008634 missile", "n09999999 unused one"]
    (root / "imagenet/classnames.txt").write_text("\n".join(lines))
    for number, wnid in enumerate(("n01440764", "n03773504", "n04008634")):
        put(root / f"imagenet/images/train/{wnid}/{wnid}_{number}.JPEG")
        put(root / f"imagenet/images/train/{wnid}/{wnid}_9{number}.JPEG")
        put(root / f"imagenet/images/val/{wnid}/ILSVRC2012_val_0000000{number}.JPEG")


def test_imagenet(tmp_path):
    imagenet(tmp_path)
    train = open_source(dataset="imagenet", root=tmp_path)
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    # CLIP's list calls two classes "missile": they must be told apart.
    assert train.class_names == ("tench", "missile", "projectile")
    test = open_source(dataset="imagenet", root=tmp_path, split="test")
    assert test.labels.tolist() == [0, 1, 2]
    assert test.read(0)
    check_same_classes(train, test)
    os.rename(tmp_path / "imagenet/images/val/n04008634", tmp_path / "imagenet/images/val/n05555555")
    with pytest.raises(UserError, match=r"classes do not match.*n04008634, n05555555"):
        open_source(dataset="imagenet", root=tmp_path, split="test")


def test_imagenet_with_a_flat_validation_folder(tmp_path):
    imagenet(tmp_path)
    flat = tmp_path / "imagenet/images/val"
    for wnid in list(flat.iterdir()):
        for file in wnid.iterdir():
            file.rename(flat / file.name)
        wnid.rmdir()
    with pytest.raises(UserError, match="class folders"):
        open_source(dataset="imagenet", root=tmp_path, split="test")


def test_fgvc_aircraft(tmp_path):
    folder = tmp_path / "fgvc_aircraft"
    put(folder / "images/0034309.jpg")
    put(folder / "images/0034958.jpg")
    (folder / "variants.txt").write_text("707-320\nF-16A/B\n")
    (folder / "images_variant_train.txt").write_text("0034309 F-16A/B\n0034958 707-320\n")
    (folder / "images_variant_test.txt").write_text("0034958 Concorde\n")
    (folder / "images_variant_val.txt").write_text("../../../etc/passwd 707-320\n")
    train = open_source(dataset="fgvc_aircraft", root=tmp_path)
    assert train.class_names == ("707-320", "F-16A/B")
    assert train.labels.tolist() == [1, 0]
    assert train.read(0)
    with pytest.raises(UserError, match=r"images_variant_test.txt: line 1: 'Concorde' is not in variants.txt"):
        open_source(dataset="fgvc_aircraft", root=tmp_path, split="test")
    with pytest.raises(UserError, match="leaves"):
        open_source(dataset="fgvc_aircraft", root=tmp_path, split="val")


def cifar_pixels(count):
    return np.random.default_rng(count).integers(0, 256, (count, 3072), np.uint8)


def cifar(root, dataset):
    """Both sets as torchvision unpacks them. Returns the training pixels (N, 3072) and labels."""
    pixels = cifar_pixels(10)
    labels = [i % 2 for i in range(10)]
    if dataset == "cifar10":
        folder, label_key, names_key, meta = "cifar-10-batches-py", "labels", "label_names", "batches.meta"
        files = {f"data_batch_{i}": slice(2 * i - 2, 2 * i) for i in range(1, 6)} | {"test_batch": slice(0, 4)}
    else:
        folder, label_key, names_key, meta = "cifar-100-python", "fine_labels", "fine_label_names", "meta"
        files = {"train": slice(0, 10), "test": slice(0, 4)}
    (root / folder).mkdir(parents=True)
    for name, rows in files.items():
        content = {"batch_label": name, label_key: labels[rows], "data": pixels[rows], "filenames": ["x.png"]}
        (root / folder / name).write_bytes(pickle.dumps(content))
    (root / folder / meta).write_bytes(pickle.dumps({names_key: ["aquarium_fish", "bear"], "num_vis": 3072}))
    return pixels, labels


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_cifar_as_torchvision_keeps_it(tmp_path, dataset):
    pixels, labels = cifar(tmp_path / dataset, dataset)
    train = open_source(dataset=dataset, root=tmp_path)
    assert train.labels.tolist() == labels
    assert train.class_names == ("aquarium fish", "bear")
    for i in (0, 7):
        planes = pixels[i].reshape(3, 32, 32)
        assert np.array_equal(train.read(i), np.stack(list(planes), axis=-1))
    test = open_source(dataset=dataset, root=tmp_path / dataset, split="test")
    assert len(test) == 4
    with pytest.raises(UserError, match="no split 'val'"):
        open_source(dataset=dataset, root=tmp_path, split="val")


@pytest.mark.parametrize(
    ("dataset", "folder", "skip"), [("cifar10", "cifar-10-batches-bin", 0), ("cifar100", "cifar-100-binary", 1)]
)
def test_cifar_binary(tmp_path, dataset, folder, skip):
    pixels = cifar_pixels(10)
    files = {"train.bin": slice(0, 10), "test.bin": slice(0, 3)}
    if dataset == "cifar10":
        files = {f"data_batch_{i}.bin": slice(2 * i - 2, 2 * i) for i in range(1, 6)} | {"test_batch.bin": slice(0, 3)}
    (tmp_path / folder).mkdir()
    for name, rows in files.items():
        records = [bytes([99] * skip) + bytes([i % 2]) + pixels[i].tobytes() for i in range(10)[rows]]
        (tmp_path / folder / name).write_bytes(b"".join(records))
    names = "batches.meta.txt" if dataset == "cifar10" else "fine_label_names.txt"
    (tmp_path / folder / names).write_text("cat\ndog\n\n")
    train = open_source(dataset=dataset, root=tmp_path)
    assert train.labels.tolist() == [0, 1] * 5
    assert np.array_equal(train.read(4), pixels[4].reshape(3, 32, 32).transpose(1, 2, 0))
    last = tmp_path / folder / next(iter(files))
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(UserError, match="no whole number of records"):
        open_source(dataset=dataset, root=tmp_path)


def test_a_cifar_pickle_from_python_2(tmp_path):
    """The real files: protocol 2 written by Python 2, whose array holds its bytes as a string."""
    raw = cifar_pixels(2)
    text = raw.tobytes()
    head = b"\x80\x02}(U\x06labels]K\x00aK\x01aeU\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
    head = head.replace(b"]K\x00aK\x01ae", b"](K\x00K\x01e")
    array = b"K\x00\x85U\x01b\x87R(K\x01K\x02M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
    array += b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    data = head + array + b"T" + len(text).to_bytes(4, "little") + text + b"tbu."
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(data)
    (folder / "batches.meta").write_bytes(b"\x80\x02}U\x0blabel_names](U\x03catU\x03doges.")
    test = open_source(dataset="cifar10", root=tmp_path, split="test")
    assert test.labels.tolist() == [0, 1]
    assert np.array_equal(test.read(1), raw[1].reshape(3, 32, 32).transpose(1, 2, 0))


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_a_cifar_pickle_that_would_run_code_is_refused(tmp_path):
    cifar(tmp_path, "cifar10")
    made = tmp_path / "made"
    batch = tmp_path / "cifar-10-batches-py/data_batch_1"
    batch.write_bytes(pickle.dumps({"data": Attack(str(made)), "labels": [0]}))
    with pytest.raises(UserError, match=r"data_batch_1: is no CIFAR batch \(names .*mkdir"):
        open_source(dataset="cifar10", root=tmp_path)
    assert not made.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02.",
        pickle.dumps([1, 2]),
        pickle.dumps({"data": np.zeros((2, 3072), np.float64), "labels": [0, 1]}),
        pickle.dumps({"data": np.zeros((2, 3071), np.uint8), "labels": [0, 1]}),
        pickle.dumps({"data": np.zeros((3, 3072), np.uint8), "labels": [0, 1]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, "a"]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, -1]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1 << 80]}),
        pickle.dumps({"data": np.array([None, "x"], object), "labels": [0, 1]}),
    ],
)
def test_a_cifar_pickle_that_is_none_is_one_line(tmp_path, content):
    cifar(tmp_path, "cifar10")
    (tmp_path / "cifar-10-batches-py/data_batch_3").write_bytes(content)
    with pytest.raises(UserError, match="data_batch_3: ") as caught:
        open_source(dataset="cifar10", root=tmp_path)
    assert "\n" not in str(caught.value)


@SMALL
@given(data=st.data())
def test_any_damage_to_a_cifar_pickle_is_one_line_or_none(tmp_path, data):
    content = bytearray(pickle.dumps({"labels": [0, 1], "data": cifar_pixels(2)}))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 300))] = data.draw(st.integers(0, 255))
    (tmp_path / "b").write_bytes(content)
    told = ""
    try:
        _load(tmp_path / "b")
    except UserError as error:
        told = str(error)
    assert "\n" not in told


# ---------------------------------------------------------------------- what a split file may hold


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s["train"].append(["../../../etc/passwd", 0, "banded"]),
            r"train\[2\]: path '../../../etc/passwd' leaves",
        ),
        (lambda s: s["train"].append(["/etc/passwd", 0, "banded"]), "leaves"),
        (lambda s: s["train"].append(["a\0b", 0, "banded"]), "is no path"),
        (lambda s: s["train"].append(["", 0, "banded"]), "is no path"),
        (lambda s: s["train"].append(["x.jpg", True, "banded"]), r"train\[2\] is not \[path, label, class name\]"),
        (lambda s: s["train"].append(["x.jpg", -1, "banded"]), r"train\[2\] is not"),
        (lambda s: s["train"].append(["x.jpg", 0]), r"train\[2\] is not"),
        (
            lambda s: s["test"].append(["x.jpg", 0, "striped"]),
            r"class names do not match: test\[1\] calls class 0 'striped'",
        ),
        (lambda s: s["test"].append(["x.jpg", 7, "striped"]), "labels are not 0..2"),
        (lambda s: s["test"].append(["x.jpg", 2, "banded"]), r"class name 3 \('banded'\) repeats"),
        (lambda s: s.pop("val"), "no list 'val'"),
        (lambda s: s.update(train={}), "no list 'train'"),
        (lambda s: s.update(train=[]), "no images"),
    ],
)
def test_a_malformed_split_file(tmp_path, change, message):
    split = miniature(tmp_path, "dtd")
    change(split)
    (tmp_path / FILES["dtd"]).write_text(json.dumps(split))
    with pytest.raises(UserError, match=message) as caught:
        open_source(dataset="dtd", root=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '"x"', "\xff"])
def test_a_split_file_that_is_none(tmp_path, text):
    miniature(tmp_path, "dtd")
    (tmp_path / FILES["dtd"]).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="is no CoOp split file"):
        open_source(dataset="dtd", root=tmp_path)


def test_a_data_set_with_one_class(tmp_path):
    miniature(tmp_path, "dtd")
    row = ["banded/banded_0133.jpg", 0, "banded"]
    (tmp_path / FILES["dtd"]).write_text(json.dumps({"train": [row], "val": [row], "test": [row]}))
    with pytest.raises(UserError, match="at least two classes, found only 'banded'"):
        open_source(dataset="dtd", root=tmp_path)


@pytest.mark.parametrize("dataset", [*SPLIT_FILES, "imagenet", "fgvc_aircraft", "cifar10", "cifar100"])
def test_a_data_set_that_is_not_there(tmp_path, dataset):
    with pytest.raises(UserError, match=r"no such file|holds no cifar"):
        open_source(dataset=dataset, root=tmp_path)
    with pytest.raises(UserError, match="needs --root"):
        open_source(dataset=dataset)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"dataset": "flower102"}, "unknown data set 'flower102'; near: flowers102"),
        ({"dataset": "CIFAR-10"}, "near: cifar10"),
        ({"dataset": "???"}, "known: digits, shapes"),
        ({}, "one of the two"),
        ({"data": "x", "dataset": "digits"}, "one of the two"),
        ({"data": "x", "split": "other"}, "split must be one of"),
        ({"data": "/nowhere/at/all"}, "no such file or folder"),
        ({"data": "/nowhere/a.csv"}, "no such file"),
        ({"data": "/nowhere/a.tar"}, "no such file"),
        ({"data": "/nowhere/*.tar"}, "matches no file"),
        ({"data": "/nowhere/{0..9}.tar"}, "10 of 10 missing"),
        ({"data": "a.npz"}, "holds embeddings, not images"),
        ({"dataset": "digits", "split": "val"}, "only train and test"),
    ],
)
def test_a_name_that_names_nothing(given_, message):
    with pytest.raises(UserError, match=message):
        open_source(**given_)


@SMALL
@given(st.text(max_size=30), st.lists(st.sampled_from(["..", ".", "a", "/", "b.jpg", "\\", " ", "//"]), max_size=8))
def test_no_path_leaves_its_root(tmp_path, tail, parts):
    for path in ("/".join(parts), "/".join(parts) + tail, tail):
        try:
            kept = inside(tmp_path, path, "here")
        except UserError:
            continue
        full = os.path.realpath(os.path.join(tmp_path, kept))
        assert full.startswith(os.path.realpath(tmp_path) + os.sep)


# ---------------------------------------------------------------------- image folders


def test_a_folder(tmp_path):
    folder(tmp_path)
    put(tmp_path / "zebra/deep/er/x.PNG", jpeg(kind="PNG"))
    put(tmp_path / "zebra/notes.txt")
    put(tmp_path / ".git/x.jpg")
    put(tmp_path / "zebra/._0.jpg")
    put(tmp_path / "stray.jpg")
    (tmp_path / "empty").mkdir()
    source = open_source(str(tmp_path))
    assert source.class_names == ("sea lion", "zebra")
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert [source.where(i) for i in range(7)][-1] == str(tmp_path / "zebra/deep/er/x.PNG")
    assert open_source(str(tmp_path), split="test").key() == source.key()


def test_a_folder_of_splits(tmp_path):
    folder(tmp_path / "train", per_class=3)
    folder(tmp_path / "test", per_class=2)
    assert len(open_source(str(tmp_path))) == 6
    assert len(open_source(str(tmp_path), split="test")) == 4
    with pytest.raises(UserError, match="has no split 'val', only test, train"):
        open_source(str(tmp_path), split="val")
    os.rename(tmp_path / "test/zebra", tmp_path / "test/okapi")
    for split in ("train", "test"):
        with pytest.raises(UserError, match=r"class names do not match.*'okapi', 'zebra'"):
            open_source(str(tmp_path), split=split)


@pytest.mark.parametrize("classes", [(), ("one",)])
def test_a_folder_without_classes(tmp_path, classes):
    folder(tmp_path, classes)
    with pytest.raises(UserError, match=r"holds no \.jpg|at least two class directories with images, found 1"):
        open_source(str(tmp_path))


def test_links_that_run_in_a_circle_end(tmp_path):
    folder(tmp_path)
    (tmp_path / "zebra/loop").symlink_to(tmp_path / "zebra")
    assert len(open_source(str(tmp_path))) == 6
    (tmp_path / "zebra/all").symlink_to(tmp_path)
    with pytest.raises(UserError, match="is the same folder as"):
        open_source(str(tmp_path))


def test_a_fifo_is_not_waited_for(tmp_path):
    folder(tmp_path)
    os.mkfifo(tmp_path / "zebra/pipe.jpg")
    source = open_source(str(tmp_path))
    with pytest.raises(ValueError, match="not a file"):
        source.read(6)


def test_the_key_sees_every_change(tmp_path):
    folder(tmp_path)
    keys = [open_source(str(tmp_path)).key()]

    def changed():
        keys.append(open_source(str(tmp_path)).key())
        assert len(set(keys)) == len(keys)

    put(tmp_path / "zebra/9.jpg")
    changed()
    os.rename(tmp_path / "zebra/9.jpg", tmp_path / "sea_lion/9.jpg")
    changed()
    status = os.stat(tmp_path / "zebra/0.jpg")
    os.utime(tmp_path / "zebra/0.jpg", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    changed()
    put(tmp_path / "zebra/0.jpg", jpeg() + b"\0")
    changed()
    os.rename(tmp_path / "zebra", tmp_path / "okapi")
    changed()


def test_the_key_sees_labels_and_names_of_the_same_images():
    def key(labels=(0, 1, 1), names=("a", "b"), value=0):
        images = np.full((3, 4, 4, 3), value, np.uint8)
        return ArraySource(name="x", images=images, labels=np.array(labels), class_names=names).key()

    assert key() == key()
    assert len({key(), key(labels=(1, 0, 1)), key(names=("a", "c")), key(value=1)}) == 4


def test_check_same_classes():
    def closed(name, names):
        return ArraySource(
            name=name, images=np.zeros((2, 4, 4, 3), np.uint8), labels=np.array([0, 1]), class_names=tuple(names)
        )

    check_same_classes(closed("a", "xy"), closed("b", "xy"))
    with pytest.raises(
        UserError, match=r"b: class names do not match those of a: 1 only in a \('y'\); 1 only in b \('z'\)"
    ):
        check_same_classes(closed("a", "xy"), closed("b", "xz"))
    with pytest.raises(UserError, match="another order"):
        check_same_classes(closed("a", "xy"), closed("b", "yx"))


# ---------------------------------------------------------------------- tables


def table(path, rows, columns=("path", "caption")):
    if path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pa.table({c: [r[i] for r in rows] for i, c in enumerate(columns)}), path)
    else:
        import csv

        with open(path, "w", newline="", encoding="utf-8") as file:
            if path.suffix == ".tsv":
                file.writelines("\t".join(row) + "\n" for row in [columns, *rows])
            else:
                csv.writer(file).writerows([columns, *rows])
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_a_table(tmp_path, suffix):
    put(tmp_path / "images/a.jpg", jpeg((250, 0, 0)))
    put(tmp_path / "images/b.jpg", jpeg((0, 0, 250)))
    two = " two words " if suffix == ".tsv" else " two\nlines "
    rows = [("images/b.jpg", 'Ein Café, "blau"'), ("images/a.jpg", two), ("gone.jpg", "lost")]
    source = open_source(str(table(tmp_path / f"set{suffix}", rows)))
    assert source.name == "set"
    assert source.labels is None
    assert source.captions is not None
    assert list(source.captions) == ['Ein Café, "blau"', two.strip(), "lost"]
    assert colour_of(source, 0)[2] > 200
    with pytest.raises(OSError, match="No such file"):
        source.read(2)
    other = open_source(
        str(table(tmp_path / f"other{suffix}", rows, ("file", "text"))), image_column="file", caption_column="text"
    )
    assert other.key() == source.key()
    table(tmp_path / f"other{suffix}", [rows[0], ("images/a.jpg", "changed"), rows[2]])
    assert open_source(str(tmp_path / f"other{suffix}")).key() != source.key()


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([("a.jpg", "x")], ("path", "text"), "has no column 'caption', only 'path', 'text'"),
        ([("a.jpg", "x"), ("b.jpg", "  ")], ("path", "caption"), r"(line 3|row 2): empty caption"),
        ([("../../etc/passwd", "x")], ("path", "caption"), "leaves"),
        ([("a.jpg", "x"), ("http://a.org/b.jpg", "x")], ("path", "caption"), r"(line 3|row 2): .* is a URL"),
        ([("", "x")], ("path", "caption"), "is no path"),
        ([], ("path", "caption"), "holds no rows"),
    ],
)
def test_a_bad_table(tmp_path, suffix, rows, columns, message):
    with pytest.raises(UserError, match=message):
        open_source(str(table(tmp_path / f"t{suffix}", rows, columns)))


@pytest.mark.parametrize(
    "content", [b"", b"path,caption\n\xff\xfe,x\n", b'path,caption\n"a.jpg,x\n', b"path,caption\na.jpg\n", b"\0\0\0"]
)
def test_a_csv_that_is_none(tmp_path, content):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"t.csv") as caught:
        open_source(str(tmp_path / "t.csv"))
    assert "\n" not in str(caught.value)


def test_a_parquet_file_that_is_none(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "t.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        open_source(str(tmp_path / "t.parquet"))
    parquet.write_table(pa.table({"path": ["a", None], "caption": ["x", None]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="row 2: empty caption"):
        open_source(str(tmp_path / "t.parquet"))
    parquet.write_table(pa.table({"path": [1], "caption": ["x"]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="must hold text"):
        open_source(str(tmp_path / "t.parquet"))


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'vilu\[parquet\]'"):
        open_source(str(tmp_path / "t.parquet"))


# ---------------------------------------------------------------------- WebDataset shards


def test_shards_by_every_kind_of_name(tmp_path):
    for number, colour in enumerate([(250, 0, 0), (0, 250, 0), (0, 0, 250)]):
        shard(tmp_path / f"{number:03d}.tar", captioned(number, colour))
    for name, count in (("", 3), ("/*.tar", 3), ("/{000..001}.tar", 2), ("/{000,002}.tar", 2), ("/001.tar", 1)):
        source = open_source(f"{tmp_path}{name}")
        assert len(source) == count
        assert source.captions[-1] == f"caption {1 if count == 1 or '..' in name else 2}"
    source = open_source(str(tmp_path))
    for i in range(3):
        assert int(np.argmax(colour_of(source, i))) == i
    assert "001.tar: 0001.jpg" in source.where(1)


def test_what_a_shard_may_hold(tmp_path):
    members = [
        ("dir/a.extra.jpg", jpeg()),  # another view of the same sample
        ("dir/a.json", json.dumps({"caption": "from json", "width": 3}).encode()),
        ("dir/a.jpg", jpeg((250, 0, 0))),
        ("other/a.JPG", jpeg((0, 0, 250))),  # the same basename in another folder is another sample
        ("other/a.txt", b" from text \n"),
        ("__meta__.txt", b"no image"),
        ("../../evil.jpg", jpeg()),  # nothing is unpacked: the name does no harm
        ("../../evil.txt", b"evil"),
    ]
    path = shard(tmp_path / "a.tar", members, format=tarfile.PAX_FORMAT)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    source = open_source(str(path))
    assert source.captions is not None
    assert list(source.captions) == ["from json", "from text", "evil"]
    assert colour_of(source, 0)[0] > 200
    assert colour_of(source, 1)[2] > 200


def test_shards_with_labels(tmp_path):
    members = [(f"{i}.{kind}", data) for i in range(4) for kind, data in (("jpg", jpeg()), ("cls", b"%d" % (i % 2)))]
    path = shard(tmp_path / "a.tar", [*members, ("0.txt", b"unused")])
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    source = open_source(str(path))
    assert source.labels.tolist() == [0, 1, 0, 1]
    assert source.class_names == ("cat", "dog")
    shard(path, [("0.jpg", jpeg()), ("0.cls", b"5")])
    with pytest.raises(UserError, match=r"labels must lie in 0\.\.1"):
        open_source(str(path))


def test_a_missing_caption_is_counted_and_too_many_stop_it(tmp_path):
    members = [m for i in range(20) for m in captioned(i, (9, 9, 9))]
    path = shard(tmp_path / "a.tar", [*members, ("x.jpg", jpeg()), ("y.jpg", jpeg()), ("y.txt", b" \n")])
    source = open_source(str(path))
    assert len(source) == 20
    assert source.skipped == (f"{path}: x.jpg: has no caption", f"{path}: y.jpg: has no caption")
    shard(path, [*members, *((f"x{i}.jpg", jpeg()) for i in range(3))])
    with pytest.raises(UserError, match=r"3 of 23 samples cannot be paired; the first: .*x0.jpg"):
        open_source(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "plain, uncompressed tar"),
        (b"no tar at all" * 100, "plain, uncompressed tar"),
        (b"\x1f\x8b\x08\0" + b"x" * 600, "plain, uncompressed tar"),
    ],
)
def test_a_shard_that_is_none(tmp_path, content, message):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path / "a.tar"))


def test_shards_without_images_or_texts(tmp_path):
    with pytest.raises(UserError, match=r"hold no .* members"):
        open_source(str(shard(tmp_path / "a.tar", [("a.txt", b"x")])))
    with pytest.raises(UserError, match="neither"):
        open_source(str(shard(tmp_path / "b.tar", [("a.jpg", jpeg())])))


def test_a_shard_cut_short(tmp_path):
    path = shard(tmp_path / "a.tar", [m for i in range(5) for m in captioned(i, (1, 2, 3))])
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar]
    for end in (headers[1] - 600, headers[1] + 100, headers[2], headers[4] + 300, headers[9] + 512):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"a\.tar: (is cut short|cannot be read as a plain)"):
            open_source(str(path))
    # A header damaged in the middle must not pass for the end, either.
    path.write_bytes(whole[: headers[4]] + b"?" * 512 + whole[headers[4] + 512 :])
    with pytest.raises(UserError, match="damaged after"):
        open_source(str(path))


def test_the_index_of_a_shard_is_kept_until_the_shard_changes(tmp_path):
    path = shard(tmp_path / "a.tar", captioned(0, (9, 9, 9)))
    cache = tmp_path / "cache"
    first = open_source(str(path), cache=cache)
    index = next((cache / "shards").iterdir())
    assert [p.suffix for p in (cache / "shards").iterdir()] == [".json"]
    index.write_text(index.read_text().replace("caption 0", "from the index"))
    assert captions_of(open_source(str(path), cache=cache)) == ["from the index"]
    index.write_text("[{")
    assert open_source(str(path), cache=cache).key() == first.key()
    shard(path, captioned(7, (9, 9, 9)))
    assert captions_of(open_source(str(path), cache=cache)) == ["caption 7"]


@SMALL
@given(st.data())
def test_any_damage_to_a_shard_is_one_line_or_none(tmp_path, data):
    path = shard(tmp_path / "a.tar", [m for i in range(3) for m in captioned(i, (5, 5, 5))])
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, 4000))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([None, 1000, 2000]))])
    told = ""
    try:
        source = open_source(str(path))
        for i in range(len(source)):
            source.read(i)
    except (UserError, ImageError) as error:
        told = str(error)
    assert "\n" not in told


def test_braces():
    assert expand("a/{008..011}.tar") == [f"a/{i:03d}.tar" for i in range(8, 12)]
    assert expand("{9..10}-{x,y}.tar") == ["9-x.tar", "9-y.tar", "10-x.tar", "10-y.tar"]
    assert expand("plain.tar") == ["plain.tar"]
    for bad in ("{9..1}.tar", "{0..99999999}.tar", "{0..999}{0..999}{0..999}.tar"):
        with pytest.raises(UserError, match="shards"):
            expand(bad)


# ---------------------------------------------------------------------- the embedded ones


def test_the_embedded_data_sets():
    train, test = (open_source(dataset="digits", split=split) for split in ("train", "test"))
    assert len(train.class_names) == 10
    assert train.labels is not None
    assert len(train) == len(train.labels) > 600
    assert train.read(0).shape == (64, 64, 3)
    assert train.key() != test.key()
    assert train.key() == open_source(dataset="digits").key()


@pytest.fixture
def few_shapes(monkeypatch):
    from vilu.data import registry

    monkeypatch.setattr(registry, "SHAPES", {"train": 40, "test": 20})
    monkeypatch.setattr(registry, "CAPTIONS", {"train": 30, "test": 10})
    registry._embedded.cache_clear()
    yield
    registry._embedded.cache_clear()


def test_shapes_with_labels_and_with_captions(few_shapes):
    closed, captions = open_source(dataset="shapes"), open_source(dataset="shapes-captions")
    assert len(closed) == 40
    assert len(closed.class_names) == 36
    assert captions.captions is not None
    assert len(captions) == len(captions.captions) == 30
    assert captions.labels is None
    assert captions.captions[0].startswith("a photo of a")


# ---------------------------------------------------------------------- batches and augmentation


def gradient(count=20, size=48):
    x = np.arange(count * size * size * 3, dtype=np.uint64).reshape(count, size, size, 3)
    return ArraySource(
        name="g", images=(x * 2654435761 >> 7).astype(np.uint8), labels=np.arange(count) % 2, class_names=("a", "b")
    )


def test_batches_follow_the_order_whatever_the_threads():
    source = gradient()
    order = np.random.default_rng(0).permutation(20)
    transform = augment(16, np.random.default_rng([3, 1]))
    results = [list(batches(source, transform, order, 6, workers)) for workers in (1, 4)]
    for got in results:
        assert [len(rows) for rows, _ in got] == [6, 6, 6, 2]
        assert np.array_equal(np.concatenate([rows for rows, _ in got]), order)
        assert got[0][1].shape == (6, 16, 16, 3)
        assert got[0][1].dtype == np.uint8
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(*results, strict=True))
    # An image's pixels depend on seed, epoch and row, not on where in the epoch it comes.
    same = dict(zip(order.tolist(), np.concatenate([p for _, p in results[0]]), strict=True))
    _, pixels = next(batches(source, transform, [7], 1))
    assert np.array_equal(pixels[0], same[7])
    other = augment(16, np.random.default_rng([3, 2]))
    assert not np.array_equal(next(batches(source, other, [7], 1))[1][0], same[7])


def test_batches_take_any_transform_and_skip_what_cannot_be_read(tmp_path):
    folder(tmp_path, per_class=10)
    put(tmp_path / "zebra/3.jpg", b"not an image")
    source = open_source(str(tmp_path))
    skipped: list[str] = []
    got = list(batches(source, lambda im: np.asarray(im.resize((4, 4))), range(20), 7, skipped=skipped))
    assert sum(len(rows) for rows, _ in got) == 19
    assert 13 not in np.concatenate([rows for rows, _ in got])
    assert len(skipped) == 1
    assert skipped[0].startswith(str(tmp_path / "zebra/3.jpg"))
    for i in range(3):
        put(tmp_path / f"zebra/{i}.jpg", jpeg()[:200])
    with pytest.raises(UserError, match="of 20 images cannot be read"):
        list(batches(open_source(str(tmp_path)), augment(8, np.random.default_rng(0)), range(20), 7))


def test_the_augmentation_is_the_published_one():
    """Area uniform in 8% to 100%, ratio log-uniform in 3/4 to 4/3, half of them flipped."""
    boxes = [Augment(8, 5)._box(200, 200, np.random.default_rng(i)) for i in range(3000)]
    areas = np.array([w * h / 40000 for _, _, w, h in boxes])
    ratios = np.array([w / h for _, _, w, h in boxes])
    assert all(x >= 0 and y >= 0 and x + w <= 200 and y + h <= 200 for x, y, w, h in boxes)
    assert 0.07 < areas.min() < 0.1
    assert areas.max() > 0.9
    assert 0.73 < ratios.min() < 0.8
    assert 1.25 < ratios.max() < 1.36
    assert abs(np.log(ratios).mean()) < 0.02
    # Nothing but the flip tells left from right: half of the crops of a ramp fall instead of rising.
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (200, 1)))
    rising = [int(p[0, 0, 0]) < int(p[0, -1, 0]) for p in (Augment(8, 5).at(i, ramp) for i in range(400))]
    assert 150 < sum(rising) < 250


@SMALL
@given(st.integers(1, 600), st.integers(1, 600), st.integers(0, 50))
def test_a_crop_is_inside_its_image(width, height, row):
    x, y, w, h = Augment(8, 1)._box(width, height, np.random.default_rng(row))
    assert x >= 0
    assert y >= 0
    assert w >= 1
    assert h >= 1
    assert x + w <= width
    assert y + h <= height


def test_batches_are_decoded_while_the_caller_works():
    """The second batch is held back until the caller has the first; it is then decoded without being asked for."""
    working, ahead = threading.Event(), threading.Event()
    enlarged, images = augment(8, np.random.default_rng(0)), itertools.count()

    def transform(image):
        if next(images) == 8 and working.wait(60):
            ahead.set()
        return enlarged(image)

    with closing(batches(gradient(64, 8), transform, range(64), 8, workers=1)) as found:
        next(found)
        working.set()
        assert ahead.wait(60), "nothing is decoded while the caller works"
        assert sum(len(rows) for rows, _ in found) == 56


def test_an_abandoned_iterator_leaves_no_threads():
    iterator = batches(gradient(), augment(8, np.random.default_rng(0)), range(20), 2)
    next(iterator)
    iterator.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
