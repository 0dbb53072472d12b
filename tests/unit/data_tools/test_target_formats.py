"""What docs/formats.md says of targets, against what is written: its reader, and every codec.

Legend: B records, N patches, D teacher width, C stored channels.
"""

import base64
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.target_tar import TargetTarBuilder
from dpal.calibration import fit_header
from dpal.record import spec_numbers
from dpal.targets.coding import decode_batch, encode_batch
from dpal.targets.header import TargetHeader
from dpal.views.specs import Box, ViewSpec

from made_targets import DEFINITION, GRID

PAGE = Path(__file__).parents[3] / "docs" / "formats.md"
B, N, D = 5, GRID[0] * GRID[1], 48
SPECS = [ViewSpec(Box(i, 2, 30 + i, 15), bool(i % 2)) for i in range(B)]


def made(codec: str) -> tuple[TargetHeader, np.ndarray]:
    """A header, and records [B, R] of random tokens."""
    rng = np.random.default_rng(3)
    scale = rng.uniform(0.1, 9, D).astype(np.float32)
    cls = rng.standard_normal((B, D), np.float32) * scale
    patches = rng.standard_normal((B, N, D), np.float32) * scale + 1
    definition = replace(DEFINITION, codec=codec)
    header = fit_header(definition, cls, patches, [str(i) for i in range(B)])
    numbers = np.stack([spec_numbers(spec) for spec in SPECS])
    return header, encode_batch(cls, patches, numbers, header, "view")


def test_the_reader_in_the_docs_reads_what_we_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    header, records = made("int8")
    folder = tmp_path / "runs/demo/targets/targets-0"
    (folder / "view-0").mkdir(parents=True)
    (folder / "header.json").write_bytes(header.to_json())
    builder = TargetTarBuilder([f"key{i}" for i in range(B)], header.layout("view"))
    builder.fill(0, records)
    (folder / "view-0" / "persons-000000.tar").write_bytes(builder.to_bytes())
    (block,) = re.findall(r"^```python\n(import glob\nimport json\nimport zlib.*?)^```$",
                          PAGE.read_text(), re.MULTILINE | re.DOTALL)  # fmt: skip
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block, names)
    wanted = decode_batch(records, header, "view")
    np.testing.assert_allclose(names["cls"], wanted.cls[0].numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(names["tokens"], wanted.patches[0].numpy(), rtol=1e-5, atol=1e-5)
    shapes = f"({D},) ({N}, {D})"
    lines = [f"{list(SPECS[i].box)} {int(SPECS[i].flip)} {shapes}" for i in (3, 0)]
    assert capsys.readouterr().out.splitlines() == lines
    used = {line.split()[1] for line in block.splitlines() if line.startswith("import ")}
    assert used == {"glob", "json", "zlib", "numpy"}


@pytest.mark.parametrize(
    "codec", ["int8", "int4", "fp16", "fp32", "pca16-int8", "pca16-int4", "pca20-fp16", "phis-int8"]
)
def test_every_codec_is_stored_as_the_docs_say(codec: str) -> None:
    header, records = made(codec)
    turn, _dash, storage = codec.rpartition("-")
    wide = "<f4" if storage == "fp32" else "<f2"
    channels = int(turn[3:]) if turn.startswith("pca") else D
    groups = {"int8": 1, "int4": -(-channels // 32)}.get(storage, 0)
    code, size = {"int8": ("i1", channels), "int4": ("u1", channels // 2)}.get(
        storage, (wide, channels)
    )
    record = np.dtype(
        [("view", "<u2", 6), ("cls", wide, D), ("scale", "<f2", (N, groups)),
         ("code", code, (N, size)), ("crc32", "<u4")]
    )  # fmt: skip
    assert record.itemsize == header.layout("view").num_bytes
    found = np.frombuffer(records.tobytes(), record)
    codes = found["code"].astype(np.float64)
    if storage == "int4":
        low, high = found["code"] & 15, found["code"] >> 4
        codes = np.stack([low, high], axis=-1).reshape(B, N, channels).astype(np.float64) - 8
    if groups:
        codes *= np.repeat(found["scale"].astype(np.float64), 32 if groups > 1 else channels,
                           axis=2)[:, :, :channels]  # fmt: skip
    mean, std = header.patch_mean.astype(np.float64), header.patch_std.astype(np.float64)
    tokens, cls = codes, found["cls"].astype(np.float64)
    if turn:
        plain = header.rotation.to_plain()
        basis = np.frombuffer(base64.b64decode(plain["basis"]), "<f4").reshape(channels, D)
        tokens = mean + plain["scale"] * codes @ basis.astype(np.float64)
    elif storage != "fp32":
        tokens = codes * std + mean
    if storage != "fp32":
        cls = cls * header.cls_std + header.cls_mean
    wanted = decode_batch(records, header, "view")
    np.testing.assert_allclose(tokens, wanted.patches.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(cls, wanted.cls.numpy(), rtol=1e-4, atol=1e-4)
