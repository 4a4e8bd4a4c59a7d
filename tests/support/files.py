"""Small images, image folders and shards that tests write."""

import io
import tarfile

from PIL import Image


def jpeg(colour=(200, 30, 30), size=(40, 30), kind="JPEG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, kind)
    return out.getvalue()


def put(path, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg() if data is None else data)


def folder(root, classes=("sea_lion", "zebra"), per_class=3):
    """An image folder whose images all differ."""
    for number, name in enumerate(classes):
        for i in range(per_class):
            put(root / name / f"{i}.jpg", jpeg((40 * number, 9 * i, 90)))
    return root


def shard(path, members, **kwargs):
    """A tar file of (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **kwargs) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def captions_of(source) -> list[str]:
    return list(source.captions)


def captioned(number, colour):
    """The members of one sample of a shard."""
    return [(f"{number:04d}.jpg", jpeg(colour)), (f"{number:04d}.txt", f"caption {number}".encode())]
