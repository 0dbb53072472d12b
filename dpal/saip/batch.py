"""What the loader hands to the SAIP task.

Legend: B samples on this rank, H x W base view, C local crops of h x w, S side of the scene,
V = 3 + C noisy views (g1, g2, local crops, background, in that order).
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SaipBatch:
    """One rank's slice of a global batch, as plain arrays.

    Attributes:
        keys: sample keys, in the order of the rows.
        globals: base views g1 and g2, uint8 [B, 2, H, W, 3].
        locals: local crops, uint8 [B, C, h, w, 3].
        background: what the scene is pasted over, uint8 [B, S, S, 3].
        corners: (top, left) in the scene of the last local crop and of the region image,
            int64 [B, 2, 2].
        photometric: colour noise of every view, float32 [B, V, 7] (see `SaipPlan.noise`).
    """

    keys: tuple[str, ...]
    globals: np.ndarray
    locals: np.ndarray
    background: np.ndarray
    corners: np.ndarray
    photometric: np.ndarray
