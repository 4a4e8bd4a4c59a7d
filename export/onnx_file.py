"""ONNX files on the disk: every graph is saved here, whole, with large weights in a file beside it; two are joined."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import onnx
import onnx_ir as ir

# IR 10 is the newest that the ONNX Runtime in two-year-old server containers reads.
MAX_IR = 10
# Bytes of weights above which they lie in a file of their own: a protobuf ends at 2 GiB, and the full graph joins two.
MAX_INLINE = 1_000_000_000


def save(model: ir.Model, path: Path) -> None:
    """Check a graph and write it in the place of `path`; weights above MAX_INLINE go to `path`.data.

    The weights may still lie in the files that are replaced (`ir.load` only maps them), so the new files are written
    whole, in a folder beside, before the old ones go.

    Raises:
        onnx.checker.ValidationError: the graph is not valid ONNX; the old files are untouched.
    """
    weights = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    data = f"{path.name}.data"
    model.ir_version = min(model.ir_version, MAX_IR)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as folder:
        staged = Path(folder) / path.name
        if sum(tensor.nbytes for tensor in weights) > MAX_INLINE:
            # Strings (labels) cannot lie beside the graph, so nothing that is no larger does.
            strings = [tensor.nbytes for tensor in weights if tensor.dtype == ir.DataType.STRING]
            least = max([256, *strings])
            ir.save(
                model, staged, external_data=data, size_threshold_bytes=least, alignment=4096
            )  # runtimes map whole pages
        else:
            ir.save(ir.external_data.load_to_model(model), staged)
        onnx.checker.check_model(str(staged), full_check=True)
        path.with_name(data).unlink(missing_ok=True)
        for file in Path(folder).iterdir():
            os.replace(file, path.with_name(file.name))


def copy_graph(source: Path, path: Path) -> None:
    """Write a graph again for another model, whose name it takes; it is not traced again."""
    model = ir.load(source)
    model.graph.name = path.parent.parent.name
    save(model, path)


def merge_full(image_graph: Path, head_graph: Path, path: Path) -> None:
    """Join the image tower's file and the head's into one: PIXELS -> what the head gives. Nothing is traced again.

    All weights are written beside `path`: runtimes follow no path out of a model's folder, and `onnx` refuses a file
    with several hard links.

    Raises:
        ValueError: the head does not take what the tower gives, or the two use different operator sets.
    """
    model, head = ir.load(image_graph), ir.load(head_graph)
    graph = model.graph
    graph.name = path.parent.parent.name
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
    save(model, path)
