"""Images for the loader benchmarks: drawn persons with grain, as JPEGs in plain WebDataset shards.

Drawing costs more than encoding, so a few hundred drawings are varied (mirrored, brighter or
darker, with their own grain) into as many different images as wanted. The grain brings a JPEG to
the size of a photograph's crop: 256 x 128 at quality 90 is about 9.5 kB, and resized crops of four
public person sets average 8.4 to 10.1 kB.
"""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg

from data_tools.manifest import MANIFEST, Manifest, ShardRef, keys_digest
from data_tools.synthetic import draw_person

SIZE = (256, 128)
DRAWINGS = 256
GRAIN = 3.0  # standard deviation in grey levels
IDENTITIES = 64
QUALITY = 90


class Truth(NamedTuple):
    """What a whole epoch must deliver.

    Attributes:
        images: how many.
        jpeg_bytes: of all images together.
        pixels: digest of the sorted CRC-32s of all decoded images.
    """

    images: int
    jpeg_bytes: int
    pixels: str


def jpegs(count: int, size: tuple[int, int] = SIZE) -> Iterator[bytes]:
    """`count` different JPEGs of height x width `size`."""
    rng = np.random.default_rng(0)
    drawings = [draw_person(0, i % IDENTITIES, i, size).image for i in range(min(DRAWINGS, count))]
    for index in range(count):
        image = drawings[index % len(drawings)].astype(np.float32)
        if rng.random() < 0.5:
            image = image[:, ::-1]
        # The same grain in all channels: sensors' noise after demosaicing is mostly luminance.
        image = image * rng.uniform(0.8, 1.2) + GRAIN * rng.standard_normal((*size, 1), np.float32)
        pixels = np.ascontiguousarray(image.clip(0, 255).astype(np.uint8))
        yield simplejpeg.encode_jpeg(pixels, quality=QUALITY, colorsubsampling="420")


def write_shards(folder: Path, images: Iterator[bytes], per_shard: int) -> Manifest:
    """Shards of `per_shard` samples (`<key>.jpg`, `<key>.json`) and their manifest."""
    refs: list[ShardRef] = []
    while batch := [image for _, image in zip(range(per_shard), images, strict=False)]:
        refs.append(_write_shard(folder / f"persons-{len(refs):06d}.tar", batch))
    manifest = Manifest(tuple(refs))
    (folder / MANIFEST).write_text(manifest.to_json())
    return manifest


def truth_of(folder: Path) -> Truth:
    """What an epoch over the shards in `folder` must deliver, from tarfile and simplejpeg alone."""
    sums: list[int] = []
    jpeg_bytes = 0
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    data = tar.extractfile(member).read()  # type: ignore[union-attr]
                    jpeg_bytes += len(data)
                    sums.append(zlib.crc32(simplejpeg.decode_jpeg(data, colorspace="RGB")))
    return Truth(len(sums), jpeg_bytes, pixels_digest(sums))


def pixels_digest(sums: list[int]) -> str:
    """16 hex digits over a multiset of CRC-32s: equal when every image came equally often."""
    return hashlib.sha256(np.sort(np.array(sums, np.uint32)).tobytes()).hexdigest()[:16]


def _write_shard(path: Path, images: list[bytes]) -> ShardRef:
    samples = sorted((hashlib.sha256(data).hexdigest()[:32], data) for data in images)
    meta = json.dumps({"height": SIZE[0], "source": "drawn", "width": SIZE[1]}).encode()
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, data in samples:
            for name, member in ((f"{key}.jpg", data), (f"{key}.json", meta)):
                info = tarfile.TarInfo(name)
                info.size = len(member)
                tar.addfile(info, io.BytesIO(member))
    data = path.read_bytes()
    keys = [key for key, _ in samples]
    digest = hashlib.sha256(data).hexdigest()
    return ShardRef(path.name, digest, len(data), len(keys), keys_digest(keys))
