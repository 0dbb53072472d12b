import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dpal import export
from dpal.base.errors import DataError
from dpal.base.students import Student as StudentSpec
from dpal.model.student import Student, build_student
from dpal.pixels import normalise

USER_SCRIPT = """
import sys
{shim}
sys.path.insert(0, {folder!r})
from load import load
import torch
from PIL import Image
model, transform = load()
assert "dpal" not in sys.modules or {shim!r}, "the loader needs more than timm"
with torch.no_grad():
    tokens = model.forward_features(transform(Image.open({image!r}))[None])
torch.save(tokens, {out!r})
"""


def _student(heads: str = "paper") -> Student:
    spec = StudentSpec(name="vit_tiny", height=128, width=64, heads=heads)
    return build_student(spec, seed=3)


@pytest.fixture(scope="module")
def views() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 128, 64, 3), dtype=np.uint8)


def _of(name: str) -> Student:
    """A student whose batch norms have seen something, so that its statistics matter too."""
    spec = StudentSpec(name=name, height=128, width=64)
    student = build_student(spec, seed=3).train()
    with torch.no_grad():
        student(torch.randn(2, 3, 128, 64, generator=torch.Generator().manual_seed(0)))
    return student.eval()


@pytest.mark.parametrize("heads", ["paper", "timm"])
def test_exported_folder_gives_the_students_features(tmp_path: Path, views: np.ndarray, heads: str):
    student = _student(heads)
    export.write_timm(student, tmp_path)
    parity = export.check_timm(student, tmp_path, views)
    assert parity.max_abs_error <= export.TOLERANCE
    assert parity.num_images == 3
    assert parity.feature_scale > 0.1


def test_config_names_only_keys_of_the_stock_architecture(tmp_path: Path):
    from dpal.model.timm_import import timm

    student = _student()
    export.write_timm(student, tmp_path)
    stock = timm.create_model(
        "vit_tiny_patch16_224", img_size=(128, 64), num_classes=0, global_pool="token"
    )
    assert set(load_file(tmp_path / export.WEIGHTS)) == set(stock.state_dict())


def test_wrong_head_count_in_the_export_is_refused(tmp_path: Path, views: np.ndarray):
    student = _student()
    export.write_timm(student, tmp_path)
    config = json.loads((tmp_path / export.CONFIG).read_text())
    assert config["heads_per_block"] == [6] * 11 + [12]
    config["heads_per_block"][-1] = 6
    (tmp_path / export.CONFIG).write_text(json.dumps(config))
    with pytest.raises(DataError, match="differ from the trained student"):
        export.check_timm(student, tmp_path, views)


def test_damaged_weight_in_the_export_is_refused(tmp_path: Path, views: np.ndarray):
    student = _student()
    export.write_timm(student, tmp_path)
    tensors = load_file(tmp_path / export.WEIGHTS)
    tensors["blocks.4.mlp.fc1.bias"] += 0.5
    save_file(tensors, tmp_path / export.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(DataError, match=export.WEIGHTS):
        export.check_timm(student, tmp_path, views)


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path, views: np.ndarray):
    student = _student()
    export.write_timm(student, tmp_path)
    tensors = load_file(tmp_path / export.WEIGHTS)
    tensors["norm.bias"][0] = float("nan")
    save_file(tensors, tmp_path / export.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(DataError, match="nan"):
        export.check_timm(student, tmp_path, views)


def test_user_with_timm_alone_gets_the_features_of_a_picture_file(
    tmp_path: Path, views: np.ndarray
):
    student, folder = _student(), tmp_path / "export"
    folder.mkdir()
    export.write_timm(student, folder)
    image, out = tmp_path / "person.png", tmp_path / "tokens.pt"
    Image.fromarray(views[0]).save(image)
    script = USER_SCRIPT.format(
        shim="import dpal.model.timm_import", folder=str(folder), image=str(image), out=str(out)
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, timeout=120)
    with torch.no_grad():
        expected = student.eval()(normalise(torch.from_numpy(views[:1])))
    found = torch.load(out, weights_only=True)
    assert (found[:, 0] - expected.cls).abs().max() <= export.TOLERANCE
    assert (found[:, 1:] - expected.patches).abs().max() <= export.TOLERANCE


def test_onnx_graph_gives_the_students_features_for_any_batch(tmp_path: Path, views: np.ndarray):
    student, path = _student(), tmp_path / export.ONNX
    export.write_onnx(student, path)
    for count in (1, 3):
        parity = export.check_onnx(student, path, views[:count])
        assert parity.num_images == count
        assert parity.max_abs_error <= export.TOLERANCE
    with torch.no_grad():
        student.blocks[0].attn.qkv.weight.mul_(1.5)
    with pytest.raises(DataError, match="differ from the trained student"):
        export.check_onnx(student, path, views)


@pytest.mark.parametrize(
    "name", ["swin_tiny", "mobilenetv4_conv_small", "efficientvit_b0", "tiny_vit_5m_224"]
)
def test_every_family_is_exported_with_its_features(tmp_path: Path, views: np.ndarray, name: str):
    student = _of(name)
    export.write_timm(student, tmp_path)
    parity = export.check_timm(student, tmp_path, views)
    assert parity.max_abs_error <= export.TOLERANCE * parity.feature_scale
    assert parity.feature_scale > 0.05
    export.write_onnx(student, tmp_path / export.ONNX)
    for count in (1, 3):
        assert export.check_onnx(student, tmp_path / export.ONNX, views[:count]).num_images == count
    assert export.spec_of(json.loads((tmp_path / export.CONFIG).read_text())) == student.spec
    scope = {"__name__": "load", "__file__": str(tmp_path / export.LOADER)}
    exec((tmp_path / export.LOADER).read_text(), scope)
    model, transform = scope["load"](tmp_path)
    pixels = transform(Image.fromarray(views[0]))[None]
    torch.testing.assert_close(pixels, normalise(torch.from_numpy(views[:1])))
    with torch.no_grad():
        last = model.forward_features(pixels)
        vector = last.mean((1, 2) if name == "swin_tiny" else (2, 3))  # Swin: channels last
        torch.testing.assert_close(vector, student(pixels).cls, atol=1e-5, rtol=1e-4)
    tensors = load_file(tmp_path / export.WEIGHTS)
    key = max(tensors, key=lambda key: tensors[key].numel())
    tensors[key] *= 1.5
    save_file(tensors, tmp_path / export.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(DataError, match="differ from the trained student"):
        export.check_timm(student, tmp_path, views)


def test_exporting_swin_leaves_it_able_to_take_other_sizes(tmp_path: Path):
    student = _of("swin_tiny")
    crop = torch.randn(1, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = student(crop)
        with student.traceable():
            assert student.net.layers[3].blocks[1].shift_size == (3, 1)  # of a map of 4 x 2
        after = student(crop)
    assert torch.equal(before.patches, after.patches)


def test_mask_token_stays_behind_and_layer_scale_goes_along(tmp_path: Path, views: np.ndarray):
    spec = StudentSpec(height=128, width=64, layer_scale=0.5, position_embedding="sincos")
    student = build_student(spec, seed=3, masked=True)
    export.write_timm(student, tmp_path)
    assert export.check_timm(student, tmp_path, views).max_abs_error <= export.TOLERANCE
    names = set(load_file(tmp_path / export.WEIGHTS))
    assert "blocks.3.ls1.gamma" in names
    assert "pos_embed" in names
    assert "mask_token" not in names


@pytest.mark.parametrize("keys", [{}, {"last_heads": 16}, {"heads": "timm"}, {"name": "vit_small"}])
def test_configuration_written_before_it_held_the_section_is_understood(keys: dict[str, object]):
    spec = StudentSpec.model_validate({"height": 128, "width": 64, "positions": "2d", **keys})
    config = export.timm_config(build_student(spec))
    assert export.spec_of(config) == spec
    del config["student"]
    assert export.spec_of(config) == spec
