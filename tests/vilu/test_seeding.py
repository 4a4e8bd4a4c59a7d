"""Library code leaves the caller's random numbers as they were."""

import pytest
import torch

from tests.support.embeddings import unit_rows
from vilu import load_clip
from vilu.recipes import recipe_named
from vilu.seeding import seeded
from vilu.train import train_head


def test_the_block_draws_as_after_manual_seed():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with seeded(7):
        assert torch.equal(torch.rand(3), expected)


def test_an_error_in_the_block_gives_the_state_back():
    before = torch.get_rng_state()
    block = seeded(7)
    block.__enter__()
    torch.rand(3)
    assert not block.__exit__(KeyError, KeyError(), None)
    assert torch.equal(torch.get_rng_state(), before)


def load_random_weights():
    first = load_clip("RN50", "random").spec.fingerprint
    torch.default_generator.manual_seed(12345)  # whatever the caller's numbers are, the weights are the same
    assert load_clip("RN50", "random").spec.fingerprint == first


def load_own_weights():
    load_clip()


def refuse():
    with pytest.raises(ValueError, match="open_clip"):
        load_clip("no such model", "random")


def train():
    rows = unit_rows(40, 8, 1).float()
    train_head(rows, torch.arange(40) % 3, unit_rows(3, 8, 2).float(), recipe=recipe_named("plain", epochs=1))


@pytest.mark.parametrize("work", [load_random_weights, load_own_weights, refuse, train])
def test_the_callers_generators_are_not_touched(monkeypatch, work):
    """Neither the CPU's nor, where there are none to look at, the GPUs': whatever reseeds them is not called."""
    for name in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, lambda _: pytest.fail("a GPU's generator was reseeded"))
    torch.default_generator.manual_seed(12345)
    before = torch.get_rng_state()
    work()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_other_gpus_and_this_one_go_on_as_before():
    torch.cuda.manual_seed(1)
    before = torch.cuda.get_rng_state()
    with seeded(7, torch.device("cuda")):
        drawn = torch.rand(3, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), before)
    torch.cuda.manual_seed(7)
    assert torch.equal(torch.rand(3, device="cuda"), drawn)
