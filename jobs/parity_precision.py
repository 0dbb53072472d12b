"""`dpal parity RECIPE --against fp32`: a teacher in bf16, or in another runtime, beside itself.

Every teacher of the recipe that does not run in fp32 through PyTorch looks at the same views as
its exact self. The exact tokens are written as records of the recipe's codec, and the others are
held against them by the bounds of the parity gate: so it is known before a cache is made whether
one made the cheaper way holds what fp32 says. No cache is needed, and none is written.

Legend: T loss terms.
"""

import gc
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dpal.base.errors import EXIT_DONE, ConfigError, DataError
from dpal.base.recipe import Recipe
from dpal.base.teachers import Teacher
from dpal.model.tokens import Tokens
from dpal.parity import Bounds, Compared, bounds_of, compare
from dpal.record import SPEC_NUMBERS, Kind
from dpal.target_source import OnlineTargets
from dpal.targets.coding import encode_batch
from dpal.targets.header import TargetHeader
from jobs.caching.plan import single_teacher_recipes, teacher_names, teacher_of
from jobs.codec_sample import Sample, draw_sample
from jobs.comparing.figures import median_cosine
from jobs.publish import write_text

CALIBRATION_IMAGES = 64  # statistics for a comparison need no more
WITHOUT_TARGET = ("router", "expert")  # terms that see the student alone
EXACT = {"precision": "fp32", "runtime": "torch"}


class PrecisionParity(NamedTuple):
    """One teacher beside itself in fp32 through PyTorch.

    Attributes:
        name: what the teacher is called.
        setting: the keys of its section that differ, e.g. "precision=bf16".
        samples, tokens: that were compared, in base views and composites together.
        median_cosine, smallest_cosine: of tokens after the recipe's codec; the median is that of
            base views or of composites, whichever is smaller.
        largest_steps: largest difference of a patch number, in steps of the codec.
        largest_excess: largest difference as a share of what is accepted.
        nmse: squared error of the patch tokens of base views over their variance.
        losses: loss terms of the untrained student that see a target, in the setting and in fp32.
        accepted: the bounds.
        seconds: of the exact teacher and of the other, for the samples, loading included.
    """

    name: str
    setting: str
    samples: int
    tokens: int
    median_cosine: float
    smallest_cosine: float
    largest_steps: float
    largest_excess: float
    nmse: float
    losses: dict[str, tuple[float, float]]
    accepted: Bounds
    seconds: tuple[float, float]

    @property
    def passed(self) -> bool:
        """Whether the parity gate would take the one for the other."""
        return self.accepted.accept(self.median_cosine, self.smallest_cosine, self.largest_excess)


def run_against_fp32(
    recipe: Recipe, samples: int, seed: int = 0, json_file: Path | None = None
) -> int:
    """Compare every teacher that is not exact with its exact self; print lines for each.

    Returns 0; a failure is an error, so that it ends with code 3.

    Raises:
        ConfigError: when every teacher runs in fp32 through PyTorch, or the method has none.
        DataError: when a teacher is not what it is in fp32, or images are missing or damaged.
    """
    if samples < 1:
        raise ConfigError(f"-n {samples}: accepted is 1 and more")
    pairs = [
        (name, single)
        for name, single in zip(teacher_names(recipe), single_teacher_recipes(recipe), strict=True)
        if inexact(single.teacher)
    ]
    if not pairs:
        raise ConfigError(
            "--against fp32: no teacher of the recipe runs in another way; accepted are teachers "
            "with precision=bf16 or runtime=onnxruntime"
        )
    found = [measure(name, single, samples, seed) for name, single in pairs]
    failures = []
    for one in found:
        print(_lines(one))
        if not one.passed:
            failures.append(_failure(one))
    if json_file is not None:
        plain = {"teachers": [_plain(one) for one in found], "failures": failures}
        write_text(json_file, json.dumps(plain, indent=1) + "\n")
    for failure in failures[1:]:
        print(failure)
    if failures:
        raise DataError(failures[0])
    return EXIT_DONE


def inexact(teacher: Teacher) -> dict[str, str]:
    """Keys of a teacher's section that keep it from running in fp32 through PyTorch."""
    return {
        key: getattr(teacher, key)
        for key, exact in EXACT.items()
        if getattr(teacher, key, exact) != exact
    }


def measure(name: str, recipe: Recipe, samples: int, seed: int) -> PrecisionParity:
    """Compare the teacher of a recipe with one teacher. Raises ConfigError or DataError."""
    begin = time.monotonic()
    setting = inexact(recipe.teacher)
    sample = _exact_sample(recipe, samples, seed)
    header = sample.header(recipe.cache.codec)
    middle = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = OnlineTargets(teacher_of(recipe).to(device), header)
    now = [source(batch, torch.device("cpu")) for batch in sample.batches]
    seconds = (middle - begin, time.monotonic() - middle)
    del source
    gc.collect()
    bounds = bounds_of(
        header.layout("view").storage, getattr(recipe.teacher, "precision", EXACT["precision"])
    )
    parts: dict[Kind, list[Compared]] = {"view": [], "composite": []}
    for exact, other in zip(sample.exact, now, strict=True):
        parts["view"].append(_compare(exact.base, other.base, header, "view", bounds))
        if exact.composite is not None and other.composite is not None:
            parts["composite"].append(
                _compare(exact.composite, other.composite, header, "composite", bounds)
            )
    both = [*parts["view"], *parts["composite"]]
    ours, theirs = sample.losses(now), sample.losses(sample.exact)  # [T]
    return PrecisionParity(
        name=name,
        setting=", ".join(f"{key}={value}" for key, value in setting.items()),
        samples=sample.num_images,
        tokens=sum(part.cosines.size for part in both),
        median_cosine=median_cosine(*parts.values()),
        smallest_cosine=float(min(part.cosines.min() for part in both)),
        largest_steps=float(max(part.steps.max() for part in both)),
        largest_excess=float(max(part.excess.max() for part in both)),
        nmse=_nmse(
            [(exact.base, other.base) for exact, other in zip(sample.exact, now, strict=True)]
        ),
        losses={
            term: (ours[i].item(), theirs[i].item())
            for i, term in enumerate(sample.task.terms)
            if term not in WITHOUT_TARGET
        },
        accepted=bounds,
        seconds=seconds,
    )


def _exact_sample(recipe: Recipe, samples: int, seed: int) -> Sample:
    exact = {key: EXACT[key] for key in inexact(recipe.teacher)}
    images = min(recipe.cache.calibration_images, CALIBRATION_IMAGES)
    changed = recipe.with_teacher(recipe.teacher.model_copy(update=exact)).model_copy(
        update={
            "cache": recipe.cache.model_copy(update={"calibration_images": images}),
            # the order of the images; pinned views stay those of the recipe
            "train": recipe.train.model_copy(update={"seed": recipe.train.seed + seed}),
        }
    )
    return draw_sample(changed, samples, (recipe.cache.codec,))


def _compare(
    exact: Tokens, other: Tokens, header: TargetHeader, kind: Kind, bounds: Bounds
) -> Compared:
    specs = np.zeros((len(exact.cls), SPEC_NUMBERS[kind]), dtype=np.uint16)
    records = encode_batch(exact.cls.numpy(), exact.patches.numpy(), specs, header, kind)
    return compare(records, other, header, kind, bounds.noise)


def _nmse(pairs: list[tuple[Tokens, Tokens]]) -> float:
    """Sum over tokens of |y - x|^2 over that of |x - mean x|^2, in float64."""
    exact, other = (
        torch.cat([pair[i].patches.flatten(0, 1) for pair in pairs]).double() for i in (0, 1)
    )
    return float((other - exact).square().sum() / (exact - exact.mean(0)).square().sum())


def _lines(one: PrecisionParity) -> str:
    verdict = "passes" if one.passed else "fails"
    lines = [
        f"parity: {one.name} with {one.setting} against fp32: {verdict}: {one.samples} samples, "
        f"{one.tokens} tokens: cosine {one.median_cosine:.6f} (accepted "
        f"{one.accepted.median:.6f}), smallest {one.smallest_cosine:.6f} (accepted "
        f"{one.accepted.smallest:.6f}), {one.largest_steps:.2g} steps apart at most, "
        f"{one.largest_excess:.2g} of what is accepted; squared error {one.nmse:.1e} of the "
        f"variance; {one.seconds[1]:.1f} s, in fp32 with its statistics {one.seconds[0]:.1f} s"
    ]
    lines += [
        f"  {term}: {ours:.5g}, in fp32 {exact:.5g}, {_apart(ours, exact):.2%} apart"
        for term, (ours, exact) in one.losses.items()
    ]
    return "\n".join(lines)


def _apart(ours: float, exact: float) -> float:
    return abs(ours - exact) / max(abs(exact), 1e-12)


def _failure(one: PrecisionParity) -> str:
    accepted = one.accepted
    return (
        f"{one.name} with {one.setting} is not what it is in fp32: median cosine "
        f"{one.median_cosine:.5f} (accepted {accepted.median:.5f}), smallest "
        f"{one.smallest_cosine:.5f} (accepted {accepted.smallest:.5f}), largest difference "
        f"{one.largest_excess:.3g} times what is accepted; use precision=fp32 through torch"
    )


def _plain(one: PrecisionParity) -> dict[str, Any]:
    return {**one._asdict(), "accepted": one.accepted._asdict(), "passed": one.passed}
