"""SOLIDER, MobileSAM and timm's Swins: strict loading, and maps restated independently."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from dpal.base.errors import ConfigError
from dpal.model.relation_target import attention_projection
from dpal.model.swin_teacher import SwinNetwork
from dpal.model.teacher import build_teacher, teacher_identity
from dpal.model.timm_import import timm

import teacher_files as files
import vit_in_numpy as reference

VIEW = files.VIEW
ROOT = Path(__file__).parents[3]


def build(kind: str, path: Path, view: tuple[int, int] = VIEW, **changes):
    return build_teacher(files.spec(kind, path, input=view, **changes), stride=16, view_size=view)


def views(size: tuple[int, int] = VIEW, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8, generator=generator)


def planes_of(pixels: Tensor) -> Tensor:
    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(3, 1, 1)
        for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    return (pixels.permute(0, 3, 1, 2).double() / 255 - mean) / std


def on_grid(dense: np.ndarray, size: tuple[int, int]) -> Tensor:
    """A map [B, C, h, w] on the student's grid, as tokens."""
    grid = (size[0] // 16, size[1] // 16)
    found = torch.from_numpy(np.ascontiguousarray(dense)).float()
    if found.shape[2:] != grid:
        whole = all(have % want == 0 for have, want in zip(found.shape[2:], grid, strict=True))
        found = (
            F.adaptive_avg_pool2d(found, grid)
            if whole
            else F.interpolate(found, grid, mode="bilinear", antialias=True)
        )
    return found.flatten(2).mT


def solider_block(x: np.ndarray, s: dict, name: str, shift: int) -> np.ndarray:
    """One block on [h, w, C], token by token: who sees whom is decided by coordinates."""
    height, width, size = x.shape
    rows, columns = -(-height // 7) * 7, -(-width // 7) * 7
    normed = np.zeros((rows, columns, size))  # padding is behind the norm: zeros
    normed[:height, :width] = reference.norm(x, s, f"{name}.norm1", 1e-5)
    heads = s[f"{name}.attn.w_msa.relative_position_bias_table"].shape[1]
    q, k, v = (
        part.reshape(rows, columns, heads, -1)
        for part in np.split(reference.linear(normed, s, f"{name}.attn.w_msa.qkv"), 3, axis=-1)
    )
    table = s[f"{name}.attn.w_msa.relative_position_bias_table"].reshape(13, 13, heads)
    out = np.zeros_like(normed)
    for y in range(height):
        for z in range(width):
            # place after the cyclic shift; the window holds 7 x 7 such places
            py, pz = (y - shift) % rows, (z - shift) % columns
            logits, values = [], []
            for ny in range(py // 7 * 7, py // 7 * 7 + 7):
                for nz in range(pz // 7 * 7, pz // 7 * 7 + 7):
                    oy, oz = (ny + shift) % rows, (nz + shift) % columns
                    # neighbours only because the map was rolled around do not see each other
                    apart = (oy < shift) != (y < shift) and ny // 7 == rows // 7 - 1
                    apart |= (oz < shift) != (z < shift) and nz // 7 == columns // 7 - 1
                    score = (q[y, z] * k[oy, oz]).sum(-1) / np.sqrt(q.shape[-1])
                    logits.append(score + table[py - ny + 6, pz - nz + 6] - 100.0 * apart)
                    values.append(v[oy, oz])
            weights = reference.softmax(np.stack(logits, -1))  # [heads, 49]
            out[y, z] = np.einsum("hn,nhd->hd", weights, np.stack(values)).reshape(-1)
    x = x + reference.linear(out[:height, :width], s, f"{name}.attn.w_msa.proj")
    hidden = reference.linear(
        reference.norm(x, s, f"{name}.norm2", 1e-5), s, f"{name}.ffn.layers.0.0"
    )
    return x + reference.linear(reference.gelu(hidden), s, f"{name}.ffn.layers.1")


def solider(planes: np.ndarray, s: dict, stage: int, weight: float) -> np.ndarray:
    """SOLIDER's Swin on one image [3, H, W]: the normed map [C, h, w] of `stage`."""
    rows, columns = planes.shape[1] // 4, planes.shape[2] // 4
    x = reference.patches(
        planes[None], s["patch_embed.projection.weight"], s["patch_embed.projection.bias"], 0
    )
    x = reference.norm(x.reshape(rows, columns, -1), s, "patch_embed.norm", 1e-5)
    for i in range(stage + 1):
        for j in range(2):
            x = solider_block(x, s, f"stages.{i}.blocks.{j}", 3 * j)
        if i < stage:
            tall, wide, size = -(-x.shape[0] // 2), -(-x.shape[1] // 2), x.shape[2]
            merged = np.zeros((tall, wide, 4 * size))
            for y in range(x.shape[0]):
                for z in range(x.shape[1]):
                    merged[y // 2, z // 2, 2 * (y % 2) + z % 2 :: 4] = x[y, z]
            merged = reference.norm(merged, s, f"stages.{i}.downsample.norm", 1e-5)
            x = merged @ s[f"stages.{i}.downsample.reduction.weight"].T
            steering = np.array([weight, 1 - weight])
            scale = np.log1p(np.exp(reference.linear(steering, s, f"semantic_embed_w.{i}")))
            x = x * scale + reference.linear(steering, s, f"semantic_embed_b.{i}")
    return reference.norm(x, s, f"norm{stage}", 1e-5).transpose(2, 0, 1)


@pytest.mark.parametrize(("tap", "stage", "weight"), [("norm", 3, 0.2), ("stage2", 2, 1.0)])
def test_solider_is_its_restatement_token_by_token(tmp_path, tap, stage, weight) -> None:
    numbers = {k: v.double().numpy() for k, v in files.solider_state().items()}
    path = files.save(files.solider_file(), tmp_path)
    teacher = build("solider", path, tap=tap, semantic_weight=weight)
    for size in (VIEW, (64, 64)):
        pixels = views(size, 1)
        dense = solider(planes_of(pixels)[0].numpy(), numbers, stage, weight)[None]
        found = teacher(pixels)
        torch.testing.assert_close(found.patches, on_grid(dense, size), rtol=1e-3, atol=1e-3)
        wanted = torch.from_numpy(dense.mean((2, 3))).float()
        torch.testing.assert_close(found.cls, wanted, rtol=1e-3, atol=1e-3)


def test_the_semantic_weight_changes_tokens_and_identity(tmp_path) -> None:
    path = files.save(files.solider_file(), tmp_path)
    low, high = (build("solider", path, semantic_weight=w) for w in (0.0, 1.0))
    assert (low(views()).patches - high(views()).patches).abs().max() > 1e-2
    assert low.identity != high.identity
    assert high.identity["semantic_weight"] == 1.0


def test_a_batch_of_windows_keeps_images_apart(tmp_path) -> None:
    teacher = build("solider", files.save(files.solider_file(), tmp_path))
    together = teacher(views(count=3))
    alone = torch.cat([teacher(view).patches for view in views(count=3).split(1)])
    torch.testing.assert_close(together.patches, alone, rtol=1e-4, atol=1e-4)


def mobilesam(x: Tensor, s: dict[str, Tensor]) -> Tensor:
    """MobileSAM's encoder, function by function, in the file's own names."""

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = s[f"{name}.c.weight"]
        groups = x.shape[1] if weight.shape[1] == 1 and x.shape[1] > 1 else 1
        x = F.conv2d(x, weight, None, stride, weight.shape[2] // 2, 1, groups)
        bn = [s[f"{name}.bn.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *bn, eps=1e-5)

    def affine(x: Tensor, name: str) -> Tensor:
        return F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"])

    def window(x: Tensor, name: str) -> Tensor:
        """Attention inside one window [B, size, size, C]."""
        size, width = x.shape[1], x.shape[3]
        table = s[f"{name}.attention_biases"]
        heads, count = len(table), size * size
        seen: dict[tuple[int, int], int] = {}
        places = [(i, j) for i in range(size) for j in range(size)]
        index = [
            seen.setdefault((abs(a[0] - b[0]), abs(a[1] - b[1])), len(seen))
            for a in places
            for b in places
        ]
        mixed = affine(norm(x.flatten(1, 2), f"{name}.norm"), f"{name}.qkv")
        q, k, v = mixed.view(len(x), count, heads, 3, -1).permute(3, 0, 2, 1, 4)
        logits = q @ k.mT / (width // heads) ** 0.5 + table[:, index].view(heads, count, count)
        out = (logits.softmax(-1) @ v).transpose(1, 2).reshape(len(x), count, width)
        return affine(out, f"{name}.proj").unflatten(1, (size, size))

    x = conv(F.gelu(conv(x, "patch_embed.seq.0", 2)), "patch_embed.seq.2", 2)
    for i, (size, depth) in enumerate(((0, 1), (7, 1), (14, 2), (7, 1))):
        for j in range(depth):
            name = f"layers.{i}.blocks.{j}"
            if i == 0:
                y = F.gelu(conv(F.gelu(conv(x, f"{name}.conv1")), f"{name}.conv2"))
                x = F.gelu(x + conv(y, f"{name}.conv3"))
                continue
            height, width = x.shape[2:]
            padded = F.pad(x, (0, -width % size, 0, -height % size)).permute(0, 2, 3, 1)
            out = torch.zeros_like(padded)
            for top in range(0, padded.shape[1], size):
                for left in range(0, padded.shape[2], size):
                    area = (slice(None), slice(top, top + size), slice(left, left + size))
                    out[area] = window(padded[area], f"{name}.attn")
            x = x + out[:, :height, :width].permute(0, 3, 1, 2)
            x = conv(x, f"{name}.local_conv").permute(0, 2, 3, 1)
            y = F.gelu(affine(norm(x, f"{name}.mlp.norm"), f"{name}.mlp.fc1"))
            x = (x + affine(y, f"{name}.mlp.fc2")).permute(0, 3, 1, 2)
        if i < 3:
            name = f"layers.{i}.downsample"
            x = F.gelu(conv(x, f"{name}.conv1"))
            x = conv(F.gelu(conv(x, f"{name}.conv2", 1 if i == 2 else 2)), f"{name}.conv3")

    def channels(x: Tensor, name: str) -> Tensor:
        mean, var = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        x = (x - mean) / (var + 1e-6).sqrt()
        return x * s[f"{name}.weight"][:, None, None] + s[f"{name}.bias"][:, None, None]

    x = channels(F.conv2d(x, s["neck.0.weight"]), "neck.1")
    return channels(F.conv2d(x, s["neck.2.weight"], padding=1), "neck.3")


def test_mobilesam_is_its_restatement_in_the_files_names(tmp_path) -> None:
    content = files.mobilesam_file()
    state = {k.removeprefix("image_encoder."): v.double() for k, v in content.items()}
    teacher = build("mobilesam", files.save(content, tmp_path))
    for size in (VIEW, (64, 64)):
        dense = mobilesam(planes_of(views(size)), state)
        assert dense.shape[2:] == (size[0] // 16, size[1] // 16)
        found = teacher(views(size))
        torch.testing.assert_close(found.patches, dense.flatten(2).mT.float(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.cls, dense.mean((2, 3)).float(), rtol=1e-3, atol=1e-3)


def test_a_larger_input_is_averaged_to_the_students_grid(tmp_path) -> None:
    content = files.mobilesam_file()
    teacher = build_teacher(
        files.spec("mobilesam", files.save(content, tmp_path), input=(128, 64)),
        stride=16,
        view_size=VIEW,
    )
    state = {k.removeprefix("image_encoder."): v.double() for k, v in content.items()}
    pixels = views().permute(0, 3, 1, 2).float()
    fed = F.interpolate(pixels, (128, 64), mode="bicubic", antialias=True).clamp(0, 255)
    dense = mobilesam(planes_of(fed.permute(0, 2, 3, 1)), state)  # 8 x 4
    pooled = dense.view(2, 24, 4, 2, 2, 2).mean((3, 5)).flatten(2).mT.float()
    torch.testing.assert_close(teacher(views()).patches, pooled, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "tail"),
    [
        ("solider", "stages.1.blocks.1.attn.w_msa.proj.weight"),
        ("mobilesam", "layers.0.downsample.conv2.bn.running_mean"),
    ],
)
@pytest.mark.parametrize("fault", ["missing", "extra", "shape"])
def test_every_fault_of_a_file_is_named(tmp_path, kind, tail, fault) -> None:
    content = files.solider_file() if kind == "solider" else files.mobilesam_file()
    state = content.get("teacher", content)
    (name,) = [key for key in state if key.endswith(tail)]
    if fault == "missing":
        del state[name]
        words = f"missing {tail}"
    elif fault == "extra":
        state[f"{name}_more"] = torch.zeros(1)
        words = f"unexpected {tail}_more"
    else:
        state[name] = torch.zeros(5, 6)
        words = rf"{tail} is \[5, 6\], not"
    with pytest.raises(ConfigError, match=words):
        build(kind, files.save(content, tmp_path))


def small_swin(**options):
    torch.manual_seed(0)
    return timm.models.swin_transformer.SwinTransformer(
        embed_dim=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), num_classes=0, **options
    ).eval()


def test_a_timm_swin_keeps_its_windows_at_any_size() -> None:
    model = small_swin(img_size=224, dynamic_img_size=True, always_partition=True)
    network = SwinNetwork(model, "norm", torch.float32)
    assert (network.width, network.multiple) == (128, 32)
    for size in ((128, 64), (128, 128)):
        other = small_swin(img_size=size, always_partition=True)
        other.load_state_dict(model.state_dict())
        planes = planes_of(views(size)).float()
        with torch.no_grad():
            wanted = other.forward_features(planes).permute(0, 3, 1, 2)
            cls, dense = network(planes)
        torch.testing.assert_close(dense, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(cls, wanted.mean((2, 3)), rtol=1e-4, atol=1e-4)


def test_a_stage_tap_is_that_stages_output() -> None:
    model = small_swin(img_size=224, dynamic_img_size=True, always_partition=True)
    planes = planes_of(views((128, 64))).float()
    network = SwinNetwork(model, "stage2", torch.float32)
    with torch.no_grad():
        x = model.patch_embed(planes)
        for layer in model.layers[:3]:
            x = layer(x)
        _, dense = network(planes)
    assert dense.shape == (2, 64, 8, 4)
    torch.testing.assert_close(dense, x.permute(0, 3, 1, 2))
    with pytest.raises(ConfigError, match="'norm' and 'stage0' to 'stage3'"):
        SwinNetwork(model, "block2", torch.float32)


def test_swin_and_dinov3_load_by_timm_name(tmp_path) -> None:
    for name, tap, width in (
        ("swin_tiny_patch4_window7_224", "stage2", 384),
        ("vit_small_patch16_dinov3", "norm", 384),
    ):
        model = timm.create_model(name, num_classes=0)
        path = tmp_path / f"{name}.safetensors"
        save_file(model.state_dict(), path)
        teacher = build("timm", path, name=name, tap=tap)
        for size, count in ((VIEW, 8), ((64, 64), 16)):
            assert teacher(views(size, 1)).patches.shape == (1, count, width)
        with torch.no_grad():
            if tap == "norm":
                wanted = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()
                wanted.load_state_dict(model.state_dict())
                tokens = wanted.forward_features(planes_of(views()).float())
                assert tokens.shape[1] == 1 + 4 + 8  # CLS and four registers
                torch.testing.assert_close(teacher(views()).patches, tokens[:, 5:])
                torch.testing.assert_close(teacher(views()).cls, tokens[:, 0])
        with pytest.raises(ConfigError, match="plain ViT"):
            attention_projection(
                files.spec("timm", path, name=name, tap=tap.replace("norm", "block3"))
            )
        path.unlink()


def test_the_real_mobilesam_and_vit_load() -> None:
    folder = ROOT.parent / "shared" / "weights"
    sam = folder / "mobile_sam.pt"
    vit = folder / "vit_small_patch14_saliency_timm_fp16.pth"
    if not (sam.is_file() and vit.is_file()):
        pytest.skip("no real weights in ../shared/weights")
    teacher = build("mobilesam", sam, (256, 128))
    found = teacher(views((256, 128), 1))
    assert found.patches.shape == (1, 128, 256)
    assert 0.1 < float(found.patches.std()) < 10
    name = "vit_small_patch14_dinov2"
    relations = files.spec("timm", vit, name=name, input=(252, 126), tap="block7")
    assert attention_projection(relations).heads == 6
    identity = teacher_identity(relations, view_size=(256, 128))
    assert list(identity) == [
        "definition", "kind", "input", "mean", "std", "name", "weights", "tap", "precision",
        "library",
    ]  # fmt: skip
