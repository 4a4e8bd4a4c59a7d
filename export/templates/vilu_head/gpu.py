"""This Triton Python model answers for image embeddings with the fused head's cubins. It needs no torch or compiler.

The cubins serve the exported class set. A request that names another one is passed to vilu_embeddings.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sets  # the export copies it beside this file
import triton_python_backend_utils as pb_utils
from fused import dlpack  # the export copies vilu/kernels/{dlpack,launch,plan}.py beside this file
from fused.launch import CubinHead, Gpu


class Block:
    """The GPU memory of one batch's answers. It returns to the pool when the last tensor in it is freed."""

    def __init__(self, pool: list[int], make: Callable[[], int]) -> None:
        self.pool = pool
        self.address = pool.pop() if pool else make()

    def __del__(self) -> None:
        self.pool.append(self.address)


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        here = Path(args["model_repository"]) / args["model_version"]
        self.head = CubinHead(here / "cubins", Gpu(int(args["model_instance_device_id"])))
        self.head.warm_up()
        self.threshold = np.float32(config["parameters"]["threshold"]["string_value"])
        labels = (here / "labels.txt").read_text("utf-8").split("\n")[:-1]
        self.labels = np.array([label.encode() for label in labels], dtype=object)
        self.rows = max(config["max_batch_size"], 1)
        self.embeddings = self.head.gpu.allocate(self.rows * self.head.variant.dim * 4)
        self.pool: list[int] = []
        version = int(args["model_version"])
        self.class_set = np.full((self.rows, 1), f"{sets.DEFAULT}@{version}".encode(), object)
        self.versions = np.full((self.rows, 1), version, np.int32)
        self.tally = sets.Tally(args)
        self.store = sets.Store(sets.folder_of(args), None, "")
        # A later stage of a cascade has a prefix.
        self.embeddings_model = args["model_name"].removesuffix("vilu_head") + "vilu_embeddings"
        given = config["parameters"].get("outlier_threshold")
        self.outlier_threshold = None if given is None else np.float32(given["string_value"])
        if given is not None:
            import onnxruntime

            options, providers = onnxruntime.SessionOptions(), ["CPUExecutionProvider"]
            options.intra_op_num_threads = 1  # more would spin on the host's cores between batches
            self.outlier = onnxruntime.InferenceSession(here / "outlier.onnx", options, providers=providers)

    def execute(self, requests: list[Any]) -> list[Any]:
        mine: list[Any] = []
        others: dict[int, Any] = {}
        for place, request in enumerate(requests):
            try:
                name = sets.requested_set(request)
                if name in ("", sets.DEFAULT):
                    mine.append(request)
                else:
                    others[place] = self._forward(request, name)
            except sets.RequestError as error:
                others[place] = sets.error_response(error)
        answered = iter(self._answer(mine) if mine else ())
        return [others[place] if place in others else next(answered) for place in range(len(requests))]

    def _forward(self, request: Any, name: str) -> Any:
        """Answer a request over another class set through vilu_embeddings, by a BLS call."""
        self.store.files(name)  # refuses an unknown set here, because BLS does not pass on an error's code
        response = pb_utils.InferenceRequest(
            model_name=self.embeddings_model,
            inputs=[pb_utils.get_input_tensor_by_name(request, "IMAGE_EMBEDDING")],
            requested_output_names=list(request.requested_output_names()),
            parameters={"class_set": name},
        ).exec()
        if response.has_error():
            return pb_utils.InferenceResponse(error=response.error())
        return pb_utils.InferenceResponse(output_tensors=response.output_tensors())

    def _answer(self, requests: list[Any]) -> list[Any]:
        """Answer these requests with one launch of the head."""
        gpu = self.head.gpu
        gpu.use()
        capsules = [pb_utils.get_input_tensor_by_name(r, "IMAGE_EMBEDDING").to_dlpack() for r in requests]
        views = [dlpack.view(capsule) for capsule in capsules]
        ends = np.cumsum([view.shape[0] for view in views]).tolist()
        images = ends[-1]
        source = views[0].address
        if len(views) > 1 or views[0].gpu != gpu.device or source % 16:
            # One launch reads one array, so the embeddings of all requests are copied into one. If CLIP ran on the
            # GPU, the copy stays there.
            source = at = self.embeddings
            for view in views:
                size = view.shape[0] * self.head.variant.dim * 4
                gpu.copy(at, view.address, size)
                at += size

        # The block holds the class indices in int32. From the next multiple of 16 bytes on, it holds the failure
        # probabilities, confidences, entropies and Doctor scores in float32.
        block = Block(self.pool, lambda: gpu.allocate(20 * self.rows + 16))
        padded = -(-images // 4) * 4
        scores = block.address + 4 * padded
        self.head(source, images, scores, block.address)
        # Labels are strings, which need the host. So 8 bytes per image are copied there; the scores stay on the GPU.
        host = np.empty(padded + images, np.int32)
        gpu.copy(host.ctypes.data, block.address, host.nbytes)
        rows = np.empty((images, self.head.variant.dim if self.outlier_threshold is not None else 0), np.float32)
        if rows.size:
            gpu.copy(rows.ctypes.data, source, rows.nbytes)
        gpu.synchronize()
        label = self.labels[host[:images, None]]
        failure = host[padded:, None].view(np.float32)
        accept = failure < self.threshold
        if self.outlier_threshold is not None:
            accept &= self.outlier.run(["OUTLIER_SCORE"], {"IMAGE_EMBEDDING": rows})[0] <= self.outlier_threshold
        self.tally.count(sets.DEFAULT, failure, accept)

        responses = []
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            tensors = [
                pb_utils.Tensor("LABEL", label[start:end]),
                pb_utils.Tensor("ACCEPT", accept[start:end]),
                pb_utils.Tensor("CLASS_SET", self.class_set[: end - start]),
                pb_utils.Tensor("CLASS_SET_VERSION", self.versions[: end - start]),
            ]
            for name, first, kind in (
                ("CLASS_INDEX", block.address, "i32"),
                ("FAILURE_PROBABILITY", scores, "fp32"),
                ("CONFIDENCE", scores + 4 * images, "fp32"),
            ):
                view = dlpack.View(first + 4 * start, (end - start, 1), kind, gpu.device)
                tensors.append(pb_utils.Tensor.from_dlpack(name, dlpack.lend(view, block)))
            responses.append(pb_utils.InferenceResponse(output_tensors=tensors))
        return responses
