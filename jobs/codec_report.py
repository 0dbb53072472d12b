"""`dpal codecs`: bytes per view of every codec, and what it costs, on a sample of real targets.

Errors are of targets that were written as records and read back, against the teacher's exact ones:

    nmse                sum |x' - x|^2 / sum |x - mean|^2, of raw patch tokens of base views
    nmse_standardised   the same of tokens whose channels were brought to unit variance
    cosine              mean over patch tokens of cos(x' - mean, x - mean)
    largest             largest |x' - x| of a number, in standard deviations of its channel
    losses              (loss with x' - loss with x) / loss with x, for an untrained student

Legend: T loss terms.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dpal.base.codec import MIN_RANK, parse_codec
from dpal.base.errors import ConfigError
from dpal.base.recipe import Recipe
from dpal.phi_s import hadamard
from dpal.quantise import quantise
from dpal.record import RecordLayout
from dpal.target_source import Targets
from dpal.targets.coding import stored_patches
from dpal.targets.header import TargetHeader
from jobs.caching.plan import single_teacher_recipes, teacher_names
from jobs.codec_sample import Sample, draw_sample, through
from jobs.publish import write_text

FIXED = ("fp16", "int8", "int4", "phis-int8", "phis-int4")
RANKS = (256, 192, 128, 64)  # those that the teacher's width allows
SHARE = 1 / 6  # of fp16's bytes: the largest ranks within are shown too
NUM_IMAGES = 256
SMALL = 1e-8  # a loss below this has no relative difference


class CodecRow(NamedTuple):
    """One codec on one teacher's targets; the errors are defined above.

    Attributes:
        codec: its word.
        base_bytes, composite_bytes: of one record.
        of_fp16: base_bytes as a share of fp16's.
        header_bytes: of the cache's header, once.
        kept: share of the calibration's variance that a rotation keeps; None without one.
        clipped: share of the stored numbers that were clipped.
        losses: relative difference of every term of the method, by name.
    """

    codec: str
    base_bytes: int
    composite_bytes: int
    of_fp16: float
    header_bytes: int
    kept: float | None
    nmse: float
    nmse_standardised: float
    cosine: float
    largest: float
    clipped: float
    losses: dict[str, float]


class CodecReport(NamedTuple):
    """Every codec on one teacher.

    Attributes:
        teacher: what it is called.
        width: channels of its tokens.
        num_images: of the sample.
        calibration_images: that means, deviations and rotations were fitted on.
        disjoint: whether those are other images than the sample's.
        method: whose losses were compared, and `loss.targets`.
    """

    teacher: str
    width: int
    num_images: int
    calibration_images: int
    disjoint: bool
    method: str
    rows: list[CodecRow]


def codecs(recipe: Recipe, words: Sequence[str], num_images: int = NUM_IMAGES) -> list[CodecReport]:
    """Measure codecs on every teacher of a recipe; nothing is written.

    Args:
        words: of codecs; empty: a choice that fits the teacher.

    Raises:
        ConfigError: a word that is no codec or does not fit the teacher, a method without targets.
        DataError: missing or damaged images.
    """
    for word in words:
        try:
            parse_codec(word)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    reports = []
    singles = single_teacher_recipes(recipe)
    if not singles:
        raise ConfigError(
            f"method.kind={recipe.method.kind} has no targets that a codec could hold"
        )
    for name, single in zip(teacher_names(recipe), singles, strict=True):
        sample = draw_sample(single, num_images, words)
        layout = sample.calibration.header.layout("view")
        exact = sample.losses(sample.exact)
        rows = [measure(sample, word, exact) for word in words or usual(layout)]
        reports.append(
            CodecReport(
                name,
                layout.width,
                sample.num_images,
                sample.calibration_images,
                sample.disjoint,
                f"{recipe.method.kind}, loss.targets={recipe.loss.targets}",
                rows,
            )
        )
    return reports


def usual(layout: RecordLayout) -> list[str]:
    """Codecs that are worth a look for records of a width and a number of patches."""
    words = [word for word in FIXED if not word.startswith("phis-") or _turns(layout.width)]
    for storage in ("int8", "int4"):
        ranks = {rank for rank in RANKS if rank < layout.width}
        ranks |= {rank_within(SHARE, storage, layout)} - {0}
        words += [f"pca{rank}-{storage}" for rank in sorted(ranks, reverse=True)]
    return words


def _turns(width: int) -> bool:
    """Whether PHI-S is known for a width."""
    try:
        hadamard(width)
    except ConfigError:
        return False
    return True


def rank_within(share: float, storage: str, layout: RecordLayout) -> int:
    """The largest rank whose records have at most `share` of fp16's bytes; 0 when there is none."""
    limit = share * replace(layout, codec="fp16").num_bytes
    for rank in range((layout.width - 1) // 2 * 2, MIN_RANK - 1, -2):
        if replace(layout, codec=f"pca{rank}-{storage}").num_bytes <= limit:
            return rank
    return 0


def measure(sample: Sample, word: str, exact_losses: torch.Tensor) -> CodecRow:
    """One codec on a sample, whose losses with exact targets [T] are known."""
    header = sample.header(word)
    decoded, errors = [], _Errors(header)
    for exact in sample.exact:
        base = through(header, exact.base, "view")
        errors.add(exact.base.patches, base.patches)
        composite = exact.composite
        if composite is not None:
            composite = through(header, composite, "composite")
        decoded.append(Targets(base, composite))
    losses = sample.losses(decoded)
    names = sample.task.terms
    differences = {
        name: ((losses[i] - exact) / exact).item()
        for i, (name, exact) in enumerate(zip(names, exact_losses, strict=True))
        if exact > SMALL and name not in ("router", "expert")  # these see no target
    }
    layout = header.layout("view")
    return CodecRow(
        codec=word,
        base_bytes=layout.num_bytes,
        composite_bytes=header.layout("composite").num_bytes,
        of_fp16=layout.num_bytes / replace(layout, codec="fp16").num_bytes,
        header_bytes=len(header.to_json()),
        kept=None if header.rotation is None else header.rotation.kept,
        **errors.result(),
        losses=differences,
    )


class _Errors:
    """Sums over batches of the patch tokens of base views."""

    def __init__(self, header: TargetHeader) -> None:
        self._header = header
        self._mean, self._std = (
            torch.from_numpy(part).double() for part in (header.patch_mean, header.patch_std)
        )
        self._sums = torch.zeros(4, dtype=torch.float64)
        self._cosine = self._largest = 0.0
        self._tokens = self._clipped = self._numbers = 0

    def add(self, exact: torch.Tensor, decoded: torch.Tensor) -> None:
        """Count tokens [B, N, D] and what became of them."""
        x, y = exact.double() - self._mean, decoded.double() - self._mean
        error = y - x
        scaled = error / self._std
        parts = (error, x, scaled, x / self._std)
        self._sums += torch.stack([part.square().sum() for part in parts])
        self._cosine += torch.cosine_similarity(x, y, dim=2).sum().item()
        self._largest = max(self._largest, scaled.abs().max().item())
        self._tokens += x.shape[0] * x.shape[1]
        layout = self._header.layout("view")
        if layout.num_groups:
            values = stored_patches(exact.numpy(), self._header)
            self._clipped += quantise(values, layout.storage).clipped
            self._numbers += values.size

    def result(self) -> dict[str, Any]:
        """The error fields of a `CodecRow`."""
        raw, variance, scaled, unit = self._sums.tolist()
        return {
            "nmse": raw / variance,
            "nmse_standardised": scaled / unit,
            "cosine": self._cosine / self._tokens,
            "largest": self._largest,
            "clipped": self._clipped / max(self._numbers, 1),
        }


def text(report: CodecReport) -> str:
    """A report as a table."""
    told = "other images" if report.disjoint else "the same images: there are too few"
    lines = [
        f"{report.teacher}: width {report.width}, {report.num_images} images, statistics of "
        f"{report.calibration_images} ({told}); losses of {report.method}, untrained student"
    ]
    terms = list(report.rows[0].losses)
    head = ("codec", "base", "composite", "of fp16", "kept", "nmse", "nmse std", "cosine")
    names = [*head, "largest", "clipped", *(f"d {term}" for term in terms)]
    cells = [[_cell(value) for value in _values(row, terms)] for row in report.rows]
    widths = [max(len(cell) for cell in column) for column in zip(names, *cells, strict=True)]
    for line in (names, *cells):
        lines.append("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)))
    return "\n".join(lines)


def write_json(reports: Sequence[CodecReport], path: Path) -> None:
    """Put reports where `path` is. Raises StorageError."""
    plain = [{**r._asdict(), "rows": [row._asdict() for row in r.rows]} for r in reports]
    write_text(path, json.dumps(plain, indent=1) + "\n")


def _values(row: CodecRow, terms: Sequence[str]) -> list[Any]:
    shares = [f"{row.of_fp16:.1%}", "" if row.kept is None else f"{row.kept:.1%}"]
    errors = [row.nmse, row.nmse_standardised, f"{row.cosine:.5f}", row.largest]
    clipped = "0" if not row.clipped else f"{row.clipped:.1e}"
    losses = [f"{row.losses[term]:+.1e}" for term in terms]
    return [row.codec, row.base_bytes, row.composite_bytes, *shares, *errors, clipped, *losses]


def _cell(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) else str(value)
