import json
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.authors import AuthorsHead
from tests.support.embeddings import unit_rows
from tests.support.public_data import DATA
from vilu import Checkpoint, ClassSet, ClipSpec, UserError, ViLUHead, load_checkpoint, save_checkpoint
from vilu.authors import OFFICIAL_INPUTS
from vilu.checkpoint import SAMPLES, TEXT
from vilu.outlier import fit_outlier


def make_checkpoint(**head_options):
    torch.manual_seed(0)
    head = ViLUHead(16, hidden=(8, 4), **head_options)
    class_set = ClassSet(("cat", "dog", "owl"), ("a photo of a {}.",), unit_rows(3, 16, 1).float())
    clip = ClipSpec("ViT-B-32", "openai", 99.5, "ab" * 32)
    samples = torch.arange(24, dtype=torch.int16).view(3, 8)
    return Checkpoint(head.eval(), clip, class_set, 0.25, {"auroc": 0.9}, samples)


@pytest.mark.parametrize("projection", ["identity", "shared", "separate"])
@pytest.mark.parametrize("parts", [("image", "predicted", "attended"), ("image",)], ids="+".join)
def test_round_trip(tmp_path, projection, parts):
    before = make_checkpoint(projection=projection, parts=parts)
    save_checkpoint(before, tmp_path / "a.safetensors")
    after = load_checkpoint(tmp_path / "a.safetensors")
    assert (after.clip, after.threshold, after.meta) == (before.clip, 0.25, {"auroc": 0.9})
    assert (after.class_set.names, after.class_set.templates) == (before.class_set.names, before.class_set.templates)
    assert after.samples is not None
    assert after.samples.tolist() == torch.arange(24).view(3, 8).tolist()
    assert torch.equal(after.class_set.text_embeddings, before.class_set.text_embeddings)
    v, t = unit_rows(5, 16, 2).float(), before.class_set.text_embeddings
    assert torch.equal(after.head(v, t), before.head(v, t))
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_checkpoint_without_fingerprints_still_loads(tmp_path):
    save_checkpoint(make_checkpoint(), tmp_path / "a.safetensors")
    rewrite(tmp_path / "a.safetensors", lambda tensors, header: tensors.pop(SAMPLES))
    assert load_checkpoint(tmp_path / "a.safetensors").samples is None


def test_an_outlier_score_is_kept(tmp_path):
    path = tmp_path / "a.safetensors"
    score = fit_outlier(unit_rows(40, 16, 3), torch.arange(40) % 3, unit_rows(3, 16, 1))
    for before in (score, score.calibrated(unit_rows(60, 16, 4), 0.1)):
        save_checkpoint(replace(make_checkpoint(), outlier=before), path)
        after = load_checkpoint(path).outlier
        assert (after.threshold, after.refused) == (before.threshold, before.refused)
        assert torch.equal(after.factor, before.factor)
        assert torch.equal(after.prototypes, before.prototypes)
        assert torch.equal(after.mean, before.mean)
    good = path.read_bytes()
    for change, message in (
        (lambda t, h: t.pop("outlier.factor"), "outlier.factor is missing"),
        (lambda t, h: h["outlier"].update(prototypes=4), r"outlier.prototypes has shape \(3, 16\), expected \(4, 16\)"),
        (lambda t, h: h["outlier"].update(prototypes=0), "bad outlier.prototypes"),
        (lambda t, h: h["outlier"].update(prototypes=10**400), "bad outlier.prototypes|has shape"),
        (lambda t, h: h["outlier"].update(threshold="x"), "bad outlier.threshold"),
        (lambda t, h: h["outlier"].update(threshold=float("inf")), "bad outlier.threshold"),
        (lambda t, h: h["outlier"].update(threshold=10**400), "bad outlier.threshold"),
        (lambda t, h: h["outlier"].update(threshold=1e30), "the threshold must be in"),
        (lambda t, h: h["outlier"].update(refused=float("nan")), "bad outlier.refused"),
        (lambda t, h: t["outlier.prototypes"].mul_(2), "norm 1, the longest has 2"),
        (lambda t, h: t["outlier.mean"].fill_(float("nan")), "outlier.mean holds a value that is not finite"),
        (lambda t, h: h["outlier"].update(refused=None), "belong together"),
        (lambda t, h: h["outlier"].pop("refused"), "bad outlier"),
        (lambda t, h: h.pop("outlier"), "outlier.factor does not belong"),
    ):
        path.write_bytes(good)
        rewrite(path, change)
        with pytest.raises(UserError, match=message):
            load_checkpoint(path)


def test_nothing_is_written_over_a_good_file_when_saving_fails(tmp_path):
    path = tmp_path / "a.safetensors"
    good = make_checkpoint()
    save_checkpoint(good, path)
    kept = path.read_bytes()
    bad = make_checkpoint()
    bad.head.mlp[0].weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"head\.mlp\.0\.weight"):
        save_checkpoint(bad, path)
    assert path.read_bytes() == kept
    assert len(list(tmp_path.iterdir())) == 1


def rewrite(path, change):
    """Write the checkpoint again with its tensors and header changed by `change(tensors, header)`."""
    from safetensors import safe_open

    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["vilu"])
    change(tensors, header)
    save_file(tensors, path, metadata={"vilu": json.dumps(header)})


HOSTILE = {
    "missing tensor": (lambda t, h: t.pop("head.mlp.2.bias"), r"head\.mlp\.2\.bias is missing"),
    "extra tensor": (lambda t, h: t.update(extra=torch.zeros(1)), "extra does not belong"),
    "shape": (lambda t, h: t.update({"head.mlp.0.bias": torch.zeros(9)}), r"head\.mlp\.0\.bias has shape \(9,\)"),
    "nan": (lambda t, h: t["head.mlp.0.bias"].fill_(float("nan")), r"head\.mlp\.0\.bias holds .* not finite"),
    "infinite text": (lambda t, h: t["class_set.text_embeddings"].fill_(float("inf")), "text_embeddings holds"),
    "not unit rows": (lambda t, h: t["class_set.text_embeddings"].mul_(2), "norm 2"),
    "integer tensor": (lambda t, h: t.update({"head.mlp.0.bias": torch.zeros(8, dtype=torch.int64)}), "int64"),
    "huge width": (lambda t, h: h["head"].update(dim=1 << 40), "widths must be"),
    "many layers": (lambda t, h: h["head"].update(hidden=[4] * 1000), "more than 16"),
    "unknown head option": (lambda t, h: h["head"].update(evil=1), "bad head"),
    "head is a list": (lambda t, h: h.update(head=[]), "bad head"),
    "newer version": (lambda t, h: h.update(version=2), "version 2"),
    "threshold": (lambda t, h: h.update(threshold="0.5"), "bad threshold"),
    "clip": (lambda t, h: h.update(clip={"name": 1}), "bad clip"),
    "names": (lambda t, h: h["class_set"].update(names=["cat", "cat", "owl"]), "repeats"),
    "too few names": (lambda t, h: h["class_set"].update(names=["cat"]), r"shape \(3, 16\), expected \(1, 16\)"),
    "one class": (
        lambda t, h: (h["class_set"].update(names=["cat"]), t.update({TEXT: t[TEXT][:1]})),
        "at least two classes, found only 'cat'",
    ),
    "wide fingerprints": (
        lambda t, h: t.update({SAMPLES: torch.zeros(3, 9, dtype=torch.int16)}),
        "fingerprints is I16",
    ),
    "flat fingerprints": (lambda t, h: t.update({SAMPLES: torch.zeros(8, dtype=torch.int16)}), "fingerprints is I16"),
    "float fingerprints": (lambda t, h: t.update({SAMPLES: torch.zeros(3, 8)}), "fingerprints is F32"),
    "many fingerprints": (
        lambda t, h: t.update({SAMPLES: torch.zeros((1 << 20) + 1, 8, dtype=torch.int16)}),
        r"expected I16 \(at most 1048576, 8\)",
    ),
    "extra field": (lambda t, h: h.update(run="rm -rf"), "set of fields"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_checkpoints_give_one_line(tmp_path, case):
    path = tmp_path / "bad.safetensors"
    save_checkpoint(make_checkpoint(), path)
    change, message = HOSTILE[case]
    rewrite(path, change)
    with pytest.raises(UserError, match=message) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "x"
    good = tmp_path / "good"
    save_checkpoint(make_checkpoint(), good)
    whole = good.read_bytes()
    plain = tmp_path / "plain.safetensors"
    save_file({"a": torch.zeros(2)}, plain)
    for content in (b"", b"PK", b"PK\x03\x04 cut", b"hello world, not a file", whole[:100], whole[:-7], b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(UserError, match=str(path)):
            load_checkpoint(path)
    for other in (tmp_path / "absent", tmp_path, plain):
        with pytest.raises(UserError, match=str(other)):
            load_checkpoint(other)


class Shout:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_a_pickle_is_never_run(tmp_path, capsys):
    torch.save({"state_dict": {"mlp.0.weight": torch.zeros(1, 1)}, "evil": Shout()}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match="read safely"):
        load_checkpoint(tmp_path / "evil.ckpt")
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps(Shout()))
    with pytest.raises(UserError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "raw.ckpt")
    assert "unpickled" not in capsys.readouterr().out


def official_head() -> AuthorsHead:
    """A head in the form of the authors' checkpoints: columns [v, z_attn, t_pred], one logit, high = correct."""
    model = AuthorsHead(16, hidden=(24, 12, 6))
    for projection in (model.in_proj_v, model.in_proj_t):
        projection.reset_parameters()
    return model.eval()


def official_file(path, model, iterations):
    state = model.state_dict()
    state["iteration_count"] = torch.tensor(iterations)
    meter = {"train_meter": {"loss": np.float64(0.5), "n": np.int64(3)}}
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {}, "scheduler": {}, **meter}, path)


@pytest.mark.parametrize(
    ("iterations", "options", "project"),
    [
        (1001, {}, True),
        (1000, {}, False),
        (300, {"n_iter_freeze_proj": 200}, True),
        (5000, {"keep_frozen": True}, False),
    ],
)
def test_official_layout_converts_exactly(tmp_path, iterations, options, project):
    torch.manual_seed(1)
    model = official_head()
    official_file(tmp_path / "vilu.ckpt", model, iterations)
    head = load_checkpoint(tmp_path / "vilu.ckpt", **options).head
    v, t = unit_rows(32, 16, 3).float(), unit_rows(9, 16, 4).float()
    with torch.no_grad():
        by_frozen = {}
        for model.frozen in (False, True):
            logit, _ = model(v, t)
            by_frozen[model.frozen] = 1 - torch.sigmoid(logit)
    expected, other = by_frozen[not project], by_frozen[project]
    np.testing.assert_allclose(head.failure_probability(v, t), expected, rtol=0, atol=1e-6)
    assert (head.failure_probability(v, t) - other).abs().max() > 1e-4  # the case tells the two apart


def official_input(inputs, v, t):
    """What the authors' forward gives its MLP, by the options concat and use_predicted_caption."""
    similarity = 100 * v @ t.T
    z = torch.softmax(similarity, dim=1) @ t
    part = {"image": v, "image+attended": v + z, "attended": z, "predicted": t[similarity.argmax(dim=1)]}
    return torch.cat([part[block] for block in inputs.split(",")], dim=1)


@pytest.mark.parametrize("inputs", OFFICIAL_INPUTS)
def test_every_form_of_the_official_layout_converts_exactly(tmp_path, inputs):
    torch.manual_seed(1)
    width = 16 * len(inputs.split(","))
    mlp = torch.nn.Sequential(torch.nn.Linear(width, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    state = {f"mlp.{name}": tensor for name, tensor in mlp.state_dict().items()}
    if "attended" in inputs:
        state |= {"in_proj_v.weight": torch.eye(16), "in_proj_t.weight": torch.eye(16)}
    torch.save({"state_dict": state | {"iteration_count": torch.tensor(0)}}, tmp_path / "x.ckpt")
    v, t = unit_rows(32, 16, 3).float(), unit_rows(9, 16, 4).float()
    expected = torch.sigmoid(-mlp(official_input(inputs, v, t)).squeeze(1)).detach()
    head = load_checkpoint(tmp_path / "x.ckpt", inputs=inputs).head
    np.testing.assert_allclose(head.failure_probability(v, t), expected, rtol=0, atol=1e-6)
    if "attended" in inputs and width == 32:
        with pytest.raises(UserError, match="two meanings: give inputs='image,attended'"):
            load_checkpoint(tmp_path / "x.ckpt")
    elif inputs != "image,predicted":  # without attention the width alone says nothing: "image" is meant
        assert torch.equal(load_checkpoint(tmp_path / "x.ckpt").head(v, t), head(v, t))
    for wrong in ("image,image", "image" if "attended" in inputs else "image+attended"):
        with pytest.raises(UserError, match="inputs"):
            load_checkpoint(tmp_path / "x.ckpt", inputs=wrong)


def test_official_layout_with_a_wrong_tensor(tmp_path):
    model = official_head()
    for change, message in (
        (lambda s: s.pop("in_proj_t.weight"), "in_proj_t.weight is missing"),
        (lambda s: s.update({"in_proj_t.weight": torch.zeros(16, 8)}), "in_proj_t.weight has shape"),
        (lambda s: s.update({"mlp.0.weight": torch.zeros(24, 40)}), "mlp.0.weight reads 40 columns"),
        (lambda s: s.pop("mlp.0.bias"), "mlp.0.bias is missing"),
        (lambda s: s.pop("iteration_count"), "iteration_count is missing"),
        (lambda s: s.update(other=torch.zeros(1)), "other does not belong"),
        (lambda s: s["mlp.2.weight"].fill_(float("inf")), "mlp.2.weight holds"),
    ):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        change(state)
        torch.save({"state_dict": state}, tmp_path / "x.ckpt")
        with pytest.raises(UserError, match=message):
            load_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize("name", ["cifar10", "eurosat", "dtd"])
def test_real_official_checkpoints(name):
    path = DATA / f"lvu_{name}.ckpt"
    scalar: Any = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [np.dtype, type(np.dtype("float64")), type(np.dtype("float32")), type(np.dtype("int64"))]
    with torch.serialization.safe_globals([*allowed, (scalar, "numpy._core.multiarray.scalar")]):
        state = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    v = unit_rows(64, 512, 5).float()
    x = v
    for i in (0, 2, 4):
        x = torch.relu(x @ state[f"mlp.{i}.weight"].T + state[f"mlp.{i}.bias"])
    logit = (x @ state["mlp.6.weight"].T + state["mlp.6.bias"]).squeeze(-1)
    head = load_checkpoint(path).head
    assert head.parts == ("image",)
    np.testing.assert_allclose(head.failure_probability(v), 1 - torch.sigmoid(logit), rtol=0, atol=1e-6)
