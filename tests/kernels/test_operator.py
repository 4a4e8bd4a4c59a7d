"""The PyTorch operator: schema, torch.compile, torch.export, CUDA graphs, and the same bits at every run."""

import pytest
import torch

from tests.kernels.reference import DEVICE, INTERPRETED, assert_equal, make_head, operator_arguments, runs_kernels
from tests.support.embeddings import unit_rows
from vilu.kernels import FoldedHead, fold, fused_head

pytest.importorskip("triton")
pytestmark = runs_kernels


@pytest.mark.skipif(INTERPRETED, reason="no CUDA graphs here")
@pytest.mark.parametrize("B", [1, 9])
def test_graphs_replay_on_any_stream_at_once(B):
    """Two graphs captured on one stream and replayed on two, besides plain launches: each counts its own arrivals."""
    t = unit_rows(5000, 64, 29).float().to(DEVICE)
    folded = fold(make_head(64).to(DEVICE), t)
    inputs = [unit_rows(B, 64, seed).float().to(DEVICE) for seed in (30, 31)]
    want = [fused_head(v, folded) for v in inputs]
    graphs, outputs = [], []
    for v in inputs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append(fused_head(v, folded))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(200):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        plain = fused_head(inputs[0], folded)
    torch.cuda.synchronize()
    assert_equal(plain, want[0])
    for mine, theirs in zip(outputs, want, strict=True):
        assert_equal(mine, theirs)


@pytest.mark.parametrize("B", [3, 20])
def test_same_bits_every_run_and_in_every_small_batch(B):
    v, t = unit_rows(B, 64, 19).float().to(DEVICE), unit_rows(150, 64, 20).float().to(DEVICE)
    folded = fold(make_head(64).to(DEVICE), t)
    first = fused_head(v, folded)
    assert_equal(first, fused_head(v, folded))
    if B <= 8:
        assert_equal([column[1:2] for column in first], fused_head(v[1:2], folded))


@pytest.mark.parametrize("B", [2, 9])
def test_operator(B):
    """Schema, fake implementation and functional behaviour, as torch.compile and torch.export rely on them."""
    v, t = unit_rows(B, 64, 21).float().to(DEVICE), unit_rows(30, 64, 22).float().to(DEVICE)
    folded = fold(make_head(64).to(DEVICE), t)
    tests = ("test_schema", "test_faketensor")
    operator = torch.ops.vilu.fused_head.default
    torch.library.opcheck(operator, (v,), operator_arguments(folded), test_utils=tests)

    compiled = torch.compile(lambda x: fused_head(x, folded), fullgraph=True, backend="aot_eager")
    assert_equal(compiled(v), fused_head(v, folded))


class Wrapped(torch.nn.Module):
    def __init__(self, folded: FoldedHead) -> None:
        super().__init__()
        self.folded = folded

    def forward(self, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(fused_head(v, self.folded))


def test_export_keeps_one_call_and_a_free_batch():
    v, t = unit_rows(12, 64, 23).float().to(DEVICE), unit_rows(30, 64, 24).float().to(DEVICE)
    module = Wrapped(fold(make_head(64).to(DEVICE), t))
    program = torch.export.export(module, (v[:9],), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    calls = [str(n.target) for n in program.graph.nodes if "vilu" in str(n.target)]
    assert calls == ["vilu.fused_head.default"]
    assert_equal(program.module()(v), module(v))
