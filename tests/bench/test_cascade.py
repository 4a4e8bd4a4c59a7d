"""bench/cascade.py: the images of a load."""

import pytest

from bench.cascade import mixed
from vilu import UserError


@pytest.mark.parametrize(("share", "doubtful"), [(0.0, 0), (0.25, 4), (1.0, 16)])
def test_the_stated_share_of_the_images_goes_on_and_is_spread(share, doubtful):
    found = mixed([b"calm 1", b"calm 2"], [b"doubt"], share, 16)
    marks = [image == b"doubt" for image in found]
    assert (len(found), sum(marks)) == (16, doubtful)
    if doubtful == 4:
        assert [sum(marks[i : i + 4]) for i in range(0, 16, 4)] == [1, 1, 1, 1]
        assert found.count(b"calm 1") == found.count(b"calm 2") == 6


def test_images_of_one_kind_alone_are_no_cascade():
    with pytest.raises(UserError, match="splits none"):
        mixed([b"calm"], [], 0.25)
