"""Data as people bring it: split folders, caption files and shards of other programs, names that are not text.

Each input is from a public report about a system that does this job. What cannot be understood is refused in one line.
"""

import os

import pytest

from tests.support.files import captioned, captions_of, folder, jpeg, put, shard
from vilu.data import open_source
from vilu.data.image_files import image_files
from vilu.data.splits import split_named
from vilu.errors import UserError

# ---------------------------------------------------------------------- splits

SPLIT_NAMES = {
    "train": ["train", "Train", "TRAINING", "training_set", "trainset", "train2017", "seg_train"],
    "val": ["val", "valid", "Validation", "dev", "VAL", "val-images"],
    "test": ["test", "Testing", "test_set", "TEST"],
}


def test_names_of_splits():
    for split, names in SPLIT_NAMES.items():
        assert {split_named(name) for name in names} == {split}
    for name in ("ship", "latest", "test bench", "strain", "devil", "values", "images", "trainer", "2017", "", "."):
        assert split_named(name) is None


@pytest.mark.parametrize("train", SPLIT_NAMES["train"])
@pytest.mark.parametrize(("val", "test"), list(zip(SPLIT_NAMES["val"], SPLIT_NAMES["test"], strict=False)))
def test_folders_named_as_splits_are_splits(tmp_path, train, val, test):
    for name, count in ((train, 3), (val, 2), (test, 1)):
        folder(tmp_path / name, per_class=count)
    put(tmp_path / "__MACOSX" / train / "zebra" / "._0.jpg")
    put(tmp_path / "__MACOSX" / "zebra" / "0.jpg")
    put(tmp_path / ".cache" / "zebra" / "0.jpg")
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    (tmp_path / "data.yaml").write_text("names: []")
    for split, name, count in (("train", train, 3), ("val", val, 2), ("valid", val, 2), ("TEST", test, 1)):
        source = open_source(str(tmp_path), split=split)
        assert source.class_names == ("sea lion", "zebra")
        assert len(source) == 2 * count
        assert all(source.where(i).startswith(str(tmp_path / name)) for i in range(len(source)))


def test_a_split_alone_and_a_split_without_a_class(tmp_path):
    folder(tmp_path / "Train")
    (tmp_path / "test").mkdir()
    assert len(open_source(str(tmp_path))) == 6
    with pytest.raises(UserError, match="has no split 'test', only train"):
        open_source(str(tmp_path), split="test")
    # A small split may lack a class. Its labels still count in the classes of the training data.
    put(tmp_path / "test" / "zebra" / "0.jpg")
    test = open_source(str(tmp_path), split="test")
    assert (test.class_names, test.labels.tolist()) == (("sea lion", "zebra"), [1])


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (["train/0.jpg", "ship/0.jpg"], "'train' is named as a split, 'ship' beside it is not. If 'train' is a class"),
        (["train/a/0.jpg", "test/a/0.jpg", "train/b/0.jpg", "unlabelled/0.jpg"], "'unlabelled' beside it is not"),
        (["train/0.jpg", "test/0.jpg"], "train: is named as a split, but its images are not in class directories"),
        (["train/a/0.jpg", "train/b/0.jpg", "Training/a/0.jpg"], "both name the train split"),
        (["cat/train/0.jpg", "cat/test/0.jpg", "dog/0.jpg"], "cat: holds 'test', which is named as a split, below"),
        (["cat/a/b/dev/0.jpg", "dog/0.jpg"], "cat: holds 'dev'"),
        (["train/a/0.jpg", "train/test/0.jpg", "train/b/0.jpg"], "train/test: is named as a split and lies in another"),
        (["robo/train/a/0.jpg", "robo/train/b/0.jpg", "robo/test/a/0.jpg"], "found 1; is the data in .*/robo[?]"),
        (["train/a/0.jpg", "train/b/0.jpg", "val/a/0.jpg", "val/c/0.jpg"], "class names do not match .*'b', 'c'"),
    ],
)
def test_splits_that_cannot_be_understood_are_refused(tmp_path, paths, said):
    for path in paths:
        put(tmp_path / path)
    with pytest.raises(UserError, match=said) as caught:
        open_source(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (["fold1/a/0.jpg", "fold1/b/0.jpg", "fold2/a/0.jpg", "fold2/b/0.jpg"], "'fold1' and 'fold2' hold 'a' and 'b'"),
        (
            [f"{s}/{c}/0.jpg" for s in ("seen", "holdout", "extra") for c in "abc"],
            "'extra' and all others hold 'a' and",
        ),
        (
            [f"{s}/{c}/0.jpg" for s, cs in (("photo", "abc"), ("sketch", "bcd")) for c in cs],
            "'sketch' hold 'b' and 'c'",
        ),
    ],
)
def test_splits_and_domains_of_other_names_are_no_classes(tmp_path, paths, said):
    for path in paths:
        put(tmp_path / path)
    with pytest.raises(UserError, match=said):
        open_source(str(tmp_path))
    top = paths[0].split("/")[0]
    assert set(open_source(str(tmp_path / top)).class_names) == {
        p.split("/")[1] for p in paths if p.startswith(f"{top}/")
    }
    put(tmp_path / top / "cover.jpg")  # its images lie directly in it, so it is a class
    assert top in open_source(str(tmp_path)).class_names


def test_images_of_other_kinds_are_not_left_out_without_a_word(tmp_path):
    folder(tmp_path)
    put(tmp_path / "zebra" / "scan.TIFF")
    source = open_source(str(tmp_path))
    assert len(source) == 6
    assert source.skipped == (
        f"{tmp_path}/zebra/scan.TIFF: is not .jpg, .png or .webp; convert it, or rename it if it is a JPEG",
    )
    put(tmp_path / "okapi" / "deep" / "0.heic")
    with pytest.raises(UserError, match=r"okapi/deep/0\.heic: is not .*; 'okapi' holds no other images"):
        open_source(str(tmp_path))


def test_classes_with_folders_of_their_own(tmp_path):
    for path in ("cat/indoor/0.jpg", "cat/outdoor/0.jpg", "dog/beach/0.jpg", "dog/park/0.jpg", "dog/indoor/0.jpg"):
        put(tmp_path / path)
    assert open_source(str(tmp_path)).class_names == ("cat", "dog")


def test_links_below_a_class_are_followed(tmp_path):
    folder(tmp_path / "set")
    put(tmp_path / "elsewhere" / "new.jpg")
    (tmp_path / "set" / "zebra" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "zebra" / "back").symlink_to(tmp_path / "set" / "zebra")
    assert open_source(str(tmp_path / "set")).labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    (tmp_path / "set" / "sea_lion" / "other").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"zebra/more: is the same folder as .*sea_lion/other, so its images would"):
        open_source(str(tmp_path / "set"))


def test_shards_and_rows_of_other_splits_are_left_out(tmp_path):
    for number, name in enumerate(("cc3m-train-0000", "cc3m-validation-0000", "cc3m-train-0001")):
        shard(tmp_path / f"{name}.tar", captioned(number, (9, 9, 9)))
    for data in (tmp_path, tmp_path / "*.tar"):
        assert captions_of(open_source(str(data))) == ["caption 0", "caption 2"]
        assert captions_of(open_source(str(data), split="valid")) == ["caption 1"]
        with pytest.raises(UserError, match="has no split 'test', only train, val"):
            open_source(str(data), split="test")
    for number, name in enumerate(("train", "Validation")):
        shard(tmp_path / "folders" / name / "0000.tar", captioned(number, (9, 9, 9)))
    for data in (tmp_path / "folders", tmp_path / "folders" / "*" / "*.tar"):
        assert captions_of(open_source(str(data))) == ["caption 0"]
        assert captions_of(open_source(str(data), split="val")) == ["caption 1"]
    shard(tmp_path / "more.tar", captioned(7, (9, 9, 9)))
    with pytest.raises(UserError, match=r"more\.tar names no split"):
        open_source(str(tmp_path))
    table = tmp_path / "t.csv"
    table.write_text("path,caption,Split\na.jpg,a,train\nb.jpg,b,test\n")
    assert captions_of(open_source(str(table), split="test")) == ["b"]
    with pytest.raises(UserError, match="has no split 'val', only test, train"):
        open_source(str(table), split="val")
    table.write_text("path,caption,split\na.jpg,a,train\nb.jpg,b,gold\n")
    with pytest.raises(UserError, match="line 3: its split is 'gold'"):
        open_source(str(table))


def test_hidden_files_are_no_images(tmp_path):
    put(tmp_path / "a" / "img.jpg")
    hidden = ("a/._img.jpg", ".cache/x.jpg", ".ipynb_checkpoints/img-checkpoint.jpg", "__MACOSX/a/img.jpg")
    for name in (*hidden, "#recycle/x.jpg", "@eaDir/img.jpg", "lost+found/x.jpg", "System Volume Information/x.jpg"):
        put(tmp_path / name, b"no image")
    assert image_files(tmp_path) == [tmp_path / "a" / "img.jpg"]


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX alone")
@pytest.mark.parametrize("name", [b"caf\xe9/0.jpg", b"a/caf\xe9.jpg"])
def test_names_that_are_not_utf8_are_refused(tmp_path, name):
    folder(tmp_path)
    path = os.path.join(os.fsencode(tmp_path), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        with open(path, "wb") as file:
            file.write(jpeg())
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    with pytest.raises(UserError, match="its name is not UTF-8; rename it") as caught:
        open_source(str(tmp_path))
    str(caught.value).encode()
    with pytest.raises(UserError, match="its name is not UTF-8"):
        open_source(os.fsdecode(os.path.dirname(path) if name.startswith(b"caf") else path))


# ---------------------------------------------------------------------- caption tables


@pytest.mark.parametrize(
    ("name", "text", "captions"),
    [
        ("merge.tsv", 'img.jpg\t"quoted start only\nimg.jpg\tblue\nimg.jpg\tends with quote"\n',
         ['"quoted start only', "blue", 'ends with quote"']),
        ("midquote.TSV", 'img.jpg\ta 5" star\r\nimg.jpg\t"Hello" he said\r\n', ['a 5" star', '"Hello" he said']),
        ("escaped.tsv", "img.jpg\ta, b\\c 'd\n\nimg.jpg\te\u2028f\n", ["a, b\\c 'd", "e\u2028f"]),
        ("quoted.CSV", 'img.jpg,"a dog, a ""cat"""\nimg.jpg,a 5" star\n', ['a dog, a "cat"', 'a 5" star']),
        ("lines.csv", 'img.jpg,"two\nlines, here"\nimg.jpg,x\n', ["two\nlines, here", "x"]),
        ("mac.csv", "img.jpg,a\rimg.jpg,b\r", ["a", "b"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("mark", ["utf-8", "utf-8-sig"])
def test_captions_are_read_as_they_stand(tmp_path, name, text, captions, mark):
    end = "\r" if name == "mac.csv" else "\n"
    header = "path\tcaption" if name.lower().endswith(".tsv") else "path,caption"
    (tmp_path / name).write_bytes(f"{header}{end}{text}".encode(mark))
    assert captions_of(open_source(str(tmp_path / name))) == captions


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        (
            "comma.csv",
            b"img.jpg,A dog , a cat , and a man\nimg.jpg,Two boys\n",
            "line 2: has 4 fields, the header has 2",
        ),
        ("few.csv", b"img.jpg,a\nimg.jpg\n", "line 3: has 1 field, the header has 2"),
        ("after.csv", b'img.jpg,"two\nlines"\nimg.jpg,a,b\n', "line 4: has 3 fields"),
        ("merge.csv", b'img.jpg,"starts\nimg.jpg,blue\nimg.jpg,ends"\nimg.jpg,x\n', "line 2: a double quote opens"),
        ("mid.csv", b'img.jpg,a\nimg.jpg,"Hello" he said\n', "line 3: cannot be read as CSV"),
        ("open.csv", b'img.jpg,a\nimg.jpg,"never closed\n', "line 3: cannot be read as CSV"),
        ("tab.tsv", b"img.jpg\ta\tb\n", "line 2: has 3 fields, the header has 2"),
        ("latin.csv", b"img.jpg,a\nimg.jpg,caf\xe9\n", "line 3: is not UTF-8"),
        ("latin.tsv", b"img.jpg\tcaf\xe9\n", "line 2: is not UTF-8"),
        ("url.csv", b"https://a.org/img.jpg,a\n", "line 2: 'https://a.org/img.jpg' is a URL"),
        ("url.tsv", b"s3://bucket/img.jpg\ta\n", "line 2: 's3://bucket/img.jpg' is a URL"),
        ("empty.tsv", b"img.jpg\t \n", "line 2: empty caption"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, name, rows, said):
    header = b"path\tcaption\n" if name.endswith(".tsv") else b"path,caption\n"
    (tmp_path / name).write_bytes(header + rows)
    with pytest.raises(UserError, match=said) as caught:
        open_source(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_columns_of_other_names_and_absolute_paths(tmp_path):
    put(tmp_path / "img.jpg")
    table = tmp_path / "elsewhere" / "t.csv"
    put(table, f"file,text\n{tmp_path / 'img.jpg'},a star\n".encode())
    with pytest.raises(UserError, match=r"no column 'path', only 'file', 'text'; --image-column and --caption-column"):
        open_source(str(table))
    source = open_source(str(table), image_column="file", caption_column="text")
    assert source.read(0) == jpeg()
    for header, said in (
        ("path;caption", "a comma must stand between columns, not ';'"),
        ("path\tcaption", r"a comma must stand between columns, not '\\t'"),
        ("a.jpg,a star", "the first line must name the columns"),
    ):
        put(table, f"{header}\n".encode())
        with pytest.raises(UserError, match=said):
            open_source(str(table))
    put(table, b"path,caption,caption\na.jpg,a,b\n")
    with pytest.raises(UserError, match="has 2 columns 'caption'"):
        open_source(str(table))


@pytest.mark.parametrize("image", ["images/0.jpg", "0.jpg"])
def test_a_folder_with_a_table_names_it(tmp_path, image):
    put(tmp_path / image)
    put(tmp_path / "captions.tsv", b"")
    with pytest.raises(UserError, match=r"for captions name the table, such as .*captions\.tsv$"):
        open_source(str(tmp_path))


def test_parquet_in_capitals(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = {"url": ["https://a.org/b.jpg", "c.jpg"], "path": ["b.jpg", "c.jpg"], "caption": ["a", "b"]}
    parquet.write_table(pa.table(rows), tmp_path / "T.PARQUET")
    assert captions_of(open_source(str(tmp_path / "T.PARQUET"))) == ["a", "b"]
    with pytest.raises(UserError, match=r"row 1: .* is a URL"):
        open_source(str(tmp_path / "T.PARQUET"), image_column="url")


@pytest.mark.parametrize("data", ["https://a.org/t.csv", "s3://bucket/{0..9}.tar", "hf://datasets/a"])
def test_a_url_in_place_of_data(data):
    with pytest.raises(UserError, match=r"--data: .* is a URL, .* download the images first"):
        open_source(data)


# ---------------------------------------------------------------------- shards

GOOD = [member for i in range(20) for member in captioned(i, (9, 9, 9))]


def test_keys_with_dots_are_counted_and_named(tmp_path):
    """As webdataset has it, a key ends at the first dot of its basename."""
    dotted = [(f"shot-2.0{suffix}", data) for suffix, data in ((".jpg", jpeg()), (".txt", b"lost"))]
    path = shard(tmp_path / "few.tar", [*GOOD, *dotted])
    source = open_source(str(path))
    assert len(source) == 20
    assert source.skipped == (
        f"{path}: shot-2.0.jpg: has the key 'shot-2', which ends at the first dot of a name; rename it without the dot",
    )
    half = [(f"a-{i}.{i}{suffix}", data) for i in range(20) for suffix, data in ((".jpg", jpeg()), (".txt", b"x"))]
    with pytest.raises(
        UserError, match=r"20 of 40 samples cannot be paired; the first: .*a-0.0.jpg: has the key 'a-0'"
    ):
        open_source(str(shard(tmp_path / "half.tar", [*GOOD, *half])))
    with pytest.raises(UserError, match=r"20 of 20 samples cannot be paired"):
        open_source(str(shard(tmp_path / "all.tar", half)))
    # A second view of a sample has no caption of its own, and is not missed.
    assert open_source(str(shard(tmp_path / "views.tar", [*GOOD, ("0000.seg.png", jpeg())]))).skipped == ()
    # A folder's dots do not count.
    inside = [(f"v1.0/{name}", data) for name, data in GOOD]
    assert len(open_source(str(shard(tmp_path / "folder.TAR", inside)))) == 20


@pytest.mark.parametrize("kind", [".jpg", ".txt"])
def test_a_key_that_is_there_twice_is_paired_with_nothing(tmp_path, kind):
    twice = [("x.jpg", jpeg((250, 0, 0))), ("x.txt", b"red"), (f"x{kind}", jpeg() if kind == ".jpg" else b"blue")]
    path = shard(tmp_path / "a.tar", [*GOOD, *twice])
    source = open_source(str(path))
    assert captions_of(source) == [f"caption {i}" for i in range(20)]
    assert {line.partition("its key")[2] for line in source.skipped} == {
        f" 'x' has 2 {kind} members, so its text is not known"
    }
    with pytest.raises(UserError, match=r"samples cannot be paired; the first: .*x.jpg: its key 'x' has 2"):
        open_source(str(shard(path, twice)))


def test_texts_of_shards(tmp_path):
    more = [
        ("bom.jpg", jpeg()), ("bom.txt", b"\xef\xbb\xbfa star"),
        ("latin.jpg", jpeg()), ("latin.txt", b"caf\xe9"),
        ("lone.txt", b"no image"), ("__index__.txt", b"not a sample"), ("._bom.jpg", b"Apple's"),
        ("__MACOSX/q.jpg", b"Apple's"), ("./.cache/q.jpg", jpeg()), ("@eaDir/lone.txt", b"a server's"),
    ]  # fmt: skip
    source = open_source(str(shard(tmp_path / "a.tar", [*GOOD, *more])))
    assert captions_of(source)[-1] == "a star"
    assert [line.partition(".tar: ")[2] for line in source.skipped] == [
        "latin.jpg: its text is not UTF-8, or longer than 1048576 bytes",
        "lone: has a text, but no image",
    ]
