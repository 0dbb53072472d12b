"""A teacher's forward that goes on with smaller batches when its device has no memory left.

Legend: B images of a batch, H x W view pixels, D teacher width, N patches.
"""

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from dpal.base.errors import ConfigError
from dpal.model.tokens import Tokens

Forward = Callable[[Tensor], Tokens]
# What PyTorch's CPU allocator and ONNX Runtime say; only CUDA has an exception of its own.
_WORDS = (
    "can't allocate memory",
    "not enough memory",
    "failed to allocate memory",
    "_alloc_failed",  # of cuBLAS and cuDNN
)


class HalvingForward:
    """Runs a batch whole or in parts; the parts halve when memory runs out, and stay so.

    Batch norm does not run in a frozen teacher, so parts change a token at most in the last places
    (other kernels add up in another order).

    Args:
        forward: uint8 views [B, H, W, 3] to tokens.
        size: images that it gets at once, at most.

    Attributes:
        size: what it is now.
    """

    def __init__(self, forward: Forward, size: int) -> None:
        self.forward, self.size = forward, size

    def __call__(self, pixels: Tensor) -> Tokens:
        """Tokens of views [B, H, W, 3]: CLS [B, D] and patches [B, N, D].

        Raises:
            ConfigError: when not even one image fits.
        """
        parts: list[Tokens] = []
        start = 0
        while start < len(pixels):
            try:
                parts.append(self.forward(pixels[start : start + self.size]))
            except Exception as error:  # ONNX Runtime has no narrower type
                if not is_out_of_memory(error):
                    raise
                tried = min(self.size, len(pixels) - start)
            else:
                start += self.size
                continue
            # Outside of `except`: the error's traceback holds on to what the forward allocated.
            self._halve(tried)
        if len(parts) == 1:
            return parts[0]
        return Tokens(
            torch.cat([part.cls for part in parts]), torch.cat([part.patches for part in parts])
        )

    def _halve(self, tried: int) -> None:
        if tried == 1:
            raise ConfigError(
                "teacher.batch_size: the device's memory does not hold the forward of one image; "
                "accepted is a smaller teacher.input, or a device with more memory"
            )
        self.size = tried // 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a forward failed for lack of memory, on any device or runtime."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(word in str(error).lower() for word in _WORDS)
