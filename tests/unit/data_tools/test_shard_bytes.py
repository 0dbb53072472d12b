"""The bytes of shards of plain folders, pinned: caches and checkpoints rely on them."""

import base64
import struct
import zlib
from pathlib import Path

from dpal.base.inputs import Data, Storage
from jobs.build_shards import build_shards

# Of `grey_png` 0 to 19 and `JPEG`, in shards of 8, built when shards were first published.
GOLDEN = "56a6ea24f1742364"
JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQc1td"
    "hbWGkJ6jq62rZ4C8ybqmx5moq6T/wAALCAAwACIBAREA/8QAFAABAAAAAAAAAAAAAAAAAAAAAP/EABQQAQAAAAAAAAAA"
    "AAAAAAAAAAD/2gAIAQEAAD8AAAAAAAAAAA//2Q=="
)


def grey_png(seed: int, height: int = 40, width: int = 33) -> bytes:
    """A PNG whose bytes no compressor decides: stored, not deflated."""
    rows = b"".join(
        b"\0" + bytes((seed * 37 + x * 5 + y * 11) % 251 for x in range(width))
        for y in range(height)
    )
    # One stored deflate block: header, length, its complement, the rows, Adler-32.
    length = struct.pack("<HH", len(rows), len(rows) ^ 0xFFFF)
    packed = b"\x78\x01\x01" + length + rows + struct.pack(">I", zlib.adler32(rows))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def write_folder(folder: Path) -> Path:
    for seed in range(20):
        path = folder / f"d{seed % 3}" / f"ä {seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(grey_png(seed))
    (folder / "d1" / "copy of 3.png").write_bytes(grey_png(3))
    (folder / "b.jpg").write_bytes(JPEG)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_shards_of_a_plain_folder_keep_the_bytes_they_always_had(tmp_path: Path) -> None:
    policy = Data(images=("unused",), samples_per_shard=8)
    source = str(write_folder(tmp_path / "in"))
    manifest = build_shards([source], str(tmp_path / "out"), policy, Storage())
    assert [ref.num_samples for ref in manifest.shards] == [8, 8, 5]
    assert dict(manifest.rejected) == {"duplicate": 1, "not_image": 1}
    assert manifest.digest == GOLDEN
