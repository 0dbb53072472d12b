"""Teacher dropping: with several teachers, an image is not taught by all of them in every step.

Whoever is matched worst always teaches; each other teacher is left out with a fixed probability,
so that an easy teacher cannot take over the student. Losses of different teachers compare only in
a space of like scale (`loss.targets` standardised or phi-s).

Legend: T teachers, B images.
Source: teacher dropping of UNIC (ECCV 2024), probability 0.5.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dpal.chance import generator


def kept_teachers(
    losses: Tensor, keys: Sequence[str], *, probability: float, seed: int, step: int
) -> Tensor:
    """Which losses count: 1 where a teacher teaches an image, else 0, float32 [T, B].

    kept_tb = 1 if t = argmax_s losses_sb (the first of equals) or u_tb >= p, with u uniform in
    [0, 1), a pure function of (seed, sample key, step, t): neither batch nor rank changes it.

    Args:
        losses: loss of every teacher on every image [T, B]; only their order matters.
        keys: sample keys of the images [B].
        probability: p, of leaving a teacher out.
        step: optimiser steps done before this one.
    """
    num_teachers = losses.shape[0]
    draws = [generator(seed, "teacher-drop", key, step).random(num_teachers) for key in keys]
    kept = np.stack(draws, axis=1) >= probability  # [T, B]
    mask = torch.from_numpy(kept).to(losses.device)
    mask.scatter_(0, losses.detach().argmax(dim=0, keepdim=True), True)
    return mask.float()
