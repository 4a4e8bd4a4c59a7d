"""The ONNX graphs of the towers and of the head over its folded class set, and how a module becomes such a file.

They are traced from the modules that run eagerly; labels are looked up in the graph, so no step follows the head.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from vilu.clip import Clip
from vilu.export import attention, fusion, onnx_file
from vilu.export.outlier import OUTLIER_SCORE, OutlierGraph
from vilu.kernels import FoldedHead

# The newest operator set that the ONNX Runtime in two-year-old server containers reads.
OPSET = 20

MERGING = ("fuse", "reparameterize", "switch_to_deploy")  # what timm calls to merge a module's branches

ANSWER = ("LABEL", "CLASS_INDEX", "CONFIDENCE", "FAILURE_PROBABILITY", "ACCEPT")


class ImageGraph(nn.Module):
    """PIXELS uint8 (B, S, S, 3) -> IMAGE_EMBEDDING (B, D)."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.clip = _merge_branches(clip)

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
    """IMAGE_EMBEDDING (B, D) -> CLASS_INDEX, CONFIDENCE, FAILURE_PROBABILITY, ACCEPT, each (B, 1).

    With an outlier score there is a fifth output, OUTLIER_SCORE (B, 1). Where the score has a threshold, ACCEPT also
    needs a score that is not above it.
    """

    def __init__(self, folded: FoldedHead, threshold: float, outlier: OutlierGraph | None = None) -> None:
        super().__init__()
        self.folded = folded
        self.threshold = threshold
        self.outlier = outlier

    def forward(self, image_embedding: Tensor) -> tuple[Tensor, ...]:
        out = self.folded(image_embedding)
        failure = out.failure_probability[:, None]
        answer = out.class_index.int()[:, None], out.confidence[:, None], failure
        accept = failure < self.threshold
        if self.outlier is None:
            return *answer, accept
        score = self.outlier(image_embedding)
        if self.outlier.threshold is not None:
            accept = accept & (score <= self.outlier.threshold)
        return *answer, accept, score


def example_tokens(clip: Clip, rows: int = 2, seed: int = 0) -> Tensor:
    """Random token ids (rows, L), int64, in the text tower's vocabulary: to trace it, no tokenizer is needed."""
    text = getattr(clip.model, "text", clip.model)
    size = (rows, clip.model.context_length)
    return torch.randint(1, text.vocab_size, size, generator=torch.Generator().manual_seed(seed))


def _merge_branches(clip: Clip) -> Clip:
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
    outputs: Mapping[str, Sequence[int | str]],
    labels: Sequence[str] | None = None,
    *,
    fused: bool = False,
    axes: Sequence[str] = ("batch", "classes"),
) -> None:
    """Trace `module` and write a checked ONNX file whose inputs are dynamic in their first dimension.

    The same module and weights give the same bytes. Large weights go to `path`.data (`onnx_file.save`).

    Args:
        example: an input, or one for each name, with at least 2 rows (a 1 would be frozen into the graph).
        path: MODEL/VERSION/model.onnx; the graph takes the model's name.
        input_name: the input's name, or one for each example.
        outputs: name -> shape without the batch, in the module's order.
        labels: class names; adds LABEL (B, 1), gathered by CLASS_INDEX.
        fused: write attention and QuickGELU as ONNX Runtime's own operators (com.microsoft); other runtimes lack them.
        axes: names of the inputs' first dimensions; the outputs' first dimension has the first name.

    Raises:
        ValueError: an output has another shape than `outputs` says.
        NotImplementedError: attention with dropout or grouped queries.
    """
    examples = (example,) if isinstance(example, Tensor) else tuple(example)
    names = (input_name,) if isinstance(input_name, str) else tuple(input_name)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # its optimizer warns of nodes it leaves as they are
    with warnings.catch_warnings(), torch.no_grad(), attention.batch_first_attention():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            examples,
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=list(outputs),
            dynamic_shapes=tuple({0: torch.export.Dim.DYNAMIC} for _ in examples),
            custom_translation_table=attention.translations(fused),
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
        traced, expected = output.shape, ir.Shape([axes[0], *shape])
        if traced is None or traced[1:] != expected[1:]:
            raise ValueError(f"{output.name} is ({_dimensions(traced)}), expected ({_dimensions(expected)})")
        output.shape = expected
    if labels is not None:
        _add_label(graph, labels, axes[0])
    onnx_file.save(model, path)


def write_outlier(graph: OutlierGraph, path: Path) -> None:
    """Write the outlier score's graph as an ONNX file, for any B."""
    write_graph(graph, graph.mean.repeat(2, 1), path, "IMAGE_EMBEDDING", {OUTLIER_SCORE: [1]})


def _dimensions(shape: ir.Shape | None) -> str:
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


def _add_label(graph: ir.Graph, labels: Sequence[str], axis: str) -> None:
    """Add the output LABEL (B, 1): the names, gathered by CLASS_INDEX."""
    index = next(value for value in graph.outputs if value.name == "CLASS_INDEX")
    names = ir.StringTensor(np.array([label.encode() for label in labels], dtype=object), name="labels")
    table = ir.Value(name="labels", shape=names.shape, type=ir.TensorType(names.dtype), const_value=names)
    graph.register_initializer(table)
    node = ir.node("Gather", [table, index], name="label")
    (label,) = node.outputs
    label.name, label.shape, label.type = "LABEL", ir.Shape([axis, 1]), ir.TensorType(ir.DataType.STRING)
    graph.append(node)
    graph.outputs.insert(0, label)
