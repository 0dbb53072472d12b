"""Teachers from ONNX: any network with a global vector and a dense map, run by ONNX Runtime.

Published files often fix batch 1 and one image size. Here the graph's input is made dynamic, what
the exporter wrote down about intermediate shapes is dropped, and reshapes that name batch 1 keep
their input's batch instead, so that batches and the square composite run through the same file.

A global head that is bound to one size (a pooling layer with learned weights per position, say)
cannot see a square composite; it then sees the composite squeezed to the base view's size, while
the dense map is always computed at full size.

Legend: B images, D width, gh x gw grid of the dense output.
"""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor
from torch.nn import functional as F

from dpal.base.errors import ConfigError
from dpal.model.onnx_import import onnxruntime
from dpal.model.weights import weights_path


class OnnxNetwork:
    """An ONNX file as a teacher network.

    Args:
        path: the file; tensors stored outside of it are refused.
        global_output: name of the output [B, D] (further axes of length 1 are flattened).
        dense_output: name of the output [B, D, gh, gw].
        input_size: height and width of the base view.
    """

    def __init__(
        self, path: Path, global_output: str, dense_output: str, input_size: tuple[int, int]
    ) -> None:
        self.path = weights_path(str(path))
        model = _read(self.path)
        names = [output.name for output in model.graph.output]
        for key, name in (("global_output", global_output), ("dense_output", dense_output)):
            if name not in names:
                raise ConfigError(f"teacher.{key}={name!r}: outputs of {path} are {names}")
        self._model = _dynamic(model)
        self.input = model.graph.input[0].name
        self.outputs = [global_output, dense_output]
        self.multiple = 1
        self.input_size = input_size
        self._both = self._open(self.outputs, "cpu")
        self._dense: onnxruntime.InferenceSession | None = None
        self.width = self._try()
        if not self._runs_square():
            self._dense = self._open(self.outputs[1:], "cpu")

    def to(self, device: torch.device) -> None:
        """Run on `device` where ONNX Runtime can, else stay on the CPU."""
        self._both = self._open(self.outputs, device.type)
        self._dense = self._dense and self._open(self.outputs[1:], device.type)

    def __call__(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised float [B, 3, h, w] to a global vector [B, D] and a map [B, D, gh, gw]."""
        if self._dense is None or tuple(planes.shape[2:]) == self.input_size:
            cls, dense = self._run(self._both, planes)
        else:
            (dense,) = self._run(self._dense, planes)
            squeezed = F.interpolate(planes, self.input_size, mode="bicubic", antialias=True)
            cls, _ = self._run(self._both, squeezed)
        return cls.flatten(1), dense

    def _run(self, session: onnxruntime.InferenceSession, planes: Tensor) -> list[Tensor]:
        images = np.ascontiguousarray(planes.cpu().numpy(), dtype=np.float32)
        results = session.run(None, {self.input: images})
        return [torch.from_numpy(result).to(planes.device) for result in results]

    def _runs_square(self) -> bool:
        try:
            self._run(self._both, torch.zeros(1, 3, self.input_size[0], 2 * self.input_size[1]))
        except Exception:  # ONNX Runtime has no narrower type for a graph that refuses a shape
            return False
        return True

    def _open(self, outputs: list[str], device: str) -> onnxruntime.InferenceSession:
        """A session of exactly `outputs`."""
        model = _only(self._model, outputs)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # what it refuses is told by our own errors
        wanted = ["CPUExecutionProvider"]
        if device == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            wanted.insert(0, "CUDAExecutionProvider")
        try:
            graph = model.SerializeToString()
            return onnxruntime.InferenceSession(graph, options, providers=wanted)
        except Exception as error:
            raise ConfigError(f"{self.path}: ONNX Runtime refuses it ({_line(error)})") from None

    def _try(self) -> int:
        """Width D, after one batch of two that must give what it gives one by one."""
        images = torch.randn(2, 3, *self.input_size, generator=torch.Generator().manual_seed(0))
        try:
            cls, dense = self(images)
            single = self(images[1:])
        except Exception as error:
            raise ConfigError(
                f"{self.path}: cannot run two images of {list(self.input_size)} "
                f"({_line(error)}); export it with a dynamic batch, height and width"
            ) from None
        if dense.ndim != 4 or cls.ndim != 2 or cls.shape[1] != dense.shape[1] or len(cls) != 2:
            raise ConfigError(
                f"{self.path}: outputs are {list(cls.shape)} and {list(dense.shape)}; "
                "accepted are [B, D] and [B, D, h, w] of the same D"
            )
        for name, batch, alone in zip(self.outputs, (cls, dense), single, strict=True):
            if not torch.allclose(batch[1:], alone, rtol=1e-3, atol=1e-3 * float(alone.std())):
                raise ConfigError(
                    f"{self.path}: output {name!r} of an image changes with its batch; "
                    "export it with a dynamic batch"
                )
        return cls.shape[1]


def _read(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise ConfigError(f"{path}: is not an ONNX file ({_line(error)})") from None
    if any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer):
        raise ConfigError(f"{path}: keeps tensors in other files; save it as one file")
    if not model.graph.input:
        raise ConfigError(f"{path}: has no input")
    return model


def _dynamic(model: onnx.ModelProto) -> onnx.ModelProto:
    """Free batch, height and width of input and outputs; drop the inferred shapes between them."""
    _keep_batch(model.graph)
    weights = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        if value.name not in weights:
            axes = value.type.tensor_type.shape.dim
            for axis, name in zip(axes, ("batch", None, "height", "width"), strict=False):
                if name:
                    axis.dim_param = name
    del model.graph.value_info[:]
    return model


def _keep_batch(graph: onnx.GraphProto) -> None:
    """Let every reshape of an image's features to `[1, ...]` copy the batch: `[0, ...]`."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    features = {value.name for value in graph.input} - constants.keys()
    for index, node in enumerate(graph.node):
        if node.op_type == "Constant" and node.attribute[0].HasField("t"):
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        if not features.intersection(node.input):
            continue
        features.update(node.output)
        if node.op_type == "Reshape" and node.input[0] in features:
            shape = constants.get(node.input[1])
            if shape is not None and len(shape) > 1 and shape[0] == 1:
                name = f"batched_shape_{index}"
                freed = np.array([0, *shape[1:]], dtype=np.int64)
                graph.initializer.append(numpy_helper.from_array(freed, name))
                node.input[1] = name


def _only(model: onnx.ModelProto, outputs: list[str]) -> onnx.ModelProto:
    """A copy without the outputs, and without the nodes, that `outputs` do not need."""
    pruned = onnx.ModelProto()
    pruned.CopyFrom(model)
    needed, kept = set(outputs), []
    for node in reversed(model.graph.node):  # ONNX keeps nodes in topological order
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(_inputs(node))
    del pruned.graph.node[:], pruned.graph.output[:]
    pruned.graph.node.extend(reversed(kept))
    pruned.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    return pruned


def _inputs(node: onnx.NodeProto) -> set[str]:
    """Names a node reads, those of its branches and loop bodies included."""
    bodies = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return set(node.input).union(*(_inputs(inner) for body in bodies for inner in body.node))


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
