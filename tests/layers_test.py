"""Imports point down: dpal.base <- dpal <- data_tools, cluster <- jobs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What each layer may import of the project, most specific prefix first.
ALLOWED = {
    "dpal/base": ("dpal.base",),
    "dpal": ("dpal",),
    "data_tools": (
        *("dpal.base", "dpal.views", "dpal.record", "dpal.targets", "dpal.batch"),
        *("dpal.saip.views", "dpal.saip.batch"),
    ),
    "cluster": ("dpal.base",),
    "jobs": ("dpal", "data_tools", "cluster"),
}
OWN = ("dpal", "data_tools", "cluster", "jobs")
NETWORK = ("ray", "s3fs", "fsspec", "kubernetes", "requests", "aiohttp", "webdataset")


def layer_of(path: Path) -> str:
    relative = path.relative_to(ROOT).as_posix()
    return max((layer for layer in ALLOWED if relative.startswith(f"{layer}/")), key=len)


def imports_of(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def inside(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


MODULES = [path for layer in OWN for path in sorted((ROOT / layer).rglob("*.py"))]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down(path: Path) -> None:
    layer = layer_of(path)
    own = layer.replace("/", ".").split(".")[0]
    allowed = (*ALLOWED[layer], layer.replace("/", ".")) if layer != "dpal/base" else ALLOWED[layer]
    for name in imports_of(path):
        if inside(name, OWN):
            assert inside(name, allowed), f"{path.name} of {layer} imports {name}"
        if own == "dpal":
            assert not inside(name, NETWORK), f"{path.name} of dpal imports {name}"


@pytest.mark.parametrize("library", ["timm", "onnxruntime"])
def test_a_library_that_needs_care_is_imported_through_its_door_alone(library: str) -> None:
    found = [path for path in MODULES if any(inside(n, (library,)) for n in imports_of(path))]
    doors = {"timm": "timm_import.py", "onnxruntime": "onnx_import.py"}
    assert [path.name for path in found] == [doors[library]]


def test_onnx_runtime_reports_nothing_unless_the_user_says_so() -> None:
    code = (
        "import os; from dpal.model.onnx_import import onnxruntime;"
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    for said, expected in ((None, "1"), ("0", "0")):
        own = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
        own |= {} if said is None else {"ORT_DISABLE_TELEMETRY": said}
        answer = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=own, capture_output=True, check=True
        )
        assert answer.stdout.decode().strip() == expected


def test_the_data_layer_needs_no_torch() -> None:
    code = (
        "import sys, data_tools.loader, data_tools.aligned_samples, data_tools.saip_samples;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_command_starts_without_torch() -> None:
    code = (
        "import sys, dpal, dpal.base.recipe, jobs.__main__, jobs.submit, cluster.slurm;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
