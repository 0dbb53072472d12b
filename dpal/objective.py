"""The alignment losses of DPAL and of the methods it is compared with.

Every function is pure, works in float32, and gives one value per image [B], whose mean is the
loss: several teachers are weighed image by image. Targets carry no gradient.
Legend: B images, V views, N tokens, D teacher width, H heads, K patterns, G x G token grid of a
composite, M instances (persons) of a scene, C regions (local crops) of a view.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def identity_loss(decoded: Sequence[Tensor], target: Tensor) -> Tensor:
    """Global level of DPAL: every view's decoded CLS against the base view's CLS.

    L_g = (1/V) sum_v mean_D (Y_v - T_g)^2, for V decoded vectors [B, D] and a target [B, D].
    Source: DPAL reference, `main_align_pretrain_moe.py`, final version.
    """
    return torch.stack([mse(y, target) for y in decoded]).mean(dim=0)


def shape_loss(decoded: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Local level of DPAL: masked patch tokens; the mask [B, N, 1] multiplies both sides.

    L_l = mean_{N,D} (m Y - m T)^2, for tokens [B, N, D]. Source: as `identity_loss`.
    """
    return (mask * (decoded.float() - target)).square().mean(dim=(1, 2))


def relation_loss(decoded: Tensor, target: Tensor, stable: bool = True) -> Tensor:
    """Instance level of DPAL: KL divergence between token-affinity rows of teacher and student.

    A = softmax_j(T_i . T_j / sqrt(D)); L_r = mean_i sum_j A^T_ij (log A^T_ij - log A^S_ij),
    for composite tokens [B, N, D]. Source: as `identity_loss`.

    Args:
        stable: log-softmax; False: log(softmax) as the reference writes it, which is minus
            infinity where an affinity underflows (rows are nearly one-hot).
    """
    student, teacher = log_affinity(decoded.float(), stable), log_affinity(target, stable)
    return divergence(student, teacher)


def log_affinity(tokens: Tensor, stable: bool = True) -> Tensor:
    """Logarithm of the row-wise softmax of scaled token products: [B, N, D] -> [B, N, N]."""
    scores = tokens @ tokens.transpose(1, 2) / tokens.shape[-1] ** 0.5
    return scores.log_softmax(dim=-1) if stable else scores.softmax(dim=-1).log()


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of log-probabilities [B, ..., N]: sum over the last axis, mean over
    the others but the first: [B]."""
    rows = (teacher.exp() * (teacher - student)).sum(dim=-1)
    return rows.flatten(1).mean(dim=1)


def instance_relation_loss(student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
    """Instance relation of a real scene: KL divergence between affinity rows of its persons.

    A = softmax_j(F_i . F_j / sqrt(D)) over the scene's own instances, the rows beyond `counts`
    being padding; L_r = mean_i sum_j A^T_ij (log A^T_ij - log A^S_ij). A scene with fewer than
    two instances has nothing to relate and gives 0.

    Args:
        student, teacher: pooled instances [B, M, D], see `instance_features`.
        counts: instances of each scene [B].
    """
    place = torch.arange(student.shape[1], device=student.device)
    valid = place < counts.view(-1, 1)  # [B, M]
    logs = []
    for features in (student.float(), teacher):
        scores = features @ features.transpose(1, 2) / features.shape[-1] ** 0.5  # [B, M, M]
        # The lowest finite number: minus infinity would make rows of padding not-a-number.
        scores = scores.masked_fill(~valid.unsqueeze(1), torch.finfo(scores.dtype).min)
        logs.append(scores.log_softmax(dim=-1).masked_fill(~valid.unsqueeze(1), 0))
    rows = (logs[1].exp() * (logs[1] - logs[0])).sum(dim=-1)  # [B, M]
    related = valid & (counts > 1).view(-1, 1)
    return (rows * related).sum(dim=1) / counts.clamp_min(1)


def instance_features(patches: Tensor, boxes: Tensor, side: int, samples: int = 8) -> Tensor:
    """One feature for every box, RoIAlign with a single bin: [B, G * G, D] -> [B, M, D].

    F = mean_{k,l} bilinear(T; x_k, y_l), with x_k = (left + (k + 1/2) / S (right - left)) G / side
    - 1/2 for k, l < S and y_l likewise, clamped to the grid (the centre of token i lies at i).
    The sample points form a grid, so bilinear weights and mean fall apart into rows and columns,
    and the pooling is one matrix product.
    Source: Mask R-CNN, section 3, with the half-pixel shift of its later `aligned` version.

    Args:
        boxes: left, top, right, bottom in pixels of the composite [B, M, 4].
        side: height and width of the composite, in pixels.
        samples: S.
    """
    grid = round(patches.shape[1] ** 0.5)
    columns = _linear_weights(boxes[..., 0], boxes[..., 2], grid, side, 1, samples)  # [B, M, 1, G]
    rows = _linear_weights(boxes[..., 1], boxes[..., 3], grid, side, 1, samples)
    weights = (rows.transpose(2, 3) * columns).flatten(2)  # [B, M, G * G]
    return weights @ patches.float()


def region_features(
    patches: Tensor, regions: Tensor, grid: tuple[int, int], bins: tuple[int, int], samples: int = 2
) -> Tensor:
    """The tokens of parts of a view, RoIAlign: [B, N, D] -> [B, C, h * w, D].

    As `instance_features`, with h x w bins for each region and S x S points in each bin. A region
    that runs from right to left is read that way, which is what a mirrored crop shows.

    Args:
        regions: left, top, right, bottom as shares of the view's width and height [B, C, 4].
        grid: rows and columns of the view's patches.
        bins: h and w.
        samples: S.
    """
    rows = _linear_weights(regions[..., 1], regions[..., 3], grid[0], 1, bins[0], samples)
    columns = _linear_weights(regions[..., 0], regions[..., 2], grid[1], 1, bins[1], samples)
    tokens = patches.float().unflatten(1, grid)
    tall = torch.einsum("bchi,bijd->bchjd", rows, tokens)
    return torch.einsum("bcwj,bchjd->bchwd", columns, tall).flatten(2, 3)


def _linear_weights(
    low: Tensor, high: Tensor, grid: int, side: int, bins: int, samples: int
) -> Tensor:
    """Mean weight of every grid line in linear interpolation at S points of each bin.

    The bins cut [low, high] into equal parts; low and high are [B, M], the weights [B, M, bins, G].
    """
    share = (torch.arange(bins * samples, device=low.device) + 0.5) / (bins * samples)
    points = low.unsqueeze(-1) + share * (high - low).unsqueeze(-1)  # [B, M, bins * S]
    places = (points * grid / side - 0.5).clamp(0, grid - 1)
    lines = torch.arange(grid, device=low.device)
    weights = (1 - (places.unsqueeze(-1) - lines).abs()).clamp_min(0)  # [B, M, bins * S, G]
    return weights.unflatten(2, (bins, samples)).mean(dim=-2)


def mse(projected: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of every image: mean over all axes but the first, [B]."""
    return (projected.float() - target).square().flatten(1).mean(dim=1)


def masked_patch_loss(projected: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Proteus' patch term: mean squared error of masked patches alone, 0 without any.

    L_b = sum_i m_i mean_D (Y_i - T_i)^2 / sum_i m_i, for tokens [B, N, D] and a mask bool [B, N].
    Source: Proteus reference, `models_proteus_dinov2.py`.
    """
    error = (projected.float() - target).square().mean(dim=2)  # [B, N]
    return (error * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)


def attention_relation(queries: Tensor, keys: Tensor) -> Tensor:
    """log softmax_j(Q_i . K_j / sqrt(d)): [B, H, N, d] twice -> [B, H, N, N].

    With the values on both sides it is the value-value relation.
    Source: TinyMIM reference, `models_tinymim.py`.
    """
    scores = queries.float() @ keys.float().transpose(2, 3) / queries.shape[-1] ** 0.5
    return scores.log_softmax(dim=-1)


def router_loss(logits: Sequence[Tensor], labels: Sequence[int]) -> Tensor:
    """Mean over decoder calls of the cross-entropy of router logits [B, K] and label: [B]."""
    terms = [
        F.cross_entropy(
            z.float(), z.new_full((z.shape[0],), label, dtype=torch.long), reduction="none"
        )
        for z, label in zip(logits, labels, strict=True)
    ]
    return torch.stack(terms).mean(dim=0)


def expert_penalty(energies: Sequence[Tensor]) -> Tensor:
    """Mean over decoder calls of the mixed expert's squared Frobenius norm [B]: [B]."""
    return torch.stack([energy.float() for energy in energies]).mean(dim=0)
