"""The only door to timm: makes torchvision importable beside a CPU-only torch first.

The registry's torchvision is built against a CUDA torch. Beside a CPU torch its C++ library
cannot be loaded, and its Python part then fails while registering fakes for two operators that
do not exist. Declaring their schemas first lets torchvision and timm import; the compiled
operators themselves (nms, native image decoders) stay absent, and nothing here uses them.
"""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import torch

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def _native_library_loads() -> bool:
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return True  # nothing to repair; importing timm will say what is missing
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    libraries = [Path(found.origin).with_name(f"_C{suffix}") for suffix in suffixes]
    for library in filter(Path.exists, libraries):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
        return True
    return False


def _declare_missing_operators() -> torch.library.Library | None:
    if "torchvision" in sys.modules or _native_library_loads():
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name, schema in _SCHEMAS.items():
        library.define(name + schema)
    return library


_library = _declare_missing_operators()  # kept alive: dropping it undeclares the operators

import timm  # noqa: E402  (must follow the declaration)

__all__ = ["timm"]
