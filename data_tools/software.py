"""Which libraries decide pixels and tokens, beyond what the digest of a cache covers.

The first job that publishes a cache notes them beside the header. Nothing depends on the note: it
tells where to look when a cache and a teacher disagree.
"""

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

MADE_WITH = "made_with.json"
LIBRARIES = ("torch", "timm", "onnxruntime", "numpy", "pillow", "simplejpeg")


def software() -> dict[str, str]:
    """Versions of the installed libraries, and the kind of processor."""
    return {**{name: _version(name) for name in LIBRARIES}, "machine": platform.machine()}


def software_bytes() -> bytes:
    """`software` as UTF-8 JSON."""
    return json.dumps(software(), indent=1, sort_keys=True).encode()


def read_software(data: bytes) -> dict[str, str]:
    """What `software_bytes` wrote; empty when it is damaged."""
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(plain, dict):
        return {}
    return {str(name): str(value) for name, value in plain.items()}


def differences(here: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    """Names with both values, of what both know and differs."""
    return [
        f"{name} ({here[name]!r} here, {there[name]!r} there)"
        for name in sorted(here.keys() & there.keys())
        if here[name] != there[name]
    ]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
