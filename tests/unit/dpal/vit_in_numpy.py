"""A plain ViT restated in float64 NumPy, straight from the names of MAE's files."""

import math

import numpy as np

erf = np.vectorize(math.erf)


def norm(x: np.ndarray, state: dict, name: str, eps: float = 1e-6) -> np.ndarray:
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + eps) * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: np.ndarray, state: dict, name: str) -> np.ndarray:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def qkv(x: np.ndarray, state: dict, block: str, heads: int) -> list[np.ndarray]:
    """q, k, v [B, H, L, d] of tokens that went through the block's first norm."""
    parts = np.split(linear(x, state, f"{block}.attn.qkv"), 3, axis=-1)
    batch, length, width = x.shape
    return [p.reshape(batch, length, heads, width // heads).transpose(0, 2, 1, 3) for p in parts]


def patches(planes: np.ndarray, weight: np.ndarray, bias: np.ndarray, padding: int) -> np.ndarray:
    """Patch embedding [B, N, D], one window at a time."""
    size = weight.shape[2]
    rows, columns = planes.shape[2] // size, planes.shape[3] // size
    padded = np.pad(planes, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    tokens = [
        np.einsum("bcij,dcij->bd", padded[:, :, y : y + size, x : x + size], weight) + bias
        for y in range(0, rows * size, size)
        for x in range(0, columns * size, size)
    ]
    return np.stack(tokens, 1)


def bicubic(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Keys' bicubic (a = -0.75) of [h, w, D], pixel centres at halves, no antialiasing."""
    for axis, target in enumerate(size):
        source = grid.shape[axis]
        centre = (np.arange(target) + 0.5) * source / target - 0.5
        base = np.floor(centre).astype(int)
        result = 0
        for offset in (-1, 0, 1, 2):
            distance = np.abs(centre - (base + offset))
            near = 1.25 * distance**3 - 2.25 * distance**2 + 1
            far = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
            weight = np.where(distance <= 1, near, far)
            picked = np.take(grid, np.clip(base + offset, 0, source - 1), axis=axis)
            shape = [1] * grid.ndim
            shape[axis] = target
            result = result + weight.reshape(shape) * picked
        grid = result
    return grid


def vit(
    planes: np.ndarray,
    state: dict,
    prefix: np.ndarray,
    positions: np.ndarray,
    *,
    heads: int,
    depth: int,
    padding: int = 0,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Output of every block and of the final norm, all [B, P + N, D].

    Args:
        prefix: prefix tokens with their positions [P, D]; positions: of the patches [N, D].
    """
    x = patches(planes, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], padding)
    front = np.broadcast_to(prefix, (len(x), *prefix.shape))
    x = np.concatenate([front, x + positions], 1)
    outputs = []
    for i in range(depth):
        block = f"blocks.{i}"
        q, k, v = qkv(norm(x, state, f"{block}.norm1"), state, block, heads)
        seen = softmax(q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[-1])) @ v
        x = x + linear(seen.transpose(0, 2, 1, 3).reshape(x.shape), state, f"{block}.attn.proj")
        hidden = gelu(linear(norm(x, state, f"{block}.norm2"), state, f"{block}.mlp.fc1"))
        x = x + linear(hidden, state, f"{block}.mlp.fc2")
        outputs.append(x)
    return outputs, norm(x, state, "norm")
