"""A forward without enough memory goes on in halves, and says the same."""

import numpy as np
import pytest
import torch

from dpal.base.errors import ConfigError, DataError
from dpal.model.tokens import Tokens
from jobs.caching.forward import HalvingForward, is_out_of_memory


class Device:
    """Tokens that depend on the pixels; room for `room` images at once."""

    def __init__(self, room: int, error: Exception | None = None) -> None:
        self.room, self.sizes = room, []
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    def __call__(self, pixels: torch.Tensor) -> Tokens:
        self.sizes.append(len(pixels))
        if len(pixels) > self.room:
            raise self.error
        patches = pixels.flatten(2).float()
        return Tokens(patches.mean(dim=1), patches)


def views(count: int) -> torch.Tensor:
    rng = np.random.default_rng(count)
    return torch.from_numpy(rng.integers(0, 256, size=(count, 4, 2, 3), dtype=np.uint8))


@pytest.mark.parametrize("count", [1, 7, 16])
@pytest.mark.parametrize("room", [1, 3, 5, 16])
def test_parts_are_the_whole_in_order(room: int, count: int) -> None:
    pixels = views(count)
    whole, parts = Device(count)(pixels), HalvingForward(Device(room), 16)(pixels)
    assert torch.equal(parts.cls, whole.cls)
    assert torch.equal(parts.patches, whole.patches)


def test_what_does_not_fit_is_tried_once_only() -> None:
    device = Device(5)
    forward = HalvingForward(device, 16)
    forward(views(16))
    assert forward.size == 4
    tried = len([size for size in device.sizes if size > 5])
    assert tried == 2  # 16 and 8
    forward(views(16))
    assert max(device.sizes[-4:]) == 4


def test_an_image_that_never_fits_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match="forward of one image"):
        HalvingForward(Device(0), 16)(views(3))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
        Exception("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for req"),
    ],
)
def test_every_runtimes_word_for_no_memory_is_known(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert HalvingForward(Device(2, error), 8)(views(5)).cls.shape[0] == 5


def test_any_other_error_passes_through() -> None:
    for error in (DataError("not finite"), RuntimeError("shapes cannot be multiplied")):
        with pytest.raises(type(error), match=str(error)):
            HalvingForward(Device(2, error), 8)(views(5))
