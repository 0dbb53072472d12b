"""Every public name of dpal/ says what it does: in one sentence, with shapes where it has any."""

import importlib
import inspect
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "dpal").rglob("*.py")
    if path.name != "__init__.py"
)
# Modules whose public functions speak of tensors, and therefore of shapes.
OF_TENSORS = ("dpal.objective", "dpal.augment", "dpal.saip.csm", "dpal.saip.csr", "dpal.saip.css")


def public(module: ModuleType) -> list[tuple[str, object]]:
    """Public functions, classes and methods that are defined in a module."""
    found: list[tuple[str, object]] = []
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value) or inspect.isclass(value):
            found.append((name, value))
        if inspect.isclass(value):
            found += [
                (f"{name}.{inner}", getattr(value, inner))
                for inner, member in vars(value).items()
                if not inner.startswith("_")
                and (inspect.isfunction(member) or isinstance(member, property))
            ]
    return found


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, name
    # `getdoc` also finds the words of the method that is overridden.
    silent = [inner for inner, value in public(module) if not inspect.getdoc(value)]
    assert not silent, f"{name}: {', '.join(silent)}"


@pytest.mark.parametrize("name", OF_TENSORS)
def test_functions_of_tensors_give_shapes(name: str) -> None:
    module = importlib.import_module(name)
    functions = [(n, f) for n, f in public(module) if inspect.isfunction(f) and "." not in n]
    assert functions, name
    without = [n for n, f in functions if "[" not in (inspect.getdoc(f) or "")]
    assert not without, f"{name}: {', '.join(without)} give no shape"
