"""Students of every family: shapes, gradients, positions, masks, taps and dropped paths.

Legend: B images, H x W pixels, N tokens, D width, h heads, c channels of a head.
"""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dpal.base.errors import ConfigError
from dpal.base.students import Student as StudentSpec
from dpal.model.student import FrozenStudent, build_student
from dpal.model.students.drop_path import DropPath
from dpal.model.students.pyramid import PyramidStudent
from dpal.model.students.vit import SHAPES, Shape, VitStudent
from dpal.pixels import normalise

FAMILIES = {
    "vit_tiny": 192,
    "swin_tiny": 768,
    "mobilenetv4_conv_small": 960,
    "efficientvit_b0": 128,
    "tiny_vit_5m_224": 320,
}
# Base views, crops and composites of the two sizes that recipes use.
SIZES = ((256, 128), (128, 64), (128, 96), (64, 48), (256, 256), (128, 128))


def _spec(name: str = "vit_tiny", **keys: object) -> StudentSpec:
    return StudentSpec(name=name, height=128, width=64, **keys)


@pytest.fixture
def small_vit(monkeypatch: pytest.MonkeyPatch) -> None:
    """ViT-Ti of two blocks and width 48, so that tests are about rules and not about size."""
    monkeypatch.setitem(SHAPES, "vit_tiny", Shape(48, 3, paper_heads=6, timm_heads=3))


def _vit(masked: bool = False, **keys: object) -> VitStudent:
    student = build_student(_spec(**keys), seed=1, masked=masked)
    assert isinstance(student, VitStudent)
    return student.eval()


def _pixels(count: int = 2, height: int = 128, width: int = 64) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def _bicubic(new: int, old: int) -> np.ndarray:
    """Matrix [new, old] of cubic convolution (a = -0.75), cells aligned, edges repeated."""
    matrix = np.zeros((new, old))
    for row in range(new):
        place = (row + 0.5) * old / new - 0.5
        first = int(np.floor(place))
        for tap in range(first - 1, first + 3):
            x = abs(place - tap)
            if x <= 1:
                weight = 1.25 * x**3 - 2.25 * x**2 + 1
            else:
                weight = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[row, min(max(tap, 0), old - 1)] += weight
    return matrix


@pytest.mark.parametrize(("name", "width"), FAMILIES.items())
def test_every_family_answers_on_the_stride_16_grid_at_every_size(name: str, width: int):
    student = build_student(_spec(name), seed=0).eval()
    assert student.embed_dim == width
    assert student.input_size == (128, 64)
    for height, wide in SIZES:
        with torch.no_grad():
            tokens = student(_pixels(2, height, wide))
        rows, columns = student.grid_of(height, wide)
        assert tokens.cls.shape == (2, width)
        assert tokens.patches.shape == (2, rows * columns, width)
        assert (rows, columns) == (height // 16, wide // 16)
        assert torch.isfinite(tokens.patches).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_reaches_every_trained_parameter(name: str):
    student = build_student(_spec(name), seed=0).train()
    with torch.no_grad():  # timm starts the last norm of a residual branch at 0, which blocks it
        for parameter in student.parameters():
            if parameter.ndim == 1 and not parameter.any():
                parameter.fill_(0.1)
    tokens = student(_pixels(3))
    weights = torch.randn(tokens.patches.shape, generator=torch.Generator().manual_seed(2))
    ((tokens.patches * weights).sum() + (tokens.cls * weights[:, 0]).sum()).backward()
    dead = [
        key
        for key, parameter in student.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert dead == []


@pytest.mark.parametrize("name", ["mobilenetv4_conv_small", "vit_tiny"])
def test_same_seed_gives_the_same_student(name: str):
    first, second, other = (build_student(_spec(name), seed=seed) for seed in (4, 4, 5))
    pairs = zip(first.state_dict().items(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for (_, a), b in pairs)
    assert any(
        not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True)
    )


def test_last_map_is_up_sampled_by_two_and_averaged_as_it_was():
    student = build_student(_spec("efficientvit_b0"), seed=0).eval()
    assert isinstance(student, PyramidStudent)
    for height, width in ((128, 64), (64, 48)):
        with torch.no_grad():
            tokens, last = (
                student(_pixels(2, height, width)),
                student.map_of(_pixels(2, height, width)),
            )
        low = last.double().numpy()  # [B, D, h, w]
        rows, columns = low.shape[2:]
        wide = _bicubic(2 * rows, rows) @ low @ _bicubic(2 * columns, columns).T
        wide = wide[:, :, : height // 16, : width // 16]
        expected = wide.reshape(*wide.shape[:2], -1).transpose(0, 2, 1)
        np.testing.assert_allclose(tokens.patches.numpy(), expected, atol=1e-5)
        np.testing.assert_allclose(tokens.cls.numpy(), low.mean((2, 3)), atol=1e-5)


@pytest.mark.parametrize("positions", ["1d", "2d"])
def test_positions_are_resized_as_a_sequence_or_as_a_grid(small_vit: None, positions: str):
    student = _vit(positions=positions)
    stored = student.pos_embed.detach().double().numpy()[0]  # [1 + 32, D]
    for rows, columns in ((8, 8), (4, 3), (16, 8)):
        if positions == "1d":
            patches = _bicubic(rows * columns, 32) @ stored[1:]
        else:
            grid = stored[1:].reshape(8, 4, -1)
            grid = np.einsum("ra,cb,abd->rcd", _bicubic(rows, 8), _bicubic(columns, 4), grid)
            patches = grid.reshape(rows * columns, -1)
        found = student.resized_positions(rows, columns)[0].detach().numpy()
        np.testing.assert_allclose(found, np.concatenate([stored[:1], patches]), atol=1e-5)


def test_sincos_positions_are_fixed_and_encode_column_then_row(small_vit: None):
    student = _vit(position_embedding="sincos")
    assert "pos_embed" not in dict(student.named_parameters())
    found = student.state_dict()["pos_embed"][0].numpy()  # [1 + 32, 48]
    assert not found[0].any()
    for row, column in ((0, 0), (3, 1), (7, 3)):
        expected = []
        for place in (column, row):
            angles = [place / 10000 ** (i / 12) for i in range(12)]
            expected += [np.sin(angle) for angle in angles] + [np.cos(angle) for angle in angles]
        np.testing.assert_allclose(found[1 + row * 4 + column], expected, atol=1e-6)


def test_start_values_follow_the_named_rule(small_vit: None):
    reference, stock = _vit(), _vit(init="timm")
    bound = np.sqrt(6 / (48 + 4 * 48))
    assert 0.9 * bound < reference.blocks[0].mlp.fc1.weight.abs().max() <= bound
    assert reference.pos_embed.min() >= 0
    assert 0.018 < stock.blocks[0].mlp.fc1.weight.std() < 0.022
    assert 0.015 < stock.pos_embed.std() < 0.025


def test_layer_scale_starts_at_the_given_value_and_is_absent_without(small_vit: None):
    gammas = {k: v for k, v in _vit(layer_scale=0.5).state_dict().items() if "gamma" in k}
    assert sorted(gammas)[0] == "blocks.0.ls1.gamma"
    assert len(gammas) == 6
    assert all((gamma == 0.5).all() for gamma in gammas.values())
    assert not any("gamma" in key for key in _vit().state_dict())


def test_mask_replaces_patch_embeddings_and_nothing_else(small_vit: None):
    student = _vit(masked=True)
    nn.init.normal_(student.mask_token)
    pixels = _pixels()
    mask = torch.rand(2, 32, generator=torch.Generator().manual_seed(1)) < 0.5
    clean, masked = student.embed(pixels), student.embed(pixels, mask)
    assert torch.equal(masked[:, 0], clean[:, 0])
    assert torch.equal(masked[:, 1:][~mask], clean[:, 1:][~mask])
    expected = (student.mask_token + student.pos_embed[0, 1:]).expand(2, -1, -1)[mask]
    assert torch.allclose(masked[:, 1:][mask], expected)
    assert torch.equal(student(pixels, torch.zeros_like(mask)).patches, student(pixels).patches)
    hidden = mask.view(2, 1, 8, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    other = torch.where(hidden, torch.randn_like(pixels), pixels)
    assert torch.equal(student(other, mask).patches, student(pixels, mask).patches)
    student(pixels, mask).patches.square().sum().backward()
    assert student.mask_token.grad.any()


def test_mask_token_exists_only_when_asked_for_and_only_for_vits(small_vit: None):
    assert "mask_token" not in _vit().state_dict()
    assert "mask_token" in _vit(masked=True).state_dict()
    with pytest.raises(ConfigError, match="swin_tiny: masked inputs need a ViT"):
        build_student(_spec("swin_tiny"), masked=True)


def test_tap_gives_the_blocks_own_output(small_vit: None):
    student, pixels = _vit(), _pixels()
    last = student.features_at(pixels, 2)
    whole = student(pixels)
    assert torch.allclose(student.norm(last.patches), whole.patches, atol=1e-5)
    assert torch.allclose(student.norm(last.cls), whole.cls, atol=1e-5)
    seen = {}
    hook = student.blocks[1].register_forward_hook(lambda *call: seen.update(x=call[2]))
    student(pixels)
    hook.remove()
    assert torch.equal(student.features_at(pixels, 1).patches, seen["x"][:, 1:])


def test_patches_that_are_not_kept_have_no_influence(small_vit: None):
    student, pixels = _vit(), _pixels()
    keep = torch.tensor([[5, 0, 31], [7, 8, 9]])
    tokens = student.features_at(pixels, 1, keep=keep)
    assert tokens.patches.shape == (2, 3, 48)
    seen = torch.zeros(2, 32, dtype=torch.bool).scatter_(1, keep, True)
    area = seen.view(2, 1, 8, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    other = torch.where(area, pixels, torch.randn_like(pixels))
    assert torch.equal(student.features_at(other, 1, keep=keep).patches, tokens.patches)
    turned = student.features_at(pixels, 1, keep=keep.flip(1))
    assert torch.allclose(turned.patches.flip(1), tokens.patches, atol=1e-5)


@pytest.mark.parametrize("layer_scale", [0.0, 0.3])
def test_last_attention_is_that_of_the_last_block(small_vit: None, layer_scale: float):
    student, pixels = _vit(layer_scale=layer_scale), _pixels()
    with torch.no_grad():
        found = student.last_attention(pixels)
        before = student.features_at(pixels, 1)
        expected = student(pixels)
    assert torch.allclose(found.tokens.patches, expected.patches, atol=1e-5)
    assert torch.allclose(found.tokens.cls, expected.cls, atol=1e-5)
    x = torch.cat([before.cls[:, None], before.patches], dim=1).double().numpy()  # [B, 33, 48]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    weights = {k: v.double().numpy() for k, v in student.blocks[2].state_dict().items()}
    x = x * weights["norm1.weight"] + weights["norm1.bias"]
    qkv = x @ weights["attn.qkv.weight"].T + weights["attn.qkv.bias"]  # [B, 33, 144]
    for number, projection in enumerate((found.q, found.k, found.v)):
        assert projection.shape == (2, 12, 33, 4)
        for head in (0, 11):
            first = 48 * number + 4 * head
            np.testing.assert_allclose(
                projection[:, head].numpy(), qkv[:, :, first : first + 4], atol=1e-5
            )


def test_dropped_branch_is_zero_and_a_kept_one_is_scaled():
    place = DropPath(0.25).train()
    branch = torch.randn(4, 3, 5)
    place.draws = torch.tensor([0.0, 0.24, 0.25, 0.99])
    scale = np.array([0, 0, 4 / 3, 4 / 3]).reshape(4, 1, 1)
    np.testing.assert_allclose(place(branch).numpy(), branch.numpy() * scale, rtol=1e-6)
    assert torch.equal(place.eval()(branch), branch)
    place.train().draws = None
    torch.manual_seed(0)
    kept = place(torch.ones(4000, 1)) > 0
    assert 0.70 < kept.float().mean() < 0.80


def test_given_draws_decide_per_image_in_any_batch(small_vit: None):
    student = _vit(drop_path=0.5).train()
    assert student.num_drop_paths == 4  # two branches in every block but the last
    pixels = _pixels(3)
    draws = torch.rand(3, 4, generator=torch.Generator().manual_seed(3))
    draws[0] = 0
    with student.dropping(draws):
        together = student(pixels).patches
    with student.dropping(draws[[2]]):
        alone = student(pixels[[2]]).patches
    assert torch.allclose(together[2], alone[0], atol=1e-5)
    skipped = student.norm(student.blocks[2](student.embed(pixels)))[:, 1:]
    assert torch.allclose(together[0], skipped[0], atol=1e-5)
    assert not torch.allclose(together[1], skipped[1], atol=1e-3)
    with pytest.raises(ValueError, match=r"accepted is \[B, 4\]"), student.dropping(draws[:, :3]):
        pass
    assert all(m.draws is None for m in student.modules() if isinstance(m, DropPath))


def test_swin_drops_paths_by_default_rising_over_its_blocks():
    assert _spec("swin_tiny").drop_path == 0.1
    assert _spec("swin_tiny", drop_path=0.0).drop_path == 0.0
    student = build_student(_spec("swin_tiny"), seed=0)
    rates = [m.rate for m in student.modules() if isinstance(m, DropPath)]
    expected = np.repeat(np.linspace(0, 0.1, 12)[1:], 2)  # of the first block: nothing
    np.testing.assert_allclose(rates, expected, atol=1e-7)


def test_tiny_vit_drops_nothing_unless_told():
    assert build_student(_spec("tiny_vit_5m_224")).num_drop_paths == 0
    assert build_student(_spec("tiny_vit_5m_224", drop_path=0.1)).num_drop_paths > 0


@pytest.mark.parametrize("name", ["vit_tiny", "efficientvit_b0"])
def test_frozen_student_shrinks_large_views(name: str):
    student = build_student(_spec(name), seed=0)
    frozen = FrozenStudent(student, view_height=256)
    assert (frozen.width, frozen.stride) == (student.embed_dim, 32)
    view = torch.randint(0, 256, (2, 256, 128, 3), dtype=torch.uint8)
    with torch.no_grad():
        expected = student(normalise(view, 2))
    found = frozen(view)
    assert found.patches.shape[1] == (256 // 32) * (128 // 32)
    assert torch.equal(found.cls, expected.cls)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"name": "swin_tiny", "heads": "timm"}, "student.heads=timm has no effect with student."),
        ({"name": "resnet18", "positions": "2d"}, "student.positions=2d has no effect"),
        ({"name": "swin_small", "layer_scale": 1.0}, "student.layer_scale=1.0 has no effect"),
        ({"name": "resnet18", "init": "timm"}, "student.init=timm has no effect"),
        ({"heads": "timm", "last_heads": 16}, "no effect with student.heads=timm"),
        ({"last_heads": 7}, "accepted are divisors of the width 192 of vit_tiny"),
        ({"name": "vit_tinny"}, "accepted are vit_tiny, vit_small, vit_base, swin_tiny"),
        ({"name": "swin_base_patch4_window7_224"}, "accepted are vit_tiny"),
    ],
)
def test_key_without_effect_or_wrong_name_is_refused(values: dict[str, object], sentence: str):
    with pytest.raises(ValidationError, match=sentence):
        StudentSpec.model_validate(values)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"name": "mobilenetv4_conv_smal"}, "nearest is 'mobilenetv4_conv_small'"),
        ({"name": "efficientvit_m1"}, "its last map has stride 64"),
        ({"name": "efficientvit_b0", "drop_path": 0.1}, "student.drop_path=0.1 has no effect"),
        ({"name": "mixer_s32_224"}, "cannot take crops of 64x48 pixels"),
    ],
)
def test_network_that_cannot_serve_is_refused(values: dict[str, object], sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        build_student(_spec(**values))
