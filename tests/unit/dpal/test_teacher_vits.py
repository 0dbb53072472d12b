"""Published ViT teachers: each layout loads strictly and gives the tokens of a NumPy ViT."""

import logging
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import dpal.base.teachers as sections
from dpal.base.errors import ConfigError
from dpal.model.published.vit import load_vit
from dpal.model.relation_target import attention_projection
from dpal.model.teacher import build_teacher, teacher_identity

import teacher_files as files
import vit_in_numpy as reference

VIEW = files.VIEW
HEADS = files.WIDTH // 64
PATH_VARIANTS = ("converted with CLS", "converted without CLS", "large", "raw", "raw of pose")


def build(kind: str, path: Path, **changes):
    return build_teacher(files.spec(kind, path, **changes), stride=16, view_size=VIEW)


def views(size: tuple[int, int] = VIEW, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8, generator=generator)


def planes_of(pixels: torch.Tensor) -> np.ndarray:
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return ((pixels.numpy() / 255 - mean) / std).transpose(0, 3, 1, 2)


def doubles(state: files.State) -> dict[str, np.ndarray]:
    return {key: value.double().numpy() for key, value in state.items()}


def expected(
    state: files.State,
    prefix: torch.Tensor,
    positions: torch.Tensor,
    grid: tuple[int, int],
    pixels: torch.Tensor,
    *,
    padding: int = 0,
) -> tuple[list[np.ndarray], np.ndarray]:
    """The NumPy ViT on `pixels`, its positions resized from `grid`."""
    size = (pixels.shape[1] // 16, pixels.shape[2] // 16)
    table = positions.double().numpy()[0].reshape(*grid, -1)
    if size != grid:
        table = reference.bicubic(table, size)
    flat = table.reshape(-1, table.shape[-1])
    front = prefix.double().numpy()[0]
    return reference.vit(
        planes_of(pixels),
        doubles(state),
        front,
        flat,
        heads=HEADS,
        depth=files.DEPTH,
        padding=padding,
    )


def close(found: torch.Tensor, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found.numpy(), wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("variant", PATH_VARIANTS)
def test_every_path_variant_gives_the_tokens_of_its_own_positions(tmp_path, variant) -> None:
    state = files.vit_state(17)
    row, rows = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    place = torch.zeros_like(row) if variant == "converted without CLS" else row
    path = files.save(files.path_file(variant), tmp_path)
    teacher = build("path", path)
    for size in (VIEW, (64, 64)):  # the composite has the file's own 4 x 4 grid
        pixels = views(size)
        prefix = state["cls_token"] + place
        if variant == "raw of pose":
            prefix = prefix[:, :0]
        _, tokens = expected(state, prefix, rows, (4, 4), pixels)
        found = teacher(pixels)
        patches = tokens[:, prefix.shape[1] :]
        close(found.patches, patches)
        close(found.cls, patches.mean(1) if variant == "raw of pose" else tokens[:, 0])


@pytest.mark.parametrize(
    ("variant", "words"),
    [("converted without CLS", "CLS was not trained"), ("raw of pose", "has no CLS token")],
)
def test_an_untrained_cls_is_told_once_in_one_line(tmp_path, caplog, variant, words) -> None:
    path = files.save(files.path_file(variant), tmp_path)
    with caplog.at_level(logging.WARNING, "dpal"):
        build("path", path)
        build("path", path)
    assert len(caplog.messages) == 1
    assert words in caplog.messages[0]
    assert str(path) in caplog.messages[0]
    assert "\n" not in caplog.messages[0]


def test_a_trained_cls_is_not_warned_about(tmp_path, caplog) -> None:
    build("path", files.save(files.path_file("raw"), tmp_path))
    assert not caplog.messages


@pytest.mark.parametrize("kind", ["mae", "hap"])
def test_mae_and_hap_files_leave_their_decoder_behind(tmp_path, kind) -> None:
    grid = (4, 4) if kind == "mae" else (4, 2)
    state = files.vit_state(1 + grid[0] * grid[1])
    content = {"model": {**state, **files.mae_decoder()}, "args": Namespace(lr=1.0), "epoch": 3}
    teacher = build(kind, files.save(content, tmp_path))
    prefix = state["cls_token"] + state["pos_embed"][:, :1]
    _, tokens = expected(state, prefix, state["pos_embed"][:, 1:], grid, views())
    close(teacher(views()).cls, tokens[:, 0])
    close(teacher(views()).patches, tokens[:, 1:])


def test_pass_has_four_prefix_tokens_and_its_positions_apart(tmp_path) -> None:
    content = files.pass_file()
    state = {k.removeprefix("module.backbone."): v for k, v in content["teacher"].items()}
    names = [("cls_token", "cls_pos")] + [(f"part_token{i}", f"part{i}_pos") for i in (1, 2, 3)]
    prefix = torch.cat([state[token] + state[place] for token, place in names], 1)
    _, tokens = expected(state, prefix, state["pos_embed"], (4, 2), views())
    found = build("pass", files.save(content, tmp_path))(views())
    close(found.cls, tokens[:, 0])
    close(found.patches, tokens[:, 4:])


def test_unihcp_has_no_cls_so_the_mean_of_the_patches_is_global(tmp_path) -> None:
    state = files.vit_state(36)
    _, tokens = expected(state, state["cls_token"][:, :0], state["pos_embed"], (6, 6), views())
    found = build("unihcp", files.save(files.unihcp_file(), tmp_path))(views())
    close(found.patches, tokens)
    close(found.cls, tokens.mean(1))


@pytest.mark.parametrize("size", [1, 2])
def test_a_vit_without_cls_is_read_behind_a_block_too(tmp_path, size) -> None:
    state, pixels = files.vit_state(36), views()[:size]
    outputs, _ = expected(state, state["cls_token"][:, :0], state["pos_embed"], (6, 6), pixels)
    path = files.save(files.unihcp_file(), tmp_path)
    found = build("unihcp", path, tap="block1")(pixels)
    close(found.patches, outputs[1])
    close(found.cls, outputs[1].mean(1))
    assert not attention_projection(files.spec("unihcp", path, tap="block1")).has_cls


@pytest.mark.parametrize("padding", [0, 2])
def test_sapiens_is_fed_large_and_averaged_to_the_students_grid(tmp_path, padding) -> None:
    state = files.vit_state(1 + 8 * 8)
    path = files.save(files.sapiens_names(state), tmp_path)
    teacher = build("sapiens", path, input=(128, 64), padding=padding)
    assert teacher.input_size((64, 64)) == (128, 128)
    pixels = views((128, 64))  # fed as it is: the view is already of the teacher's size
    teacher.view_size = (128, 64)
    teacher.stride = 32
    prefix = state["cls_token"] + state["pos_embed"][:, :1]
    _, tokens = expected(state, prefix, state["pos_embed"][:, 1:], (8, 8), pixels, padding=padding)
    found = teacher(pixels)
    close(found.cls, tokens[:, 0])
    dense = tokens[:, 1:].reshape(2, 4, 2, 2, 2, files.WIDTH).mean((2, 4))  # 8 x 4 to 4 x 2
    close(found.patches, dense.reshape(2, 8, -1))


def test_sapiens_files_may_be_bare_or_wrapped(tmp_path) -> None:
    state = files.sapiens_names(files.vit_state(17))
    bare = build("sapiens", files.save(state, tmp_path), input=VIEW)
    wrapped = {"state_dict": {f"backbone.{k}": v for k, v in state.items()}}
    other = build("sapiens", files.save(wrapped, tmp_path, "wrapped.pth"), input=VIEW)
    assert torch.equal(bare(views()).patches, other(views()).patches)


def test_a_block_tap_is_that_blocks_output(tmp_path) -> None:
    state = files.vit_state(17)
    prefix = state["cls_token"] + state["pos_embed"][:, :1]
    outputs, _ = expected(state, prefix, state["pos_embed"][:, 1:], (4, 4), views())
    path = files.save(files.path_file("raw"), tmp_path)
    found = build("path", path, tap="block1")(views())
    close(found.patches, outputs[1][:, 1:])
    close(found.cls, outputs[1][:, 0])
    with pytest.raises(ConfigError, match=r"'block9'.*'block0' to 'block2'"):
        build("path", path, tap="block9")


@pytest.mark.parametrize("kind", ["path", "mae", "hap", "pass", "unihcp", "sapiens"])
@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "no tensor"])
def test_every_fault_of_a_file_is_named(tmp_path, kind, fault) -> None:
    content = {
        "path": files.path_file("raw"),
        "mae": {"model": files.vit_state(17)},
        "hap": {"model": files.vit_state(9)},
        "pass": files.pass_file(),
        "unihcp": files.unihcp_file(),
        "sapiens": files.sapiens_names(files.vit_state(17)),
    }[kind]
    state = next((content[k] for k in ("model", "state_dict", "teacher") if k in content), content)
    layer = "layers" if kind == "sapiens" else "blocks"
    tail = f"{layer}.1.attn.proj.weight"
    (name,) = [key for key in state if key.endswith(tail)]
    if fault == "missing":
        del state[name]
        words = f"missing {tail}"
    elif fault == "extra":
        state[name.replace("proj.weight", "rel_pos_h")] = torch.zeros(3)
        words = f"unexpected {layer}.1.attn.rel_pos_h"
    elif fault == "shape":
        state[name] = torch.zeros(5, 6)
        words = rf"{tail} is \[5, 6\], not \[128, 128\]"
    else:
        state[name] = 3
        words = f"{tail} is no tensor"
    path = files.save(content, tmp_path)
    with pytest.raises(ConfigError, match=words) as caught:
        build(kind, path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["pos_embed", "patch_embed.proj.weight", "cls_token"])
def test_a_missing_tensor_that_gives_a_size_is_named(tmp_path, name) -> None:
    state = files.vit_state(17)
    del state[name]
    with pytest.raises(ConfigError, match=f"missing {name}"):
        build("mae", files.save({"model": state}, tmp_path))


def test_positions_of_no_known_grid_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="pos_embed has 19 patches"):
        build("mae", files.save({"model": files.vit_state(20)}, tmp_path))


def test_two_names_that_become_one_are_refused(tmp_path) -> None:
    state = files.vit_state(17)
    state["module.norm.bias"] = state["norm.bias"]
    with pytest.raises(ConfigError, match=r"two tensors are named norm\.bias"):
        build("mae", files.save({"model": state}, tmp_path))


class Evil:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize("kind", ["path", "sapiens", "solider", "mobilesam"])
def test_pickled_code_beside_the_weights_is_refused_and_not_run(tmp_path, capsys, kind) -> None:
    path = files.save({"model": files.vit_state(17), "args": Evil()}, tmp_path)
    with pytest.raises(ConfigError, match="pickled code, which is never run") as caught:
        build(kind, path)
    assert str(path) in str(caught.value)
    assert "ran" not in capsys.readouterr().out


def test_what_is_left_out_is_counted() -> None:
    content = files.path_file("raw")["state_dict"]
    loaded = load_vit("path", content, Path("raw.pth"))
    assert loaded.dropped == {"neck_module": 1, "decoder_module": 1}
    assert loaded.positions.grid == (4, 4)


def test_identity_records_what_decides_tokens(tmp_path) -> None:
    path = files.save(files.sapiens_names(files.vit_state(17)), tmp_path)
    base = files.spec("sapiens", path)
    seen = teacher_identity(base, view_size=VIEW)
    for changes in ({"padding": 2}, {"tap": "block1"}, {"input": (96, 48)}, {"precision": "bf16"}):
        other = files.spec("sapiens", path, **changes)
        assert teacher_identity(other, view_size=VIEW) != seen
    assert teacher_identity(files.spec("sapiens", path, batch_size=7), view_size=VIEW) == seen


def test_relations_are_those_of_the_block_behind_the_tap(tmp_path) -> None:
    state = files.vit_state(17)
    prefix = state["cls_token"] + state["pos_embed"][:, :1]
    outputs, _ = expected(state, prefix, state["pos_embed"][:, 1:], (4, 4), views())
    path = files.save(files.path_file("raw"), tmp_path)
    found = build("path", path, tap="block0")(views())
    target = attention_projection(files.spec("path", path, tap="block0"))
    tokens = torch.cat([found.cls[:, None], found.patches], 1)
    numbers = doubles(state)
    normed = reference.norm(outputs[0], numbers, "blocks.1.norm1")
    for one, wanted in zip(
        target.train()(tokens), reference.qkv(normed, numbers, "blocks.1", HEADS), strict=True
    ):
        assert one.shape == (2, HEADS, 9, 64)
        close(one, wanted)
    assert (target.heads, target.width, target.block) == (HEADS, files.WIDTH, 1)
    assert not any(parameter.requires_grad for parameter in target.parameters())


def test_relations_of_paths_last_block_are_warned_about(tmp_path, caplog) -> None:
    path, mae = files.save(files.path_file("raw"), tmp_path), tmp_path / "mae.pth"
    torch.save({"model": files.vit_state(17)}, mae)
    with caplog.at_level(logging.WARNING, "dpal"):
        attention_projection(files.spec("path", path, tap="block0"))
        attention_projection(files.spec("mae", mae, tap="block1"))
        assert not caplog.messages
        attention_projection(files.spec("path", path, tap="block1"))
    assert len(caplog.messages) == 1
    assert "block 2" in caplog.messages[0]
    assert "'block0'" in caplog.messages[0]


def test_relations_behind_norm_or_the_last_block_are_refused(tmp_path) -> None:
    path = files.save(files.path_file("raw"), tmp_path)
    with pytest.raises(ConfigError, match=r"'norm' of teacher.kind=path.*'block<k>'"):
        attention_projection(files.spec("path", path))
    with pytest.raises(ConfigError, match=r"'block2' is the last block.*'block0' to 'block1'"):
        attention_projection(files.spec("path", path, tap="block2"))
    for kind, values in (
        ("solider", {"tap": "stage2"}),
        ("mobilesam", {}),
        ("onnx", {"global_output": "a", "dense_output": "b"}),
    ):
        with pytest.raises(ConfigError, match=f"teacher.kind={kind}: .*plain ViT"):
            attention_projection(files.spec(kind, path, **values))
    with pytest.raises(ConfigError, match=r"teacher\.kind=taught"):
        attention_projection(sections.TaughtTeacher(kind="taught"))
