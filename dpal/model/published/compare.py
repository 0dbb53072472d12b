"""Was a teacher's last block trained at all? Its tensors against those it started from.

PATH's training returns every block's output but the last one's, so the last block and the final
norm got no gradient: weight decay alone shrank the matrices, and left norms and biases as they
were. The tensors then point where MAE's point (cosine 1) at a fraction of their length.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from dpal.base.errors import ConfigError
from dpal.model.weights import bare, count_of

SAME_DIRECTION = 0.98  # cosine of two tensors that differ by scale only
SHRUNK = 0.5  # ratio of norms below which decay alone explains a matrix
UNCHANGED = 0.02  # distance of a ratio from 1
_FROM_MMPRETRAIN = (
    (r"^ln1\.", "norm."),
    (r"^layers\.(\d+)\.(?!blocks)", r"blocks.\1."),
    (r"^(blocks\.\d+)\.ln(\d)\.", r"\1.norm\2."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
)


class Row(NamedTuple):
    """One tensor in two files: norm of the first over norm of the second, and their cosine."""

    name: str
    shape: tuple[int, ...]
    ratio: float
    cosine: float


class Comparison(NamedTuple):
    """The last block and the final norm of two files, and one sentence about what it means."""

    block: int
    rows: tuple[Row, ...]
    others: float  # mean cosine of the matrices of all other blocks
    meaning: str


def compare_last_block(
    first: dict[str, Any], second: dict[str, Any], paths: tuple[Path, Path]
) -> Comparison:
    """Compare `blocks.<last>.*` and `norm.*` of two state dicts in ViT names.

    Raises:
        ConfigError: when the files do not both hold such a ViT of one size.
    """
    states = [
        {_vit_name(k): v for k, v in bare(state, path).state.items()}
        for state, path in zip((first, second), paths, strict=True)
    ]
    counts = [count_of(state, r"blocks\.(\d+)\.") for state in states]
    if counts[0] != counts[1] or not counts[0]:
        raise ConfigError(
            f"{paths[0]} and {paths[1]} have {counts[0]} and {counts[1]} blocks named "
            "'blocks.<k>': accepted are two ViTs of one depth"
        )
    last = counts[0] - 1
    rows = _rows(states[0], states[1], (f"blocks.{last}.", "norm."), paths)
    blocks = tuple(f"blocks.{i}." for i in range(last))
    others = [row.cosine for row in _rows(*states, blocks, paths) if len(row.shape) > 1]
    mean = sum(others) / len(others) if others else float("nan")
    return Comparison(last, rows, mean, _meaning(rows, mean, last))


def _rows(
    first: dict[str, Any], second: dict[str, Any], starts: tuple[str, ...], paths: tuple[Path, Path]
) -> tuple[Row, ...]:
    rows = []
    for name in (key for key in first if key.startswith(starts)):
        a, b = first[name], second.get(name)
        if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape):
            raise ConfigError(f"{paths[1]} has no {name} of the shape it has in {paths[0]}")
        x, y = a.double().flatten(), b.double().flatten()
        norms = float(x.norm()), float(y.norm())
        ratio = norms[0] / norms[1] if norms[1] else float("inf" if norms[0] else "nan")
        cosine = float(x @ y) / (norms[0] * norms[1]) if norms[0] * norms[1] else float("nan")
        rows.append(Row(name, tuple(a.shape), ratio, cosine))
    return tuple(rows)


def _meaning(rows: tuple[Row, ...], others: float, last: int) -> str:
    matrices = [row for row in rows if len(row.shape) > 1]
    if not matrices:
        return "the last block has no matrices to compare"
    same = all(row.cosine > SAME_DIRECTION for row in matrices)
    ratios = [row.ratio for row in matrices]
    if same and others > SAME_DIRECTION:
        return f"all blocks point alike, not only block {last}: these files cannot tell"
    if same and max(ratios) < SHRUNK:
        return (
            f"block {last} was not trained: its matrices are the second file's, decayed to "
            f"{min(ratios):.2f} to {max(ratios):.2f} of their norm, so 'norm' is about "
            f"block {last - 1} through an old norm; compare tap 'block{last - 1}', and take no "
            f"relations of block {last}"
        )
    if same and all(abs(ratio - 1) < UNCHANGED for ratio in ratios):
        return f"block {last} is the second file's, unchanged: it was not trained"
    if same:
        return f"block {last} points where the second file's does, at another scale: hardly trained"
    return f"block {last} was trained: it differs from the second file's in direction"


def _vit_name(key: str) -> str:
    """mmpretrain's names as timm's, so that Sapiens files compare too."""
    for pattern, replacement in _FROM_MMPRETRAIN:
        key = re.sub(pattern, replacement, key)
    return key
