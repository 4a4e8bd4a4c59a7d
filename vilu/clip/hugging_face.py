"""A folder that transformers' `save_pretrained` wrote for a CLIPModel or a SiglipModel, as an open_clip model.

The weights are copied into open_clip's modules, so that such a model is trained, exported and served like all others.
Its embeddings equal those of transformers. SigLIP 2 of a fixed image size is a SiglipModel, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from vilu.clip.files import Weights, read_weights
from vilu.errors import UserError

FOLDER = "hf-dir:"
# What transformers takes where config.json does not say, by model type and tower.
DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "clip": {
        "text_config": {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 49408,
                        "max_position_embeddings": 77, "eos_token_id": 49407},
        "vision_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "patch_size": 32},
    },
    "siglip": {
        "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "vocab_size": 32000,
                        "max_position_embeddings": 64},
        "vision_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "patch_size": 16},
    },
}  # fmt: skip
BOTH = {
    "clip": {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "image_size": 224},
    "siglip": {"num_hidden_layers": 12, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "image_size": 224},
}
TANH = {"gelu_pytorch_tanh", "gelu_new"}
UNFIT = (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RuntimeError, AssertionError)
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
# Names of a transformer block's layers: transformers', open_clip's and timm's.
BLOCK = (
    ("self_attn.out_proj", "attn.out_proj", "attn.proj"),
    ("layer_norm1", "ln_1", "norm1"),
    ("layer_norm2", "ln_2", "norm2"),
    ("mlp.fc1", "mlp.c_fc", "mlp.fc1"),
    ("mlp.fc2", "mlp.c_proj", "mlp.fc2"),
)


def load_folder(folder: Path) -> nn.Module:
    """Load the model of a folder as an open_clip model.

    Raises:
        UserError: a file is missing or damaged, the model is of another type or has parts that open_clip lacks.
    """
    config = _read(folder / "config.json")
    kind = config.get("model_type")
    if kind not in DEFAULTS:
        raise UserError(f"{folder}: model type {kind!r} is not supported, only {' and '.join(map(repr, DEFAULTS))}")
    try:
        text, vision = (_tower(config, kind, side) for side in ("text_config", "vision_config"))
        preprocessing = _preprocessing(folder, kind, vision["image_size"])
        model = _clip(config, text, vision) if kind == "clip" else _siglip(text, vision)
        open_clip.model.set_model_preprocess_cfg(model, preprocessing)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except UNFIT as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: its settings describe no model that can be built ({reason})") from None
    path, found = _weights(folder)
    try:
        tensors = dict(_converted(path, found, kind, text, vision))
    except UNFIT:
        raise UserError(f"{path}: its tensors do not fit {folder / 'config.json'}") from None
    Weights(path, tensors, openai=False).load_into(model, f"the model in {folder / 'config.json'}")
    return model


def load_folder_tokenizer(folder: Path) -> Callable[[list[str]], Tensor]:
    """Load a folder's tokenizer through transformers, with the text cleaning that its model was trained with."""
    config = _read(folder / "config.json")
    settings = _read(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    kind = str(config.get("model_type"))
    text = {**DEFAULTS.get(kind, {}).get("text_config", {}), **(config.get("text_config") or {})}
    clean = "whitespace"  # CLIP's tokenizer lowers the case itself
    if kind == "siglip":
        own = str(settings.get("tokenizer_class", "")).startswith("SiglipTokenizer")
        clean = "canonicalize" if own else "lower"  # SigLIP 2 was trained on lower case with punctuation
    tokenizer: Callable[[list[str]], Tensor] = open_clip.tokenizer.HFTokenizer(
        str(folder), context_length=text.get("max_position_embeddings"), clean=clean
    )
    return tokenizer


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not JSON") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: holds no JSON object")
    return document


def _tower(config: Mapping[str, Any], kind: str, side: str) -> dict[str, Any]:
    """Return the settings of one tower, with transformers' defaults."""
    # transformers once wrote a second copy, which counts.
    given = {**(config.get(side) or {}), **(config.get(f"{side}_dict") or {})}
    return {**BOTH[kind], **DEFAULTS[kind][side], **{key: value for key, value in given.items() if value is not None}}


def _preprocessing(folder: Path, kind: str, side: int) -> dict[str, Any]:
    """Return the folder's image preprocessing in open_clip's words."""
    if (folder / "preprocessor_config.json").exists():
        found = _read(folder / "preprocessor_config.json")
    elif (folder / "processor_config.json").exists():
        found = _read(folder / "processor_config.json").get("image_processor") or {}
    else:
        found = {}
    clip = kind == "clip"
    size, crop = found.get("size", {"shortest_edge": side} if clip else {"height": side, "width": side}), None
    size = {"shortest_edge": size} if isinstance(size, int) else size
    if found.get("do_center_crop", clip):
        crop = found.get("crop_size", side)
        crop = [crop, crop] if isinstance(crop, int) else [crop.get("height"), crop.get("width")]
    shortest = size.get("shortest_edge")
    if shortest is not None and crop == [shortest, shortest] == [side, side]:
        mode = "shortest"
    elif size.get("height") == size.get("width") == side and crop in (None, [side, side]):
        mode = "squash"
    else:
        raise UserError(f"its images are resized to {size} and cut to {crop}, which is not supported")
    resample = found.get("resample", 3)
    if resample not in RESAMPLE:
        raise UserError(f"its images are resized by PIL's filter {resample}, only 2 and 3 are supported")
    usual = open_clip.constants.OPENAI_DATASET_MEAN, open_clip.constants.OPENAI_DATASET_STD
    mean, std = usual if clip else ((0.5,) * 3, (0.5,) * 3)
    if not found.get("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    else:
        mean, std = found.get("image_mean", mean), found.get("image_std", std)
    if len(mean) != 3 or len(std) != 3 or not all(float(value) for value in std):
        raise ValueError(f"mean {mean}, standard deviation {std}")
    return {"mode": "RGB", "size": side, "mean": tuple(mean), "std": tuple(std), "fill_color": 0,
            "interpolation": RESAMPLE[resample], "resize_mode": mode}  # fmt: skip


def _common(tower: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's settings that both of its own towers have."""
    act = tower["hidden_act"]
    if act not in {"quick_gelu", "gelu", *TANH}:
        raise UserError(f"activation {act!r} is not supported")
    width = tower["hidden_size"]
    return {
        "width": width,
        "layers": tower["num_hidden_layers"],
        "mlp_ratio": (tower["intermediate_size"] + 0.5) / width,  # open_clip cuts width * mlp_ratio to a whole number
        "norm_kwargs": {"eps": tower["layer_norm_eps"]},
        "act_kwargs": {"approximate": "tanh"} if act in TANH else None,
    }


def _clip(config: Mapping[str, Any], text: Mapping[str, Any], vision: Mapping[str, Any]) -> nn.Module:
    quick = vision["hidden_act"] == "quick_gelu"
    if quick != (text["hidden_act"] == "quick_gelu"):
        raise UserError("one tower has QuickGELU and the other has not, which is not supported")
    eos = text["eos_token_id"]
    # transformers takes the largest id for the end of a text where the configuration says 2.
    largest = eos in (2, text["vocab_size"] - 1)
    return CLIP(
        config.get("projection_dim", 512),
        vision_cfg={
            **_common(vision),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
        },
        text_cfg={
            **_common(text),
            "heads": text["num_attention_heads"],
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            **({} if largest else {"pool_type": "eos", "eos_id": eos}),
        },
        quick_gelu=quick,
    )


def _siglip(text: Mapping[str, Any], vision: Mapping[str, Any]) -> nn.Module:
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ModuleNotFoundError:
        raise UserError("SigLIP needs the package 'timm': pip install 'vilu[export]'") from None
    if not vision.get("vision_use_head", True) or "quick_gelu" in (text["hidden_act"], vision["hidden_act"]):
        raise UserError("a SigLIP without its pooling head, or with QuickGELU, is not supported")
    common, width = _common(vision), vision["hidden_size"]
    model = CustomTextCLIP(
        width,
        vision_cfg={"image_size": 1, "patch_size": 1, "layers": 1, "width": 1, "head_width": 1},  # replaced below
        text_cfg={
            **_common(text),
            "heads": text["num_attention_heads"],
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
        },
        init_logit_bias=-10,
    )
    with torch.device("meta"):  # only the wrapper of this trunk is used
        model.visual = TimmModel(
            "vit_base_patch16_siglip_224", width, image_size=vision["image_size"], pool="map", proj="none"
        )
    model.visual.trunk = VisionTransformer(
        img_size=vision["image_size"],
        patch_size=vision["patch_size"],
        embed_dim=width,
        depth=common["layers"],
        num_heads=vision["num_attention_heads"],
        mlp_ratio=common["mlp_ratio"],
        class_token=False,
        global_pool="map",
        num_classes=0,
        norm_layer=partial(nn.LayerNorm, **common["norm_kwargs"]),
        act_layer=partial(nn.GELU, **(common["act_kwargs"] or {})),
    )
    return model


def _weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Read the folder's weights, from one file or from the shards of an index."""
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        path = folder / name
        if path.suffix != ".json":
            if path.exists():
                return path, dict(read_weights(path).tensors)
        elif path.exists():
            shards = _read(path).get("weight_map")
            if not isinstance(shards, dict) or any(Path(str(shard)).name != shard for shard in shards.values()):
                raise UserError(f"{path}: names no files of this folder")
            tensors: dict[str, Tensor] = {}
            for shard in sorted(set(shards.values())):
                tensors |= read_weights(folder / shard).tensors
            return path, tensors
    raise UserError(f"{folder}: holds no model.safetensors and no pytorch_model.bin")


def _converted(
    path: Path, found: Mapping[str, Tensor], kind: str, text: Mapping[str, Any], vision: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors under open_clip's names."""

    def get(name: str) -> Tensor:
        if name not in found:
            raise UserError(f"{path}: tensor {name} is missing")
        return found[name]

    def both(theirs: str, ours: str) -> Iterator[tuple[str, Tensor]]:
        for part in ("weight", "bias"):
            yield f"{ours}.{part}", get(f"{theirs}.{part}")

    def blocks(theirs: str, ours: str, count: int, timm: bool) -> Iterator[tuple[str, Tensor]]:
        for i in range(count):
            a, b = f"{theirs}.encoder.layers.{i}", f"{ours}.{i}"
            for part in ("weight", "bias"):
                qkv = torch.cat([get(f"{a}.self_attn.{letter}_proj.{part}") for letter in "qkv"])
                yield (f"{b}.attn.qkv.{part}" if timm else f"{b}.attn.in_proj_{part}"), qkv
            for names in BLOCK:
                yield from both(f"{a}.{names[0]}", f"{b}.{names[2 if timm else 1]}")

    clip = kind == "clip"
    tower = "" if clip else "text."
    yield "logit_scale", get("logit_scale")
    yield f"{tower}token_embedding.weight", get("text_model.embeddings.token_embedding.weight")
    yield f"{tower}positional_embedding", get("text_model.embeddings.position_embedding.weight")
    yield from blocks("text_model", f"{tower}transformer.resblocks", text["num_hidden_layers"], False)
    yield from both("text_model.final_layer_norm", f"{tower}ln_final")
    embeddings, position = "vision_model.embeddings", "vision_model.embeddings.position_embedding.weight"
    if clip:
        yield "text_projection", get("text_projection.weight").T
        yield "visual.class_embedding", get(f"{embeddings}.class_embedding")
        yield "visual.conv1.weight", get(f"{embeddings}.patch_embedding.weight")
        yield "visual.positional_embedding", get(position)
        yield from both("vision_model.pre_layrnorm", "visual.ln_pre")
        yield from blocks("vision_model", "visual.transformer.resblocks", vision["num_hidden_layers"], False)
        yield from both("vision_model.post_layernorm", "visual.ln_post")
        yield "visual.proj", get("visual_projection.weight").T
        return
    yield "logit_bias", get("logit_bias")
    yield from both("text_model.head", "text.text_projection")
    yield from both(f"{embeddings}.patch_embedding", "visual.trunk.patch_embed.proj")
    yield "visual.trunk.pos_embed", get(position)[None]
    yield from blocks("vision_model", "visual.trunk.blocks", vision["num_hidden_layers"], True)
    yield from both("vision_model.post_layernorm", "visual.trunk.norm")
    head, pool, width = "vision_model.head", "visual.trunk.attn_pool", vision["hidden_size"]
    yield f"{pool}.latent", get(f"{head}.probe")
    for part in ("weight", "bias"):
        packed = get(f"{head}.attention.in_proj_{part}")
        yield f"{pool}.q.{part}", packed[:width]
        yield f"{pool}.kv.{part}", packed[width:]
    yield from both(f"{head}.attention.out_proj", f"{pool}.proj")
    yield from both(f"{head}.layernorm", f"{pool}.norm")
    yield from both(f"{head}.mlp.fc1", f"{pool}.mlp.fc1")
    yield from both(f"{head}.mlp.fc2", f"{pool}.mlp.fc2")
