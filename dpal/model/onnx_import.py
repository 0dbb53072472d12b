"""The only door to ONNX Runtime: it sends nothing about its use to its makers.

Since 1.29 the packages report to a server when a network is loaded, unless a variable says no
before the library is imported. A user who wants it sets `ORT_DISABLE_TELEMETRY=0`.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

__all__ = ["onnxruntime"]
