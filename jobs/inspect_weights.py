"""`dpal inspect WEIGHTS [OTHER]`: what a weights file is, and if its last block was trained."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from dpal.base.errors import EXIT_CONFIG, EXIT_DONE, ConfigError
from dpal.model.published.compare import Comparison, compare_last_block
from dpal.model.published.recognise import Fit, recognise
from dpal.model.weights import WeightsFile, bare, open_weights

LABEL = 11  # width of the first column


def inspect_weights(path: Path, other: Path | None = None) -> int:
    """Print what `path` holds, and the comparison of its last block with `other`'s.

    Returns:
        0, or the code of a configuration error when no teacher fits the file.

    Raises:
        ConfigError: when a file is not there, cannot be read, holds code, or cannot be compared.
    """
    _require(path)
    if path.suffix == ".onnx":
        if other is not None:
            raise ConfigError(f"{path}: an ONNX file has no blocks to compare")
        print("\n".join(_onnx_lines(path)))
        return EXIT_DONE
    file = open_weights(path)
    found = recognise(file)
    lines = [path.name, *_file_lines(file)]
    if found.fits:
        lines += ["", *_fit_lines(found.fits[0], path)]
        lines += [_line("also fits", _title(fit)) for fit in found.fits[1:]]
    else:
        reasons = found.refusals or ("its names are those of no layout that is known here",)
        lines += ["", _line("fits", "no kind of teacher"), *(_line("", r) for r in reasons)]
    print("\n".join(lines))
    if other is not None:
        _require(other)
        result = compare_last_block(file.state, open_weights(other).state, (path, other))
        print("\n" + "\n".join(_comparison_lines(result, path, other)))
    return EXIT_DONE if found.fits else EXIT_CONFIG


def _file_lines(file: WeightsFile) -> Iterator[str]:
    tensors = [value for value in file.state.values() if isinstance(value, Tensor)]
    where = f"under {'.'.join(file.wrappers)!r}" if file.wrappers else "at the top"
    yield _line(
        "file", f"{file.container}, {file.path.stat().st_size / 1e6:.1f} MB, tensors {where}"
    )
    if file.beside:
        yield _line("beside", ", ".join(file.beside[:8]) + (" ..." if len(file.beside) > 8 else ""))
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    numbers = sum(tensor.numel() for tensor in tensors)
    yield _line("tensors", f"{len(tensors)} with {numbers / 1e6:.2f} M numbers, {', '.join(kinds)}")
    if file.metadata:
        yield _line("metadata", ", ".join(sorted(file.metadata)))
    cut = bare(file.state, file.path)
    if cut.prefixes:
        yield _line("prefixes", ", ".join(cut.prefixes))
    groups: dict[str, int] = {}
    for key in cut.state:
        groups[key.split(".")[0]] = groups.get(key.split(".")[0], 0) + 1
    yield _line("groups", _counts(groups))


def _fit_lines(fit: Fit, path: Path) -> Iterator[str]:
    yield _line("fits", f"{_title(fit)}: every tensor accounted for")
    for label, value in fit.facts:
        yield _line(label, value)
    if fit.dropped:
        yield _line("left out", _counts(fit.dropped))
    keys = ", ".join(f"{key}: {value}" for key, value in {**fit.recipe, "weights": path}.items())
    yield _line("recipe", f"teacher: {{{keys}}}")


def _comparison_lines(result: Comparison, path: Path, other: Path) -> Iterator[str]:
    yield f"{path.name} against {other.name}, block {result.block} and final norm"
    width = max(len(row.name) for row in result.rows)
    yield f"  {'tensor':<{width}}  {'norm ratio':>10}  {'cosine':>7}"
    for row in result.rows:
        yield f"  {row.name:<{width}}  {row.ratio:>10.3f}  {row.cosine:>7.3f}"
    yield f"  mean cosine of the matrices of all other blocks: {result.others:.3f}"
    yield f"  {result.meaning}"


def _onnx_lines(path: Path) -> Iterator[str]:
    # Imported here: reading a torch file needs no ONNX.
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{path}: is not an ONNX file ({reason})") from None
    weights = {tensor.name for tensor in graph.initializer}
    yield path.name
    yield _line("file", f"ONNX, {path.stat().st_size / 1e6:.1f} MB, {len(graph.node)} nodes")
    for value in (*(v for v in graph.input if v.name not in weights), *graph.output):
        label = "output" if value in graph.output else "input"
        axes = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        yield _line(label, f"{value.name} {axes}")
    yield _line(
        "fits", "teacher.kind=onnx, with a global output [B, D] and a dense one [B, D, h, w]"
    )


def _title(fit: Fit) -> str:
    name = f", name {fit.recipe['name']}" if "name" in fit.recipe else ""
    return f"teacher.kind={fit.recipe['kind']}{name}"


def _counts(groups: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in groups.items())


def _line(label: str, text: str) -> str:
    return f"  {label:<{LABEL}}{text}"


def _require(path: Path) -> None:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"{str(path)!r} {what}; accepted are weights files")
