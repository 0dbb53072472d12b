"""The three objectives of SAIP against plain NumPy restatements of their equations, in float64."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dpal.chance import generator
from dpal.saip import csm, csr, css

Array = np.ndarray[Any, Any]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def numbers(module: nn.Module) -> dict[str, Array]:
    return {name: value.detach().double().numpy() for name, value in module.state_dict().items()}


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random values for every parameter, so that biases and norms matter, in float64."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.2 * spread)
    return module.double()


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x: Array) -> Array:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def linear(w: dict[str, Array], name: str, x: Array) -> Array:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(w: dict[str, Array], name: str, x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scale = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]


def heads_attend(q: Array, k: Array, v: Array, heads: int) -> Array:
    """One image: q [M, W], k and v [N, W]."""
    width = q.shape[1] // heads
    parts = []
    for h in range(heads):
        cut = slice(h * width, (h + 1) * width)
        weights = softmax(q[:, cut] @ k[:, cut].T / math.sqrt(width))
        parts.append(weights @ v[:, cut])
    return np.concatenate(parts, axis=1)


def vit_block(w: dict[str, Array], name: str, x: Array, heads: int) -> Array:
    q, k, v = np.split(linear(w, f"{name}.attn.qkv", layer_norm(w, f"{name}.norm1", x)), 3, axis=1)
    x = x + linear(w, f"{name}.attn.proj", heads_attend(q, k, v, heads))
    hidden = gelu(linear(w, f"{name}.mlp.fc1", layer_norm(w, f"{name}.norm2", x)))
    return x + linear(w, f"{name}.mlp.fc2", hidden)


def bicubic(x: Array, length: int) -> Array:
    """Resize a sequence [N, W]; kernel with a = -.75, half-pixel centres, edges repeated."""

    def weight(distance: float) -> float:
        d, a = abs(distance), -0.75
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    result = np.zeros((length, x.shape[1]))
    for i in range(length):
        place = (i + 0.5) * len(x) / length - 0.5
        for j in range(math.floor(place) - 1, math.floor(place) + 3):
            result[i] += weight(place - j) * x[min(max(j, 0), len(x) - 1)]
    return result


def test_prototype_head_gives_cosines_of_the_mlps_output(rng: np.random.Generator) -> None:
    head = shaken(csm.PrototypeHead(12, 20, 8, 30))
    x, w = rng.normal(size=(5, 12)), numbers(head)
    y = gelu(linear(w, "mlp.2", gelu(linear(w, "mlp.0", x))))
    y = linear(w, "mlp.4", y)
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    rows = w["prototypes"] / np.linalg.norm(w["prototypes"], axis=1, keepdims=True)
    assert np.allclose(head(torch.tensor(x)).detach(), y @ rows.T, atol=1e-6)


def test_representation_loss_is_the_cross_entropy_of_different_views(
    rng: np.random.Generator,
) -> None:
    student, expert = rng.uniform(-1, 1, (6, 3, 11)), rng.uniform(-1, 1, (2, 3, 11))
    centre = rng.normal(size=11) * 0.1
    expected = np.zeros(3)
    for b in range(3):
        pairs = [
            -(softmax((expert[i, b] - centre) / 0.04) * np.log(softmax(student[v, b] / 0.1))).sum()
            for i in range(2)
            for v in range(6)
            if v != i
        ]
        assert len(pairs) == 10
        expected[b] = np.mean(pairs)
    known = csm.expert_probabilities(torch.tensor(expert), torch.tensor(centre))
    result = csm.representation_loss(torch.tensor(student), known)
    assert np.allclose(result, expected, rtol=1e-5)


def test_attention_loss_is_the_divergence_of_both_relations(rng: np.random.Generator) -> None:
    student, expert = (rng.normal(size=(3, 2, 4, 7, 5)) for _ in range(2))

    def relation(qkv: Array, left: int, right: int, b: int, h: int) -> Array:
        return softmax(qkv[left, b, h] @ qkv[right, b, h].T / math.sqrt(5))

    expected = np.zeros(2)
    for b in range(2):
        for left, right in ((0, 1), (2, 2)):
            rows = []
            for h in range(4):
                s, t = (relation(qkv, left, right, b, h) + 1e-10 for qkv in (student, expert))
                rows.append((t * (np.log(t) - np.log(s))).sum(-1))
            expected[b] += np.mean(rows)
    result = csm.attention_loss(torch.tensor(student), torch.tensor(expert))
    assert np.allclose(result, expected, rtol=1e-4)


def test_attention_loss_stays_finite_where_a_probability_vanishes() -> None:
    student = torch.full((3, 1, 1, 2, 1), 100.0).requires_grad_()
    expert = torch.tensor([100.0, -100.0]).view(1, 1, 1, 2, 1).expand(3, 1, 1, 2, 1)
    loss = csm.attention_loss(student, expert).sum()
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_centre_moves_by_a_tenth(rng: np.random.Generator) -> None:
    centre, mean = rng.normal(size=(2, 6))
    result = csm.moved_centre(torch.tensor(centre), torch.tensor(mean))
    assert np.allclose(result, 0.9 * centre + 0.1 * mean)


def test_patch_targets_are_normalised_patch_by_patch(rng: np.random.Generator) -> None:
    pixels = rng.normal(2, 3, (2, 3, 48, 32))
    expected = np.zeros((2, 6, 768))
    for b in range(2):
        for p in range(6):
            top, left = 16 * (p // 2), 16 * (p % 2)
            numbers_ = pixels[b, :, top : top + 16, left : left + 16].transpose(1, 2, 0).ravel()
            expected[b, p] = (numbers_ - numbers_.mean()) / np.sqrt(numbers_.var(ddof=1) + 1e-6)
    assert np.allclose(csr.normalised_patches(torch.tensor(pixels)), expected, atol=1e-4)


def test_reconstruction_loss_counts_scored_patches_only(rng: np.random.Generator) -> None:
    predicted, target = rng.normal(size=(2, 3, 5, 768))
    scored = np.array([[0, 1, 0, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1.0]])
    expected = [
        np.mean([((predicted[b, p] - target[b, p]) ** 2).mean() for p in range(5) if scored[b, p]])
        for b in range(3)
    ]
    result = csr.reconstruction_loss(*(torch.tensor(x) for x in (predicted, target, scored)))
    assert np.allclose(result, expected, rtol=1e-5)


def test_reconstruction_decoder_restated(rng: np.random.Generator) -> None:
    decoder = shaken(csr.ReconstructionDecoder(12, (4, 2), width=16, depth=2, heads=4))
    w, cells = numbers(decoder), 15
    visible = np.array([[0, 4, 11], [2, 3, 14]])
    tokens, first = rng.normal(size=(2, 4, 12)), rng.normal(size=(2, 12))
    expected = np.zeros((2, cells, 768))
    for b in range(2):
        shown = linear(w, "embed", tokens[b])
        sequence = np.tile(w["mask_token"][0], (2 + cells, 1))
        sequence[0], sequence[1] = shown[0], linear(w, "embed", first[b])
        for token, place in zip(shown[1:], visible[b], strict=True):
            sequence[2 + place] = token
        sequence[0] += w["positions"][0, 0]
        sequence[1:] += bicubic(w["positions"][0, 1:], cells + 1)
        for block in range(2):
            sequence = vit_block(w, f"blocks.{block}", sequence, heads=4)
        expected[b] = linear(w, "predict", layer_norm(w, "norm", sequence))[2:]
    inputs = (torch.tensor(tokens), torch.tensor(first), torch.tensor(visible))
    result = decoder(*inputs, cells).detach()
    assert np.allclose(result, expected, atol=1e-6)


def test_masks_are_drawn_on_the_anchor_grid_and_resized() -> None:
    keys = [f"{i:08x}" for i in range(40)]
    masks = csr.draw_masks(0, keys, 3, (16, 8), (20, 10), 0.75)
    cases = set()
    for key, visible, scored in zip(keys, masks.visible, masks.scored, strict=True):
        shown = generator(0, "saip-mask", key, 3).permutation(128)[:32]
        anchor = torch.ones(1, 1, 16, 8)
        anchor.view(-1)[shown.tolist()] = 0
        resized = F.interpolate(anchor, size=(20, 10), mode="nearest").flatten().numpy()
        unmasked = set(np.flatnonzero(resized == 0))
        assert len(set(visible)) == 50
        if len(unmasked) >= 50:  # some stay hidden and are not scored
            assert set(visible) <= unmasked
            assert np.array_equal(scored, resized)
        else:  # some masked ones are shown and not scored
            assert unmasked < set(visible)
            resized[visible] = 0
            assert np.array_equal(scored, resized)
        cases.add(len(unmasked) >= 50)
    assert cases == {True, False}


def test_masks_at_the_anchor_size_hide_exactly_the_ratio() -> None:
    masks = csr.draw_masks(0, ["aa", "bb"], 0, (8, 4), (8, 4), 0.75)
    assert masks.visible.shape == (2, 8)
    for visible, scored in zip(masks.visible, masks.scored, strict=True):
        assert np.array_equal(np.flatnonzero(scored == 0), visible)


def test_masks_depend_on_key_and_step_and_not_on_the_batch() -> None:
    def of(keys: list[str], step: int, row: int) -> list[int]:
        return csr.draw_masks(1, keys, step, (8, 4), (10, 5), 0.75).visible[row].tolist()

    assert of(["aa", "bb"], 4, 1) == of(["bb"], 4, 0)
    assert of(["aa"], 4, 0) != of(["aa"], 5, 0)
    assert of(["aa"], 4, 0) != of(["bb"], 4, 0)


def test_nearest_cells_are_those_of_torch() -> None:
    plane = torch.arange(32.0).view(1, 1, 8, 4)
    expected = F.interpolate(plane, size=(10, 5), mode="nearest").flatten().long()
    assert csr._nearest_cells((8, 4), (10, 5)).tolist() == expected.tolist()


def test_search_restated(rng: np.random.Generator) -> None:
    search, side = shaken(css.SearchDecoder(10, 16)), 3
    w = numbers(search)
    query, patches = rng.normal(size=(2, 5, 10)), rng.normal(size=(2, side * side, 10))
    mask = (rng.random((2, side * side)) > 0.5).astype(float)
    expected, losses = np.zeros((2, side * side)), np.zeros(2)
    for b in range(2):
        x = linear(w, "embed_query", query[b])
        for block in range(2):
            x = vit_block(w, f"blocks.{block}", x, heads=4)
        context = layer_norm(w, "scene_norm", linear(w, "embed_scene", patches[b]))
        cls = x[:1]
        q = linear(w, "cross.attention.q", layer_norm(w, "cross.norm1", cls))
        k, v = np.split(linear(w, "cross.attention.kv", context), 2, axis=1)
        cls = cls + linear(w, "cross.attention.proj", heads_attend(q, k, v, 4))
        hidden = gelu(linear(w, "cross.mlp.0", layer_norm(w, "cross.norm2", cls)))
        cls = cls + linear(w, "cross.mlp.2", hidden)
        kernel = linear(w, "kernel", layer_norm(w, "kernel_norm", cls))[0]
        features = convolve(w, patches[b].reshape(side, side, 10))
        for p in range(side * side):
            expected[b, p] = kernel @ features[p // side, p % side]
        chance = 1 / (1 + np.exp(-expected[b]))
        losses[b] = -(mask[b] * np.log(chance) + (1 - mask[b]) * np.log(1 - chance)).mean()
    logits = search(torch.tensor(query), search.look(torch.tensor(patches))).detach()
    assert np.allclose(logits, expected, atol=1e-6)
    assert np.allclose(css.search_loss(logits, torch.tensor(mask)), losses, rtol=1e-4)


def convolve(w: dict[str, Array], plane: Array) -> Array:
    """1 x 1, then three times 3 x 3 with zeros around, GELU after each: [s, s, W]."""
    for layer in (0, 2, 4, 6):
        kernel, bias = w[f"convolutions.{layer}.weight"], w[f"convolutions.{layer}.bias"]
        reach = kernel.shape[2] // 2
        padded = np.pad(plane, ((reach, reach), (reach, reach), (0, 0)))
        result = np.zeros((*plane.shape[:2], len(kernel)))
        for row in range(plane.shape[0]):
            for column in range(plane.shape[1]):
                window = padded[row : row + 2 * reach + 1, column : column + 2 * reach + 1]
                result[row, column] = np.einsum("hwi,oihw->o", window, kernel) + bias
        plane = gelu(result)
    return plane
