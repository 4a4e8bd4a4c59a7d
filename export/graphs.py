"""The ONNX graphs: image tower, text tower, head over its folded class set, and all of them in one.

Traced from the very modules that run eagerly; labels are looked up in the graph, so no step follows the head.
"""

from __future__ import annotations

import copy
import logging
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from vilu.clip import Clip
from vilu.export import fusion
from vilu.kernels import FoldedHead

# What the onnxruntime in two-year-old server containers reads: IR 10 at most, opset 20 at most.
OPSET = 20
MAX_IR = 10
# Weights above this lie in a file of their own: a protobuf ends at 2 GiB, and the full graph joins two.
MAX_INLINE = 1_000_000_000

MERGING = ("fuse", "reparameterize", "switch_to_deploy")  # what timm calls to merge a module's branches

ANSWER = ("LABEL", "CLASS_INDEX", "CONFIDENCE", "FAILURE_PROBABILITY", "ACCEPT")


class ImageGraph(nn.Module):
    """PIXELS uint8 (B, S, S, 3) -> IMAGE_EMBEDDING (B, D)."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.clip = _single_branch(clip)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.clip.encode_pixels(pixels)


class TextGraph(nn.Module):
    """TOKENS int64 (B, L) -> TEXT_EMBEDDING (B, D)."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, tokens: Tensor) -> Tensor:
        return self.clip.encode_tokens(tokens)


class HeadGraph(nn.Module):
    """IMAGE_EMBEDDING (B, D) -> CLASS_INDEX, CONFIDENCE, FAILURE_PROBABILITY, ACCEPT, each (B, 1)."""

    def __init__(self, folded: FoldedHead, threshold: float) -> None:
        super().__init__()
        self.folded = folded
        self.threshold = threshold

    def forward(self, image_embedding: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        out = self.folded(image_embedding)
        failure = out.failure_probability[:, None]
        return out.class_index.int()[:, None], out.confidence[:, None], failure, failure < self.threshold


def example_tokens(clip: Clip, rows: int = 2, seed: int = 0) -> Tensor:
    """Random token ids (rows, L), int64, in the text tower's vocabulary: to trace it, no tokenizer is needed."""
    text = getattr(clip.model, "text", clip.model)
    size = (rows, clip.model.context_length)
    return torch.randint(1, text.vocab_size, size, generator=torch.Generator().manual_seed(seed))


def _single_branch(clip: Clip) -> Clip:
    """The same CLIP with the parallel branches that training used merged into one convolution (MobileCLIP)."""
    trunk = getattr(clip.model.visual, "trunk", None)
    if trunk is None or not any(hasattr(module, name) for module in trunk.modules() for name in MERGING):
        return clip
    clip, clip._modules = copy.copy(clip), dict(clip._modules)
    parent: nn.Module = clip
    for name in ("model", "visual"):
        child = copy.copy(getattr(parent, name))
        child._modules = dict(child._modules)
        parent._modules[name] = child
        parent = child
    parent._modules["trunk"] = reparameterize_model(trunk)  # of a deep copy
    return clip


def write_graph(
    module: nn.Module,
    example: Tensor | Sequence[Tensor],
    path: Path,
    input_name: str | Sequence[str],
    outputs: Mapping[str, Sequence[int]],
    labels: Sequence[str] | None = None,
    *,
    fused: bool = False,
    axes: Sequence[str] = ("batch", "classes"),
) -> None:
    """Trace `module` and write a checked ONNX file whose inputs are dynamic in their first dimension.

    The same module and weights give the same bytes. Weights above MAX_INLINE go to `path`.data.

    Args:
        example: an input, or one for each name, with at least 2 rows (a 1 would be frozen into the graph).
        outputs: name -> shape without the batch, in the module's order.
        labels: class names; adds LABEL (B, 1), gathered by CLASS_INDEX.
        fused: ONNX Runtime's own operators (com.microsoft) for attention and QuickGELU; other runtimes lack them.
        axes: what the first dimensions of the inputs are called; that of the first is the outputs' too.
    """
    examples = (example,) if isinstance(example, Tensor) else tuple(example)
    names = (input_name,) if isinstance(input_name, str) else tuple(input_name)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # its optimizer warns of nodes it leaves as they are
    with warnings.catch_warnings(), torch.no_grad(), fusion.batch_first_attention():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            examples,
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=list(outputs),
            dynamic_shapes=tuple({0: torch.export.Dim.DYNAMIC} for _ in examples),
            custom_translation_table=fusion.translations(fused),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = program.model
    fusion.optimise(model, fused=fused)
    ClearMetadataAndDocStringPass()(model)  # source files of this machine
    graph = model.graph
    graph.name = path.parent.parent.name
    _name_axes(graph, dict(zip(names, axes, strict=False)))
    for output, shape in zip(graph.outputs, outputs.values(), strict=True):
        traced, told = output.shape, ir.Shape([axes[0], *shape])
        if traced is None or traced[1:] != told[1:]:
            raise ValueError(f"{output.name} is ({_text(traced)}), told ({_text(told)})")
        output.shape = told
    if labels is not None:
        _look_up(graph, labels, axes[0])
    _save(model, path)


def _text(shape: ir.Shape | None) -> str:
    return "of unknown shape" if shape is None else ", ".join(str(size) for size in shape)


def _name_axes(graph: ir.Graph, axes: Mapping[str, str]) -> None:
    """Call dynamic dimensions by their names; drop what the exporter derived from them (`12*s81`)."""
    known = {}
    for value in graph.inputs:
        assert value.shape is not None
        known[str(value.shape[0])] = axes[str(value.name)]
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([d if isinstance(d, int) else known.get(str(d)) for d in value.shape])


def _look_up(graph: ir.Graph, labels: Sequence[str], axis: str) -> None:
    index = next(value for value in graph.outputs if value.name == "CLASS_INDEX")
    names = ir.StringTensor(np.array([label.encode() for label in labels], dtype=object), name="labels")
    table = ir.Value(name="labels", shape=names.shape, type=ir.TensorType(names.dtype), const_value=names)
    graph.register_initializer(table)
    node = ir.node("Gather", [table, index], name="label")
    (label,) = node.outputs
    label.name, label.shape, label.type = "LABEL", ir.Shape([axis, 1]), ir.TensorType(ir.DataType.STRING)
    graph.append(node)
    graph.outputs.insert(0, label)


def merge_full(image_graph: Path, head_graph: Path, path: Path) -> None:
    """Join the image tower's file and the head's into one: PIXELS -> what the head gives.

    Nothing is traced again. Weights in files of their own are copied: runtimes follow no path out of a model's folder,
    and `onnx` refuses a file with several hard links.
    """
    model, head = ir.load(image_graph), ir.load(head_graph)
    path.parent.mkdir(parents=True, exist_ok=True)
    graph = model.graph
    graph.name = path.parent.parent.name
    _copy_data(graph.initializers.values(), image_graph, path.with_name("model.onnx.data"))
    _copy_data(head.graph.initializers.values(), head_graph, path.with_name("head.onnx.data"))
    (embedding,), (entry,) = graph.outputs, head.graph.inputs
    if embedding.name != entry.name:
        raise ValueError(f"{image_graph} gives {embedding.name}, {head_graph} takes {entry.name}")
    outputs, nodes, weights = list(head.graph.outputs), list(head.graph), list(head.graph.initializers.values())
    ir.convenience.replace_all_uses_with(entry, embedding)
    head.graph.remove(nodes)
    head.graph.outputs.clear()
    head.graph.initializers.clear()
    answers = {value.name for value in outputs}
    for value in (*weights, *(output for node in nodes for output in node.outputs)):
        if value.name not in answers:
            value.name = f"head/{value.name}"
    for value in weights:
        graph.register_initializer(value)
    for node in nodes:
        node.name = f"head/{node.name}"
    graph.extend(nodes)
    graph.outputs[:] = outputs
    for domain, version in head.opset_imports.items():
        if model.opset_imports.setdefault(domain, version) != version:
            raise ValueError(f"{head_graph} has opset {version}, {image_graph} {model.opset_imports[domain]}")
    _save(model, path)


def _copy_data(weights: Iterable[ir.Value], origin: Path, target: Path) -> None:
    """Copy the one file with the external weights of `origin` to `target`, and have them read there."""
    for value in weights:
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        if not target.exists():
            shutil.copyfile(origin.parent / tensor.location, target)
        value.const_value = ir.ExternalTensor(
            target.name,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name,
            base_dir=target.parent,
        )


def _save(model: ir.Model, path: Path) -> None:
    weights = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    inline = sum(tensor.nbytes for tensor in weights if not isinstance(tensor, ir.ExternalTensor))
    model.ir_version = min(model.ir_version, MAX_IR)
    path.parent.mkdir(parents=True, exist_ok=True)
    if inline > MAX_INLINE:
        ir.save(model, path, external_data=f"{path.name}.data", alignment=4096)  # runtimes map whole pages
    else:
        ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
