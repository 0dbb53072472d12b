"""Shape masks: how much each patch counts in the local term (method: 2, local term).

A mask is the projection of a patch token on a principal direction, mapped to 0..1. Masks are made
from the teacher's raw tokens, whatever space the losses are taken in.

Legend: B samples, N patches, D teacher width.
"""

import torch
from torch import Tensor

from dpal.targets.header import TargetHeader


def mask_of(kind: str, patches: Tensor, header: TargetHeader) -> Tensor:
    """The mask that `loss.shape_mask` names, float32 [B, N, 1].

    Args:
        kind: fixed, per-batch, none or flipped.
        patches: raw teacher tokens of base views [B, N, D].
    """
    if kind == "none":
        return torch.ones(*patches.shape[:2], 1, device=patches.device)
    if kind == "per-batch":
        return batch_mask(patches)
    mask = fixed_mask(patches, header)
    return 1 - mask if kind == "flipped" else mask


def fixed_mask(patches: Tensor, header: TargetHeader) -> Tensor:
    """Bright on the person: m = clamp((t . v - low) / (high - low)), float32 [B, N, 1].

    One basis (v, low, high) for the whole cache replaces the reference's fit per batch: a token
    has the same mask in every batch, on every rank, cached or online.
    """
    with torch.autocast(patches.device.type, enabled=False):
        direction = torch.as_tensor(header.direction, device=patches.device)
        projection = patches.float() @ direction  # [B, N]
        mask = (projection - header.low) / (header.high - header.low)
    return mask.clamp(0, 1).unsqueeze(-1)


def batch_mask(patches: Tensor) -> Tensor:
    """The reference's mask: first principal component of these very tokens, float32 [B, N, 1].

    m = (p - min p) / (max p - min p) over the whole batch, for p = (t - mean) . v. The sign of v
    is scikit-learn's: its entry of largest magnitude is positive, so a channel of the teacher
    decides whether the person is bright. The mask of a token depends on the micro-batch it is in.
    Tokens that are all the same get 0.
    """
    with torch.autocast(patches.device.type, enabled=False):
        flat = patches.flatten(0, 1).float()  # [B N, D]
        centred = flat - flat.mean(dim=0)
        covariance = (centred.T @ centred).double()  # [D, D]; its factor 1/n changes no axis
        direction = torch.linalg.eigh(covariance).eigenvectors[:, -1]  # [D]
        direction = direction * direction[direction.abs().argmax()].sign()
        projection = centred @ direction.float()  # [B N]
        low, high = projection.min(), projection.max()
        mask = (projection - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    return mask.view(*patches.shape[:2], 1)
