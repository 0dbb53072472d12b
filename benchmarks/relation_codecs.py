"""How to store the relation target: a composite's tokens, its affinity, or sparse affinity rows.

    python benchmarks/relation_codecs.py RECIPE [--images 64] [KEY=VALUE ...]

The relation term needs A = softmax_j(T_i . T_j / sqrt(D)) of a composite's n = 1 + N tokens, in
the space of `loss.targets`. Stored are either tokens (every codec of `dpal.base.codec`), or log A
in 8 bits a number with a range for each row, or the k largest of each row, fp16 with uint16
places, the rest of the row spread evenly. Shown are bytes of one composite, the mean total
variation of a row, KL(exact || stored) in nats, and the relative difference of the relation term
for an untrained student and for two stand-ins of trained ones: the teacher's own tokens with noise
of 10 and of 50 per cent of their variance.

Legend: B composites, n tokens, D teacher width.
"""

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dpal.base.config import load_recipe
from dpal.model.tokens import Tokens
from dpal.objective import divergence, log_affinity
from dpal.target_space import TargetSpace, target_space
from jobs.caching.plan import single_teacher_recipes
from jobs.codec_sample import Sample, draw_sample, through

WORDS = ("fp16", "int8", "int4", "phis-int4")
RANKS = (216, 192, 142, 128, 96, 64, 32, 16)
TOP = (4, 8, 16, 32, 64)
NOISE = (0.1, 0.5)


class Stored(NamedTuple):
    """One way to store the relation target: log-affinities [B, n, n] that come back, and bytes."""

    name: str
    logs: list[Tensor]
    num_bytes: int


def joined(tokens: Tokens, space: TargetSpace) -> Tensor:
    """CLS and patch tokens in the target space: [B, n, D]."""
    turned = space(tokens)
    return torch.cat([turned.cls.unsqueeze(1), turned.patches], dim=1)


def in_eight_bits(logs: Tensor) -> Tensor:
    """Log-affinities with 256 levels between the smallest of each row and 0."""
    step = (-logs.amin(dim=2, keepdim=True) / 255).half().float()
    return ((logs / step).round() * step).clamp(max=0).log_softmax(dim=2)


def top_of_rows(logs: Tensor, k: int) -> Tensor:
    """The k largest affinities of each row in fp16, the rest spread evenly."""
    values, places = logs.exp().topk(k, dim=2)
    values = values.half().float()
    rest = (1 - values.sum(dim=2, keepdim=True)).clamp_min(1e-7) / (logs.shape[2] - k)
    return rest.expand_as(logs).scatter(2, places, values).clamp_min(1e-12).log()


def ways(sample: Sample, space: TargetSpace, exact: list[Tensor]) -> Iterator[Stored]:
    """Every way to store the target."""
    width, n = sample.calibration.header.width, exact[0].shape[1]
    ranks = [f"pca{r}-{s}" for r in RANKS if r < width for s in ("int8", "int4")]
    for word in (*WORDS, *ranks):
        header = sample.header(word)
        logs = []
        for targets in sample.exact:
            assert targets.composite is not None
            decoded = through(header, targets.composite, "composite")
            logs.append(log_affinity(joined(decoded, space)))
        yield Stored(f"tokens {word}", logs, header.layout("composite").num_bytes)
    spec = header.layout("composite").cls_start + 4  # view spec and checksum
    yield Stored("affinity, 8 bits", [in_eight_bits(a) for a in exact], spec + n * n + 2 * n)
    for k in TOP:
        logs = [top_of_rows(a, k) for a in exact]
        yield Stored(f"{k} largest of a row", logs, spec + n * 4 * k)


def students(sample: Sample, space: TargetSpace, width: int) -> dict[str, list[Tensor]]:
    """Log-affinities [B, n, n] of an untrained student and of noisy teachers, by name."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[Tensor]] = {"untrained": []}
    decoder = sample.task.decoder[0]
    for batch in sample.batches:
        seen = sample.task.look(batch, sample.moment)
        tokens = decoder(seen.relation, 2).tokens  # Pattern.RELATION
        found["untrained"].append(log_affinity(tokens.float()))
    exact = [joined(targets.composite, space) for targets in sample.exact]
    spread = torch.cat(exact).std()
    for share in NOISE:
        logs = []
        for tokens in exact:
            noise = torch.randn(tokens.shape, generator=generator) * spread * share**0.5
            logs.append(log_affinity(tokens + noise))
        found[f"noise {share:.0%}"] = logs
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--images", type=int, default=64)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, tuple(arguments.overrides))
    for single in single_teacher_recipes(recipe):
        sample = draw_sample(single, arguments.images)
        calibration = sample.calibration
        space = target_space(recipe.loss.targets, calibration.header, calibration.covariance)
        exact = [log_affinity(joined(t.composite, space)) for t in sample.exact]
        learners = students(sample, space, calibration.header.width)
        losses = {name: mean(map(divergence, s, exact)) for name, s in learners.items()}
        diagonal = torch.cat([a.exp().diagonal(dim1=1, dim2=2) for a in exact]).mean()
        print(
            f"{sample.num_images} composites, {exact[0].shape[1]} tokens of width "
            f"{calibration.header.width}, loss.targets={recipe.loss.targets}; mean affinity of a "
            f"token to itself {diagonal:.3f}"
        )
        print("relation term:", {name: round(value, 4) for name, value in losses.items()})
        for way in ways(sample, space, exact):
            variation = mean(
                (a.exp() - b.exp()).abs().sum(2).mean(1) / 2
                for a, b in zip(exact, way.logs, strict=True)
            )
            lost = mean(divergence(b, a) for a, b in zip(exact, way.logs, strict=True))
            cells = []
            for name, student in learners.items():
                other = mean(map(divergence, student, way.logs))
                cells.append(f"{name} {(other - losses[name]) / losses[name]:+.1e}")
            print(f"{way.name:22} {way.num_bytes:7d}  tv {variation:.1e}  kl {lost:.1e}  ", *cells)


def mean(parts: Iterator[Tensor]) -> float:
    """Mean over all composites of batches of values [B]."""
    return torch.cat(list(parts)).mean().item()


if __name__ == "__main__":
    main()
