"""Frozen teachers: strict loading, taps, input sizes, grids, and files that are refused."""

import json
import pickle
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import nn

from dpal.base.errors import ConfigError, DataError, StorageError
from dpal.base.teachers import OnnxTeacher, TaughtTeacher, TimmTeacher
from dpal.model import timm_teacher
from dpal.model.teacher import build_teacher, teacher_identity
from dpal.model.timm_import import timm

VIEW = (128, 64)
NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=0).eval()


@pytest.fixture(scope="module")
def weights(vit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(vit.state_dict(), path)
    return path


def spec(weights: Path, **changes) -> TimmTeacher:
    values = {"kind": "timm", "name": NAME, "weights": str(weights), "input": VIEW}
    return TimmTeacher.model_validate(values | changes)


def build(teacher, **options):
    return build_teacher(teacher, **{"stride": 16, "view_size": VIEW} | options)


def views(count: int = 2, size: tuple[int, int] = VIEW) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8, generator=generator)


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def test_norm_tap_is_timms_own_output_with_positions_resized_on_the_grid(vit, weights) -> None:
    teacher = build(spec(weights))
    dynamic = timm.create_model(NAME, num_classes=0, dynamic_img_size=True).eval()
    dynamic.load_state_dict(vit.state_dict())
    for size, count in ((VIEW, 32), ((128, 128), 64)):
        with torch.no_grad():
            expected = dynamic.forward_features(normalised(views(size=size)))
        found = teacher(views(size=size))
        assert found.patches.shape == (2, count, 192)
        torch.testing.assert_close(found.cls, expected[:, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.patches, expected[:, 1:], rtol=1e-4, atol=1e-4)


def test_block_tap_is_the_output_of_that_block(vit, weights) -> None:
    kept = []
    hook = vit.blocks[3].register_forward_hook(lambda _m, _i, output: kept.append(output))
    square = views(size=(224, 224))
    with torch.no_grad():
        vit(normalised(square))
    hook.remove()
    teacher = build(spec(weights, tap="block3", input=(224, 224)), view_size=(224, 224))
    torch.testing.assert_close(teacher(square).patches, kept[0][:, 1:], rtol=1e-4, atol=1e-4)


def test_a_tap_behind_the_last_block_is_refused(weights) -> None:
    with pytest.raises(ConfigError, match="'block0' to 'block11'"):
        build(spec(weights, tap="block12"))


def test_registers_are_dropped_and_the_cls_token_is_first() -> None:
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=VIEW, embed_dim=32, depth=2, num_heads=2, reg_tokens=4, num_classes=0,
        dynamic_img_size=True,
    )  # fmt: skip
    network = timm_teacher.TimmNetwork(model, "norm", "fp32")
    with torch.no_grad():
        cls, dense = network(normalised(views()))
        raw = model.forward_features(normalised(views()))
    assert raw.shape[1] == 1 + 4 + 32
    assert torch.equal(cls, raw[:, 0])
    assert torch.equal(dense.flatten(2).transpose(1, 2), raw[:, 5:])


def test_a_vit_without_cls_token_gives_the_mean_of_its_patches() -> None:
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=VIEW, embed_dim=32, depth=1, num_heads=2, class_token=False, global_pool="avg",
        reg_tokens=2, num_classes=0, dynamic_img_size=True,
    )  # fmt: skip
    with torch.no_grad():
        cls, dense = timm_teacher.TimmNetwork(model, "norm", "fp32")(normalised(views()))
    torch.testing.assert_close(cls, dense.flatten(2).mean(2))


def test_batch_composition_does_not_change_a_bit(weights) -> None:
    teacher = build(spec(weights))
    together = teacher(views(7))
    apart = [teacher(part) for part in views(7).split(3)]
    assert torch.equal(together.patches, torch.cat([part.patches for part in apart]))
    assert torch.equal(together.cls, torch.cat([part.cls for part in apart]))


def test_another_input_size_keeps_the_students_grid_and_the_composite_square(weights) -> None:
    teacher = build(spec(weights, input=(256, 128)))
    assert teacher.input_size((128, 128)) == (256, 256)
    assert teacher(views()).patches.shape == (2, 32, 192)
    assert teacher(views(1, (128, 128))).patches.shape == (1, 64, 192)


def test_an_input_that_patches_do_not_tile_is_refused(weights) -> None:
    with pytest.raises(ConfigError, match=r"teacher.input=\[120, 60\].*multiples of 16"):
        build(spec(weights, input=(120, 60)))


def test_bf16_is_close_to_fp32(weights) -> None:
    exact, rounded = (build(spec(weights, precision=p))(views()) for p in ("fp32", "bf16"))
    error = (exact.patches - rounded.patches).norm() / exact.patches.norm()
    assert 0 < error < 0.03
    assert rounded.patches.dtype == torch.float32


def test_missing_unexpected_and_misshapen_keys_are_all_named(vit, tmp_path) -> None:
    state = dict(vit.state_dict())
    del state["blocks.3.attn.qkv.weight"]
    state["blocks.99.norm"] = torch.zeros(1)
    state["norm.bias"] = torch.zeros(7)
    path = tmp_path / "wrong.safetensors"
    save_file(state, path)
    with pytest.raises(ConfigError) as caught:
        build(spec(path))
    for word in ("missing blocks.3.attn.qkv.weight", "unexpected blocks.99.norm", "norm.bias is"):
        assert word in str(caught.value)


def test_a_classifier_may_be_left_out(vit, weights, tmp_path) -> None:
    path = tmp_path / "classified.pth"
    torch.save({"model": {**vit.state_dict(), "head.weight": torch.zeros(5, 192)}}, path)
    assert torch.equal(build(spec(path))(views()).patches, build(spec(weights))(views()).patches)


class Evil:
    def __reduce__(self):
        return print, ("ran",)


def test_pickled_code_is_refused_and_not_run(tmp_path, capsys) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"model": Evil()}, path)
    with pytest.raises(ConfigError, match="never run"):
        build(spec(path))
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ConfigError):
        build(spec(path))
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pth"])
def test_a_damaged_file_is_one_sentence(weights, tmp_path, name) -> None:
    path = tmp_path / name
    path.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ConfigError, match=r"cannot be read|never run|is no torch file"):
        build(spec(path))


def test_an_unknown_name_brings_the_nearest(weights) -> None:
    with pytest.raises(ConfigError, match="nearest is 'vit_tiny_patch16_224'"):
        build(spec(weights, name="vit_tinny_patch16_224"))


def test_a_hub_that_does_not_answer_is_one_sentence(monkeypatch, tmp_path) -> None:
    import huggingface_hub

    def unreachable(*_a, **_k):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(StorageError, match=r"could not be fetched.*no route"):
        build(spec("", name="vit_tiny_patch16_224.augreg_in21k"))


def test_identity_tells_weights_tap_and_precision_apart(weights, tmp_path) -> None:
    base = teacher_identity(spec(weights), view_size=VIEW)
    other = tmp_path / "other.safetensors"
    other.write_bytes(weights.read_bytes() + b"\0")
    changed = [spec(other), spec(weights, tap="block2"), spec(weights, precision="bf16")]
    changed.append(spec(weights, mean=(0.5, 0.5, 0.5)))
    assert all(teacher_identity(s, view_size=VIEW) != base for s in changed)
    assert build(spec(weights)).identity == base
    assert json.loads(json.dumps(base)) == base


def test_the_taught_teacher_is_built_from_its_files_metadata(tmp_path) -> None:
    arch = {"img_size": list(VIEW), "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 2}
    model = timm.models.vision_transformer.VisionTransformer(**arch, num_classes=0).eval()
    path = tmp_path / "teacher.safetensors"
    taught = TaughtTeacher(kind="taught")
    with pytest.raises(DataError, match="teach it first"):
        build(taught, taught_weights=path)
    save_file(model.state_dict(), path, metadata={"arch": json.dumps(arch)})
    with torch.no_grad():
        expected = model.forward_features(normalised(views()))
    found = build(taught, taught_weights=path)(views())
    torch.testing.assert_close(found.patches, expected[:, 1:], rtol=1e-4, atol=1e-4)


def onnx_net(path: Path, *, fixed_pool: bool) -> Path:
    """A tiny convolutional net as exporters write it: batch 1, 128 x 64, reshape to [1, -1]."""
    rng = np.random.default_rng(0)
    arrays = {
        "conv": rng.normal(size=(8, 3, 16, 16)).astype(np.float32) / 16,
        "pool": rng.normal(size=(8, 1, 8, 4)).astype(np.float32),
        "fc": rng.normal(size=(8, 8)).astype(np.float32),
        "shape": np.array([1, -1], dtype=np.int64),
    }
    pool = (
        helper.make_node("Conv", ["dense", "pool"], ["pooled"], group=8)
        if fixed_pool
        else helper.make_node("GlobalAveragePool", ["dense"], ["pooled"])
    )
    nodes = [
        helper.make_node("Conv", ["image", "conv"], ["dense"], strides=[16, 16]),
        pool,
        helper.make_node("Reshape", ["pooled", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "fc"], ["global"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "net",
        [value("image", TensorProto.FLOAT, [1, 3, *VIEW])],
        [
            value("global", TensorProto.FLOAT, [1, 8]),
            value("dense", TensorProto.FLOAT, [1, 8, 8, 4]),
        ],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


def onnx_spec(path: Path, **changes) -> OnnxTeacher:
    names = {"global_output": "global", "dense_output": "dense"}
    return OnnxTeacher.model_validate(
        {"kind": "onnx", "weights": str(path), "input": VIEW} | names | changes
    )


@pytest.mark.parametrize("fixed_pool", [True, False])
def test_an_onnx_file_of_batch_one_runs_batches_and_composites(tmp_path, fixed_pool) -> None:
    teacher = build(onnx_spec(onnx_net(tmp_path / "net.onnx", fixed_pool=fixed_pool)))
    for size, count in ((VIEW, 32), ((128, 128), 64)):
        together = teacher(views(3, size))
        alone = [teacher(view) for view in views(3, size).split(1)]
        assert together.patches.shape == (3, count, 8)
        torch.testing.assert_close(together.cls, torch.cat([t.cls for t in alone]))
        torch.testing.assert_close(together.patches, torch.cat([t.patches for t in alone]))
    assert (together.cls[0] - together.cls[1]).abs().max() > 0


def test_the_onnx_map_of_a_composite_is_the_networks_own(tmp_path) -> None:
    path = onnx_net(tmp_path / "net.onnx", fixed_pool=True)
    kernel = numpy_helper.to_array(onnx.load(path).graph.initializer[0])
    planes = normalised(views(2, (128, 128)))
    expected = nn.functional.conv2d(planes, torch.from_numpy(kernel.copy()), stride=16)
    found = build(onnx_spec(path))(views(2, (128, 128))).patches
    torch.testing.assert_close(found, expected.flatten(2).mT, rtol=1e-4, atol=1e-4)


def test_wrong_output_names_list_the_right_ones(tmp_path) -> None:
    path = onnx_net(tmp_path / "net.onnx", fixed_pool=False)
    with pytest.raises(ConfigError, match=r"dense_output='map'.*\['global', 'dense'\]"):
        build(onnx_spec(path, dense_output="map"))
    path.write_bytes(b"not a network")
    with pytest.raises(ConfigError, match="not an ONNX file"):
        build(onnx_spec(path))
