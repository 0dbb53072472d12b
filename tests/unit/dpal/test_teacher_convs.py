"""timm's convolutional networks as teachers, restated in float64 NumPy, and by either runtime.

Legend: B images, C channels, h x w map.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dpal.base.errors import ConfigError
from dpal.base.teachers import TimmTeacher
from dpal.model.conv_teacher import ConvNetwork
from dpal.model.exported_network import ExportedNetwork, largest_error
from dpal.model.teacher import Teacher, build_teacher
from dpal.model.timm_import import timm

import teacher_files as files
import vit_in_numpy as reference

VIEW = (128, 64)
SQUARE = (128, 128)
State = dict[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def state_of(name: str, seed: int = 0) -> State:
    """Tensors of a network, drawn so that norms, statistics and layer scales all matter."""
    g = torch.Generator().manual_seed(seed)
    state = timm.create_model(name, num_classes=5).state_dict()
    for key, value in state.items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=g)
        if value.ndim > 1:
            state[key] = noise / math.sqrt(value[0].numel())
        elif key.endswith("running_var"):
            state[key] = 0.5 + noise.abs()
        else:
            state[key] = 0.2 * noise + (not key.endswith(("bias", "running_mean")))
    return state


def spec(name: str, path: Path, **changes) -> TimmTeacher:
    return files.spec("timm", path, **({"name": name, "input": VIEW} | changes))


def build(name: str, path: Path, **changes) -> Teacher:
    return build_teacher(spec(name, path, **changes), stride=16, view_size=VIEW)


def views(size: tuple[int, int] = VIEW, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8, generator=generator)


def planes_of(pixels: Tensor) -> np.ndarray:
    mean, std = (np.array(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (pixels.permute(0, 3, 1, 2).double().numpy() / 255 - mean) / std


def windows(x: np.ndarray, size: int, stride: int, pad: int, fill: float = 0) -> np.ndarray:
    """What a kernel sees [B, C, h, w, size, size] of [B, C, H, W]."""
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)), constant_values=fill)
    seen = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(2, 3))
    return seen[:, :, ::stride, ::stride]


def conv(x: np.ndarray, s: dict, name: str, stride: int = 1, pad: int | None = None) -> np.ndarray:
    weight = s[f"{name}.weight"]
    size = weight.shape[2]
    seen = windows(x, size, stride, size // 2 if pad is None else pad)
    if weight.shape[1] == 1 and x.shape[1] > 1:  # depthwise
        out = np.einsum("bchwij,cij->bchw", seen, weight[:, 0], optimize=True)
    else:
        out = np.einsum("bchwij,dcij->bdhw", seen, weight, optimize=True)
    bias = s.get(f"{name}.bias")
    return out if bias is None else out + bias[:, None, None]


def batch_norm(x: np.ndarray, s: dict, name: str) -> np.ndarray:
    scale = s[f"{name}.weight"] / np.sqrt(s[f"{name}.running_var"] + 1e-5)
    shift = s[f"{name}.bias"] - s[f"{name}.running_mean"] * scale
    return x * scale[:, None, None] + shift[:, None, None]


def channel_norm(x: np.ndarray, s: dict, name: str) -> np.ndarray:
    """Layer norm over the channels of a map."""
    return reference.norm(x.transpose(0, 2, 3, 1), s, name, 1e-5).transpose(0, 3, 1, 2)


def resnet(x: np.ndarray, s: dict, stages: int) -> tuple[np.ndarray, np.ndarray]:
    """timm's `test_resnet`: deep stem, average pooling before shortcuts, one bottleneck."""
    for i, stride in ((0, 2), (3, 1)):
        x = np.maximum(batch_norm(conv(x, s, f"conv1.{i}", stride), s, f"conv1.{i + 1}"), 0)
    x = np.maximum(batch_norm(conv(x, s, "conv1.6"), s, "bn1"), 0)
    x = windows(x, 3, 2, 1, -np.inf).max((4, 5))
    for k in range(1, stages + 1):
        name, stride = f"layer{k}.0", 1 if k == 1 else 2
        last = 3 if f"{name}.conv3.weight" in s else 2
        y = x
        for i in range(1, last + 1):
            strided = i == last - 1  # the first 3 x 3 of either kind of block
            y = batch_norm(
                conv(y, s, f"{name}.conv{i}", stride if strided else 1), s, f"{name}.bn{i}"
            )
            y = np.maximum(y, 0) if i < last else y
        if f"{name}.downsample.1.weight" in s:
            x = windows(x, 2, 2, 0).mean((4, 5))
            x = batch_norm(conv(x, s, f"{name}.downsample.1"), s, f"{name}.downsample.2")
        x = np.maximum(x + y, 0)
    return x.mean((2, 3)), x


def convnext(x: np.ndarray, s: dict, stages: int) -> tuple[np.ndarray, np.ndarray]:
    """timm's `test_convnext`: GELU by its tanh approximation, a norm behind the pooling."""
    x = channel_norm(conv(x, s, "stem.0", 4, 0), s, "stem.1")
    for k in range(stages):
        if k:
            name = f"stages.{k}.downsample"
            x = conv(channel_norm(x, s, f"{name}.0"), s, f"{name}.1", 2, 0)
        for i in range((1, 2, 4, 2)[k]):
            name = f"stages.{k}.blocks.{i}"
            y = channel_norm(conv(x, s, f"{name}.conv_dw"), s, f"{name}.norm")
            y = reference.linear(y.transpose(0, 2, 3, 1), s, f"{name}.mlp.fc1")
            y = 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
            y = reference.linear(y, s, f"{name}.mlp.fc2") * s[f"{name}.gamma"]
            x = x + y.transpose(0, 3, 1, 2)
    pooled = x.mean((2, 3))
    return (reference.norm(pooled, s, "head.norm", 1e-5) if stages == 4 else pooled), x


def enlarged(x: np.ndarray, factor: int) -> np.ndarray:
    """A map at `factor` times its resolution, bilinear, cell centres at halves."""
    for axis in (2, 3):
        count = x.shape[axis]
        at = np.clip((np.arange(factor * count) + 0.5) / factor - 0.5, 0, count - 1)
        low = np.floor(at).astype(int)
        share = (at - low).reshape([-1 if i == axis else 1 for i in range(4)])
        high = np.take(x, np.minimum(low + 1, count - 1), axis)
        x = np.take(x, low, axis) * (1 - share) + high * share
    return x


@pytest.mark.parametrize(
    ("name", "restated"), [("test_resnet", resnet), ("test_convnext", convnext)]
)
@pytest.mark.parametrize(("tap", "stages"), [("norm", 4), ("stage2", 3)])
def test_a_network_is_its_restatement_on_the_students_grid(
    tmp_path: Path, name: str, restated: Callable, tap: str, stages: int
) -> None:
    state = state_of(name)
    numbers = {key: value.double().numpy() for key, value in state.items()}
    teacher = build(name, files.save(state, tmp_path), tap=tap)
    for size in (VIEW, SQUARE):
        cls, dense = restated(planes_of(views(size)), numbers, stages)
        if stages == 4:
            dense = enlarged(dense, 2)  # stride 32 to the student's 16
        found = teacher(views(size))
        wanted = dense.reshape(2, dense.shape[1], -1).transpose(0, 2, 1)
        for one, two in ((found.patches, wanted), (found.cls, cls)):
            assert one.shape == two.shape
            assert float(np.abs(one.numpy() - two).max()) < 1e-4 * np.abs(two).max()


def test_the_pooled_vector_of_convnext_is_normed_and_its_map_is_not(tmp_path: Path) -> None:
    """Guards the restatement: a mean without the norm would be another vector."""
    teacher = build("test_convnext", files.save(state_of("test_convnext"), tmp_path))
    cls, dense = teacher.network(torch.from_numpy(planes_of(views())).float())
    assert (cls - dense.mean((2, 3))).abs().max() > 0.1


@pytest.mark.parametrize(
    "name", ["test_efficientnet", "test_nfnet", "test_byobnet", "test_mambaout"]
)
def test_other_families_give_what_they_pool(tmp_path: Path, name: str) -> None:
    state = state_of(name)
    model = timm.create_model(name, num_classes=0).eval()
    model.load_state_dict({k: v for k, v in state.items() if k in model.state_dict()})
    network = build(name, files.save(state, tmp_path)).network
    planes = torch.from_numpy(planes_of(views())).float()
    with torch.no_grad():
        whole = model.forward_features(planes)
        pooled = model.forward_head(whole, pre_logits=True)
        cls, dense = network(planes)
    if name == "test_mambaout":  # its channels come last, and its head is an MLP
        whole = whole.permute(0, 3, 1, 2)
        assert pooled.shape[1] != dense.shape[1]
        pooled = whole.mean((2, 3))
    assert network.width == dense.shape[1]
    torch.testing.assert_close(dense, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cls, pooled, rtol=1e-4, atol=1e-4)


def test_where_the_head_changes_the_space_the_global_vector_is_the_mean_of_the_map() -> None:
    model = timm.create_model("mobilenetv3_small_050", num_classes=0)
    network = ConvNetwork(model, "norm", torch.float32, "mobilenetv3_small_050")
    planes = torch.from_numpy(planes_of(views())).float()
    with torch.no_grad():
        cls, dense = network(planes)
        assert model.forward_head(dense, pre_logits=True).shape[1] != network.width
    torch.testing.assert_close(cls, dense.mean((2, 3)))


def test_a_tap_and_a_network_of_no_use_are_refused_by_name(tmp_path: Path) -> None:
    state = state_of("test_resnet")
    path = files.save(state, tmp_path)
    for tap in ("stage4", "block2"):
        with pytest.raises(ConfigError, match=r"'norm', 'stage0', 'stage1', 'stage2', 'stage3'"):
            build("test_resnet", path, tap=tap)
    for name in ("test_vit_relpos", "test_coatnet"):
        with pytest.raises(ConfigError, match=f"'{name}' takes one input size only"):
            build(name, files.save(state_of(name), tmp_path, f"{name}.pth"))
    with pytest.raises(ConfigError, match="multiples of 32"):
        build("test_resnet", path, input=(144, 64))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("missing", "missing layer3.0.conv2.weight"),
        ("extra", "unexpected layer3.0.conv2.weight_more"),
        ("shape", r"layer3.0.conv2.weight is \[5, 6\], not \[48, 48, 3, 3\]"),
    ],
)
def test_every_fault_of_a_file_is_named(tmp_path: Path, fault: str, words: str) -> None:
    state, name = state_of("test_resnet"), "layer3.0.conv2.weight"
    if fault == "missing":
        del state[name]
    elif fault == "extra":
        state[f"{name}_more"] = torch.zeros(1)
    else:
        state[name] = torch.zeros(5, 6)
    with pytest.raises(ConfigError, match=words):
        build("test_resnet", files.save(state, tmp_path))


def test_a_convnext_without_its_final_norm_is_refused(tmp_path: Path) -> None:
    state = state_of("test_convnext")
    del state["head.norm.weight"], state["head.norm.bias"]
    with pytest.raises(ConfigError, match=r"missing head\.norm\.bias, missing head\.norm\.weight"):
        build("test_convnext", files.save(state, tmp_path))


def test_counters_prefixes_and_the_classifier_change_nothing(tmp_path: Path) -> None:
    state = state_of("test_resnet")
    assert "fc.weight" in state
    bare = {
        f"module.{key}": value
        for key, value in state.items()
        if not key.startswith("fc.") and not key.endswith("num_batches_tracked")
    }
    whole, cut = (
        build("test_resnet", files.save(content, tmp_path, name))
        for content, name in ((state, "whole.pth"), ({"state_dict": bare}, "cut.pth"))
    )
    assert torch.equal(whole(views()).patches, cut(views()).patches)


def test_bf16_runs_in_bf16_and_is_another_identity(tmp_path: Path) -> None:
    path = files.save(state_of("test_convnext"), tmp_path)
    exact, coarse = (build("test_convnext", path, precision=p) for p in ("fp32", "bf16"))
    one, two = exact(views()), coarse(views())
    assert two.cls.dtype == two.patches.dtype == torch.float32
    for a, b in zip(one, two, strict=True):
        assert 1e-4 < float((a - b).abs().max() / a.abs().max()) < 0.1
    assert exact.identity != coarse.identity


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
@pytest.mark.parametrize("tap", ["norm", "stage2"])
def test_onnx_runtime_says_what_pytorch_says(tmp_path: Path, name: str, tap: str) -> None:
    path = files.save(state_of(name), tmp_path)
    plain = build(name, path, tap=tap)
    other = build(name, path, tap=tap, runtime="onnxruntime")
    assert isinstance(other.network, ExportedNetwork)
    for size, count in ((VIEW, 3), (SQUARE, 1)):
        for one, two in zip(other(views(size, count)), plain(views(size, count)), strict=True):
            assert largest_error(one, two) < 1e-4
    runtime = other.identity.pop("runtime")
    assert runtime.startswith("onnxruntime ")
    assert other.identity == plain.identity


def test_onnx_runtime_is_for_convolutional_networks_in_fp32(tmp_path: Path) -> None:
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    path = files.save(state, tmp_path)
    with pytest.raises(ConfigError, match="accepted are convolutional networks"):
        build("test_vit", path, runtime="onnxruntime")
    with pytest.raises(ValueError, match=r"teacher\.precision='bf16'"):
        spec("test_resnet", path, runtime="onnxruntime", precision="bf16")
