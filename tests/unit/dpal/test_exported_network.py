"""A teacher that ONNX Runtime runs says what PyTorch's says, or is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dpal.base.errors import ConfigError
from dpal.base.teachers import MobileSamTeacher
from dpal.model.exported_network import ExportedNetwork, largest_error
from dpal.model.teacher import build_teacher, teacher_identity

WEIGHTS = Path(__file__).parents[4] / "shared" / "weights" / "mobile_sam.pt"
VIEW = (256, 128)


class Small:
    """A convolutional network with one more output, `spoiled` by what an export cannot know."""

    width, multiple = 4, 2

    def __init__(self, spoil: str = "") -> None:
        torch.manual_seed(0)
        self.conv, self.spoil = nn.Conv2d(3, 4, 2, stride=2).requires_grad_(False), spoil

    def __call__(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        dense = self.conv(planes)
        if self.spoil == "values" and float(planes.mean()) != 0:
            dense = dense + 1
        if self.spoil == "operator":
            dense = torch.linalg.eigvalsh(dense)
        return dense.mean(dim=(2, 3)), dense

    def to(self, device: torch.device) -> None:
        self.conv.to(device)


@pytest.mark.parametrize("shape", [(1, 3, 8, 4), (2, 3, 8, 4), (5, 3, 8, 8)])
def test_any_batch_and_size_is_pytorchs(shape: tuple[int, ...]) -> None:
    network, planes = Small(), torch.randn(shape, generator=torch.Generator().manual_seed(3))
    for found, wanted in zip(ExportedNetwork(network)(planes), network(planes), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_an_export_that_says_something_else_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"teacher.runtime='onnxruntime': .* differs"):
        ExportedNetwork(Small("values"))(torch.zeros(2, 3, 8, 4))


def test_a_network_that_cannot_be_exported_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match="cannot be exported"):
        ExportedNetwork(Small("operator"))(torch.zeros(2, 3, 8, 8))


def test_the_error_is_a_share_of_the_largest_number() -> None:
    wanted = torch.tensor([-4.0, 2.0])
    assert largest_error(wanted + torch.tensor([0.0, 1.0]), wanted) == 0.25
    assert largest_error(wanted[:1], wanted) == float("inf")


def test_another_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="accepted there is 'torch'"):
        ExportedNetwork(Small()).to(torch.device("cuda"))


def test_bf16_has_no_effect_there_and_is_refused() -> None:
    with pytest.raises(ValueError, match=r"teacher\.precision"):
        MobileSamTeacher(kind="mobilesam", weights="w.pt", runtime="onnxruntime", precision="bf16")


def test_the_runtime_is_part_of_the_identity_and_torch_is_as_before(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    path.write_bytes(b"weights")
    plain = MobileSamTeacher(kind="mobilesam", weights=str(path))
    other = plain.model_copy(update={"runtime": "onnxruntime"})
    before, now = (teacher_identity(spec, view_size=VIEW) for spec in (plain, other))
    assert "runtime" not in before
    assert now.pop("runtime").startswith("onnxruntime ")
    assert now == before


def test_mobilesam_by_either_runtime_gives_equal_tokens() -> None:
    if not WEIGHTS.is_file():
        pytest.skip("no weights of MobileSAM beside the checkout")
    plain = MobileSamTeacher(kind="mobilesam", weights=str(WEIGHTS))
    other = plain.model_copy(update={"runtime": "onnxruntime"})
    teachers = [build_teacher(spec, stride=16, view_size=VIEW) for spec in (plain, other)]
    generator = torch.Generator().manual_seed(0)
    for width in (128, 256):  # a base view, and a composite
        views = torch.randint(0, 256, (2, 256, width, 3), dtype=torch.uint8, generator=generator)
        wanted, found = (teacher(views) for teacher in teachers)
        for one, two in zip(found, wanted, strict=True):
            assert largest_error(one, two) < 1e-4
