"""The PyTorch operator: schema, torch.compile, torch.export, CUDA graphs, and the same bits at every run."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.kernels.reference import DEVICE, INTERPRETED, assert_equal, make_head, operator_arguments, runs_kernels
from tests.support.embeddings import unit_rows
from vilu.kernels import FoldedHead, fold, fused_head

fused = pytest.importorskip("vilu.kernels.fused")
pytestmark = runs_kernels


def two_batches(B):
    """A folded head, two batches of B images, and their answers by plain launches."""
    t = unit_rows(5000, 64, 29).float().to(DEVICE)
    folded = fold(make_head(64).to(DEVICE), t)
    inputs = [unit_rows(B, 64, seed).float().to(DEVICE) for seed in (30, 31)]
    return folded, inputs, [fused_head(v, folded) for v in inputs]


@pytest.mark.skipif(INTERPRETED, reason="no CUDA graphs here")
@pytest.mark.parametrize("B", [1, 9])
def test_graphs_replay_on_any_stream_at_once(B):
    """Two graphs captured on one stream and replayed on two, besides plain launches: each counts its own arrivals."""
    folded, inputs, want = two_batches(B)
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


@pytest.mark.skipif(INTERPRETED, reason="no CUDA graphs here")
@pytest.mark.parametrize("B", [1, 9])
def test_two_threads_capture_at_once(B):
    folded, inputs, want = two_batches(B)
    graphs = [torch.cuda.CUDAGraph() for _ in inputs]
    outputs, together = {}, threading.Barrier(2)

    def capture(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            together.wait(60)
            graphs[i].capture_begin(capture_error_mode="thread_local")
            together.wait(60)
            outputs[i] = fused_head(inputs[i], folded)
            together.wait(60)
            graphs[i].capture_end()

    torch.cuda.synchronize()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(capture, range(2)))
    for _ in range(20):
        for graph in graphs:
            graph.replay()
    torch.cuda.synchronize()
    for i in range(2):
        assert_equal(outputs[i], want[i])


@pytest.mark.skipif(INTERPRETED, reason="no CUDA graphs here")
@pytest.mark.parametrize("B", [1, 9])
def test_graph_trees_of_torch_compile(B):
    t = unit_rows(300, 64, 29).float().to(DEVICE)
    folded = fold(make_head(64).to(DEVICE), t)
    compiled = torch.compile(lambda x: fused_head(x, folded), fullgraph=True, mode="reduce-overhead")
    for seed in range(6):  # warmed up, captured, replayed
        v = unit_rows(B, 64, seed).float().to(DEVICE)
        torch.compiler.cudagraph_mark_step_begin()
        assert_equal(compiled(v), fused_head(v, folded))


def test_calls_at_the_same_time_share_no_scratch(monkeypatch):
    """Nor their counters: so threads, streams and graphs may run and capture at will."""
    together = threading.Barrier(2)
    seen: dict[int, set[int]] = {}

    class Recorder:
        def __init__(self, kernel):
            self.arg_names = kernel.arg_names

        def __getitem__(self, grid):
            def launch(**arguments):
                together.wait(60)  # both calls are under way
                if "counters" in arguments:
                    address = arguments["counters"].untyped_storage().data_ptr()
                    seen.setdefault(threading.get_ident(), set()).add(address)

            return launch

    monkeypatch.setattr(fused, "KERNELS", {name: Recorder(kernel) for name, kernel in fused.KERNELS.items()})
    v, t = unit_rows(1, 64, 19).float().to(DEVICE), unit_rows(150, 64, 20).float().to(DEVICE)
    folded = fold(make_head(64).to(DEVICE), t)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fused_head, (v, v), (folded, folded)))
    one, other = seen.values()
    assert len(one) == len(other) == 1
    assert one != other


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
