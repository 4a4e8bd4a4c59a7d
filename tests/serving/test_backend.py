"""The Python backend named `onnxruntime`: one bad request in a batch costs the others nothing, and is logged."""

import asyncio
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tritonclient.grpc import aio
from tritonclient.utils import InferenceServerException

from vilu.serving import Server
from vilu.serving.backends.onnxruntime import session

pytestmark = pytest.mark.server
CONFIG = """
name: "gather"
backend: "onnxruntime"
max_batch_size: 8
input [ { name: "INDEX" data_type: TYPE_INT64 dims: [ 1 ] } ]
output [ { name: "VALUE" data_type: TYPE_FP32 dims: [ 1 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
dynamic_batching { max_queue_delay_microseconds: 2000000 preferred_batch_size: [ 4 ] }
"""


@pytest.fixture
def gathering(tmp_path):
    """A model that looks up a row of three; a larger index makes the graph fail."""
    (tmp_path / "models" / "gather" / "1").mkdir(parents=True)
    (tmp_path / "models" / "gather" / "config.pbtxt").write_text(CONFIG)
    table = helper.make_tensor("table", TensorProto.FLOAT, [3], [10.0, 20.0, 30.0])
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "INDEX"], ["VALUE"])],
        "gather",
        [helper.make_tensor_value_info("INDEX", TensorProto.INT64, ["batch", 1])],
        [helper.make_tensor_value_info("VALUE", TensorProto.FLOAT, ["batch", 1])],
        [table],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "models" / "gather" / "1" / "model.onnx")
    with Server(tmp_path / "models", log=tmp_path / "log") as server:
        yield server


def test_a_request_that_spoils_a_batch_gets_its_error_and_the_others_their_answers(gathering):
    async def ask(client, index):
        tensor = aio.InferInput("INDEX", [1, 1], "INT64").set_data_from_numpy(np.array([[index]], np.int64))
        try:
            return float((await client.infer("gather", [tensor])).as_numpy("VALUE")[0, 0])
        except InferenceServerException as error:
            return error.message()

    async def together():
        async with aio.InferenceServerClient(gathering.grpc_url) as client:
            return await asyncio.gather(*(ask(client, index) for index in (0, 1, 7, 2)))

    zero, one, bad, two = asyncio.run(together())
    assert (zero, one, two) == (10.0, 20.0, 30.0)
    assert "7" in bad
    assert "gather: a batch of 4 requests failed" in gathering.log.read_text()


@pytest.mark.skipif(session.cores() < 2 or not session.has_openvino(), reason="needs two cores and OpenVINO")
@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": session.cores(), "pin": False}])
def test_a_session_that_shares_the_cores_is_tied_to_none(tmp_path, options):
    """OpenVINO ties threads to the first cores, the same in each process: two workers would share one core."""
    side = 1500
    weight = helper.make_tensor("W", TensorProto.FLOAT, [side, side], np.ones((side, side), np.float32).tobytes(), True)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["X", "W"], ["Y"])],
        "product",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [side, side])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [side, side])],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # sessions of one process share OpenVINO's threads
        allowed = pool.submit(cores_of, tmp_path / "m.onnx", side, options).result()
    assert allowed == {frozenset(os.sched_getaffinity(0))}


def cores_of(path, side, options):
    """The sets of cores that a session's calling thread may use while it computes."""
    opened = session.open_session(path, "openvino", **options)
    allowed, ended, caller = set[frozenset[int]](), threading.Event(), threading.get_native_id()

    def look():
        while not ended.wait(0.001):
            allowed.add(frozenset(os.sched_getaffinity(caller)))

    watcher = threading.Thread(target=look)
    watcher.start()
    for _ in range(5):
        opened.run(["Y"], {"X": np.ones((side, side), np.float32)})
    ended.set()
    watcher.join()
    return allowed
