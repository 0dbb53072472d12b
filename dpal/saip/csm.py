"""CSM, cross-scale matching: prototypes over different views, attention relations over the same.

Source: reference `CSMLoss` (main_pretrain.py 465-534) and `pretrain_decoder.py`.
Legend: B images, V student views of which the first two are the averaged encoder's, K prototypes,
D student width, H heads, T tokens, d head width. Losses are float32, one value an image.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpal.model.start_values import xavier
from dpal.objective import attention_relation, divergence

EXPERT_TEMPERATURE = 0.04
STUDENT_TEMPERATURE = 0.1
CENTRE_MOMENTUM = 0.9


class PrototypeHead(nn.Module):
    """CLS -> unit vector (MLP of three layers, GELU) -> cosine with K unit prototypes.

    Args:
        width: student width D.
        hidden: width of both hidden layers.
        bottleneck: width of the unit vector.
        prototypes: K.
    """

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        xavier(self)
        # Weight norm with its gain fixed to 1 leaves the rows' directions alone.
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        nn.init.kaiming_uniform_(self.prototypes, a=5**0.5)

    def forward(self, cls: Tensor) -> Tensor:
        """Cosines in -1..1, float32 [..., K], of CLS tokens [..., D]."""
        vectors = self.mlp(cls)
        # Divided by temperatures of .04 and .1 below, bfloat16 cosines would be too coarse.
        with torch.autocast(cls.device.type, enabled=False):
            unit = F.normalize(vectors.float(), dim=-1)
            return F.linear(unit, F.normalize(self.prototypes.float(), dim=-1))


def expert_probabilities(logits: Tensor, centre: Tensor) -> Tensor:
    """P_t = softmax((t - c) / .04) over the last axis, for logits [..., K] and a centre [K]."""
    return ((logits.float() - centre) / EXPERT_TEMPERATURE).softmax(dim=-1)


def representation_loss(student: Tensor, expert: Tensor) -> Tensor:
    """L_rep [B]: cross-entropy of every pair of different views.

    L = mean over i in {1, 2}, v != i of - sum_k P_t(i)_k log softmax(s_v / .1)_k, for student
    logits s [V, B, K] and expert probabilities P_t [2, B, K].
    """
    log_p = (student.float() / STUDENT_TEMPERATURE).log_softmax(dim=-1)  # [V, B, K]
    others = log_p.sum(dim=0) - log_p[:2]  # [2, B, K]: the sum over v != i
    return -(expert * others).sum(dim=(0, 2)) / (2 * (len(student) - 1))


def attention_loss(student: Tensor, expert: Tensor) -> Tensor:
    """L_att of one view [B]: KL(A^t || A^s) of query-key and of value-value attention.

    A_qk = softmax(Q K^T / sqrt(d)), A_vv = softmax(V V^T / sqrt(d)); sum over keys, mean over
    heads and queries, for qkv [3, B, H, T, d]. Log-softmax where the reference adds 1e-10 inside
    both logarithms: the same within 1e-10 wherever a probability matters, and never infinite.
    """
    terms = [
        divergence(*(attention_relation(qkv[left], qkv[right]) for qkv in (student, expert)))
        for left, right in ((0, 1), (2, 2))
    ]
    return torch.stack(terms).sum(dim=0)


def moved_centre(centre: Tensor, mean_logits: Tensor) -> Tensor:
    """c <- .9 c + .1 mean(t), for a centre and a mean over batch and ranks [K]."""
    return CENTRE_MOMENTUM * centre + (1 - CENTRE_MOMENTUM) * mean_logits
