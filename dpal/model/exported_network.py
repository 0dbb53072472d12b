"""A torch teacher that ONNX Runtime runs: convolutions on a CPU are much faster there.

The network is exported in memory for every size it is fed with, and its first outputs are compared
with PyTorch's in fp32 before anything is believed.

Legend: B images, D width, gh x gw token grid.
"""

import io
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dpal.base.errors import ConfigError

if TYPE_CHECKING:
    from dpal.model.networks import Network
    from dpal.model.onnx_import import onnxruntime

TOLERANCE = 1e-4  # largest error, as a share of the largest output
BATCHES = (1, 3)  # that are compared, after an export with two images


class ExportedNetwork:
    """A frozen fp32 network on the CPU, as a `Network` that ONNX Runtime runs.

    Args:
        network: on the CPU; it must depend on its input's size alone, not on its values.
    """

    def __init__(self, network: "Network") -> None:
        self.width, self.multiple = network.width, network.multiple
        self._network = network
        self._sessions: dict[tuple[int, int], onnxruntime.InferenceSession] = {}

    def to(self, device: torch.device) -> None:
        """Stay on the CPU. Raises ConfigError for another device."""
        if device.type != "cpu":
            raise ConfigError(
                f"teacher.runtime='onnxruntime' on {device.type}: accepted there is 'torch'"
            )

    def __call__(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised float [B, 3, h, w] to a global vector [B, D] and a map [B, D, gh, gw].

        Raises:
            ConfigError: when the network cannot be exported, or the export differs from it.
        """
        size = (planes.shape[2], planes.shape[3])
        if size not in self._sessions:
            session = self._export(size)
            self._check(session, size)
            self._sessions[size] = session
        return _run(self._sessions[size], planes)

    def _export(self, size: tuple[int, int]) -> "onnxruntime.InferenceSession":
        from dpal.model.onnx_import import onnxruntime

        graph, names = io.BytesIO(), ("planes", "cls", "dense")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of branches on the size, which is fixed
                torch.onnx.export(
                    _Module(self._network),
                    (torch.zeros(2, 3, *size),),
                    graph,
                    input_names=list(names[:1]),
                    output_names=list(names[1:]),
                    dynamic_axes={name: {0: "batch"} for name in names},
                    opset_version=17,
                    dynamo=False,  # the other exporter needs a package more
                )
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            options.log_severity_level = 4
            return onnxruntime.InferenceSession(
                graph.getvalue(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # neither library has a narrower type
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"teacher.runtime='onnxruntime': the teacher cannot be exported ({line}); "
                "accepted is 'torch'"
            ) from None

    def _check(self, session: "onnxruntime.InferenceSession", size: tuple[int, int]) -> None:
        for count in BATCHES:
            planes = torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(count))
            with torch.inference_mode():
                expected = self._network(planes)
            for name, found, wanted in zip(
                ("global vector", "map"), _run(session, planes), expected, strict=True
            ):
                error = largest_error(found, wanted)
                if not error <= TOLERANCE:
                    raise ConfigError(
                        f"teacher.runtime='onnxruntime': the {name} of {list(size)} differs from "
                        f"PyTorch's by {error:.1e} of its largest number, accepted is "
                        f"{TOLERANCE:.0e}; use 'torch'"
                    )


def largest_error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, as a share of the largest wanted number; infinite for other shapes."""
    if found.shape != wanted.shape:
        return float("inf")
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))


class _Module(nn.Module):
    """What the exporter wants to be handed."""

    def __init__(self, network: "Network") -> None:
        super().__init__()
        self.network = network

    def forward(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(planes)


def _run(session: "onnxruntime.InferenceSession", planes: Tensor) -> tuple[Tensor, Tensor]:
    cls, dense = session.run(None, {"planes": planes.contiguous().numpy()})
    return torch.from_numpy(cls), torch.from_numpy(dense)
