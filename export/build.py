"""Write the repository's files: graphs, configurations, Python models."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from vilu.export import cuda_head, model_config, repository
from vilu.export.details import write_details
from vilu.export.float16 import to_float16
from vilu.export.graphs import ANSWER, HeadGraph, ImageGraph, TextGraph, write_graph, write_outlier
from vilu.export.int8 import quantise
from vilu.export.job import Job, Ticker
from vilu.export.onnx_file import copy_graph, merge_full
from vilu.export.open_vocabulary import write_open_vocabulary
from vilu.export.outlier import FILE as OUTLIER
from vilu.export.outlier import OUTLIER_SCORE
from vilu.export.tokenizer import write_tokenizer
from vilu.kernels import fold

README = repository.TEMPLATES / "README.md"


def write_graphs(job: Job, root: Path, tick: Ticker) -> None:
    """Write clip_image and clip_text in the chosen precision, vilu_head in float32, and vilu_full from two of these."""
    dim = job.checkpoint.head.dim
    pixels, (tokens, calibration) = torch.from_numpy(job.sample.pixels[:2]), job.tokens
    fused = job.runtime.provider != "tensorrt"  # TensorRT knows none of ONNX Runtime's own operators
    paths = {name: root / name / "1" / "model.onnx" for name in ("clip_image", "clip_text", "vilu_head", "vilu_full")}
    image, text = {"IMAGE_EMBEDDING": [dim]}, {"TEXT_EMBEDDING": [dim]}
    for name, module, example, entry, outputs in (
        ("clip_image", ImageGraph, pixels, "PIXELS", image),
        ("clip_text", TextGraph, tokens[:2], "TOKENS", text),
    ):
        write = partial(write_graph, module(job.clip), example, paths[name], entry, outputs, fused=fused)
        job.towers.graph(paths[name], fused, write)
        tick(f"writing {name}")
    feeds = {"clip_image": {"PIXELS": job.sample.calibration}, "clip_text": {"TOKENS": calibration.numpy()}}
    for name, feed in feeds.items():
        if job.precision == "float16":
            to_float16(paths[name])
        elif job.precision == "int8":
            quantise(paths[name], feed, symmetric=job.runtime.provider != "cpu")
        tick(f"{job.precision}: {name}")

    head = paths["vilu_head"] if not job.cuda_archs else root / "head" / "1" / "model.onnx"
    answer = {name: [1] for name in ANSWER if name != "LABEL"}
    with torch.no_grad():
        embedding = job.clip.encode_pixels(pixels)
    write_graph(job.head, embedding, head, "IMAGE_EMBEDDING", answer, job.class_set.names)
    if job.outlier is not None:  # ONNX Runtime computes every output, so vilu_head's graph stays without the score
        both = HeadGraph(job.folded, job.checkpoint.threshold, job.outlier)
        head = root / "head" / "1" / "full.onnx"
        write_graph(both, embedding, head, "IMAGE_EMBEDDING", answer | {OUTLIER_SCORE: [1]}, job.class_set.names)
    merge_full(paths["clip_image"], head, paths["vilu_full"])
    shutil.rmtree(root / "head", ignore_errors=True)
    tick("writing vilu_head and vilu_full")
    if job.cuda_archs:
        cuda_head.write_head(root / "vilu_head", job.folded, job.served, job.cuda_archs, tick)


def write_models(job: Job, root: Path) -> None:
    """Write every configuration, the Python models with their graphs and files, and the ensembles."""
    for name, entry, outputs in (
        ("clip_image", "PIXELS", {"IMAGE_EMBEDDING": job.tensors["IMAGE_EMBEDDING"]}),
        ("clip_text", "TOKENS", {"TEXT_EMBEDDING": job.tensors["TEXT_EMBEDDING"]}),
        ("vilu_full", "PIXELS", {**repository.ANSWER_TENSORS, **job.served.outlier_tensors}),
    ):
        model_config.write_graph_config(
            root / name,
            inputs={entry: job.tensors[entry]},
            outputs=outputs,
            max_batch_size=job.max_batch_size,
            limits=job.limits,
            runtime=job.runtime,
            tower=name.startswith("clip_"),
        )
    batch, dim, served = job.max_batch_size, job.checkpoint.head.dim, job.served
    repository.write_preprocess(root / "preprocess", replace(job.clip.transform, mode=job.preprocess), served)
    repository.write_embeddings(root / "vilu_embeddings", served)
    repository.write_details_model(root / "vilu_details", served)
    repository.write_class_sets(root / "class_sets", served)
    if not job.cuda_archs:  # the fused kernel's model is written with its cubins
        repository.write_folded_head(root / "vilu_head", served)
    plain = fold(
        job.checkpoint.head, job.class_set.text_embeddings, logit_scale=job.clip.spec.logit_scale, layout="plain"
    )
    both = root / "vilu_embeddings" / "1"
    write_open_vocabulary(plain, job.checkpoint.threshold, both / "ragged.onnx")
    write_details(plain, both / "details.onnx")
    copy_graph(both / "details.onnx", root / "vilu_details" / "1" / "details.onnx")
    if not job.cuda_archs:
        copy_graph(both / "ragged.onnx", root / "vilu_head" / "1" / "ragged.onnx")
    if job.outlier is not None:
        write_outlier(job.outlier, both / OUTLIER)
        for name in ("vilu_details", "vilu_head"):
            copy_graph(both / OUTLIER, root / name / "1" / OUTLIER)
    tokenizer = root / "clip_text" / "1" / "tokenizer.json"
    transform = write_tokenizer(job.clip, tokenizer)
    repository.write_tokenize(root / "tokenize", tokenizer, transform, job.tokens[0].shape[1], served)
    repository.write_text(root / "vilu_text", dim, batch)
    repository.write_answering(root / "vilu", served, head="vilu_head", details_from="vilu_details")
    model = both.parent.name
    repository.write_answering(root / "vilu_open", served, head=model, details_from=model, candidates=True)
    repository.write_labels(root / "labels.txt", job.class_set.names)
    shutil.copyfile(README, root / "README.md")
