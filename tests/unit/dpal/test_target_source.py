"""Where targets come from: an online teacher is the one that filled the cache."""

import numpy as np
import pytest
import torch

from dpal.model.tokens import Tokens
from dpal.target_source import OnlineTargets

from made_task import made_batch, made_header


class Matrix:
    """A teacher of one matrix product (a `FrozenBackbone`)."""

    width, stride = 24, 16

    def __init__(self) -> None:
        self.matrix = torch.from_numpy(np.random.default_rng(3).normal(size=(3, 24))).float()

    def __call__(self, pixels: torch.Tensor) -> Tokens:
        tokens = pixels[:, ::16, ::16].float().flatten(1, 2) @ self.matrix
        return Tokens(tokens.mean(dim=1), tokens)


@pytest.mark.parametrize("part", ["base", "composite"])
def test_the_students_autocast_does_not_reach_an_online_teacher(part: str) -> None:
    source, batch, cpu = OnlineTargets(Matrix(), made_header()), made_batch(), torch.device("cpu")
    plain = getattr(source(batch, cpu), part)
    with torch.autocast("cpu", torch.bfloat16):
        inside = getattr(source(batch, cpu), part)
    assert inside.patches.dtype == torch.float32
    assert torch.equal(inside.patches, plain.patches)
    assert torch.equal(inside.cls, plain.cls)
