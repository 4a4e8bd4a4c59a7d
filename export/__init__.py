"""Checkpoint to Triton model repository: ONNX graphs, proven equal to the eager model before they are kept."""

from vilu.export.export import export
from vilu.export.head_only import export_head

__all__ = ["export", "export_head"]
