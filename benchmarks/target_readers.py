"""Other ways to read the same records: a tar of .npy through webdataset or an index, safetensors.

Each gives batches of uint8 [B, R]. None checks what it reads; ours does.
"""

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import webdataset
from safetensors import safe_open
from safetensors.numpy import save_file

from data_tools.shard import map_file
from data_tools.tar import index_tar

Picks = Sequence[Sequence[int]]


def other_readers(
    records: np.ndarray, picks: Picks, folder: Path
) -> dict[str, Callable[[], object]]:
    """Write records [M, R] as others do; what reads them, the rows of `picks` where it can."""
    as_npy, as_tensors = folder / "npy.tar", folder / "records.safetensors"
    with tarfile.open(as_npy, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, record in enumerate(records):
            buffer = io.BytesIO()
            np.save(buffer, record)
            member = tarfile.TarInfo(f"{number:06d}.npy")
            member.size = buffer.tell()
            tar.addfile(member, io.BytesIO(buffer.getvalue()))
    save_file({f"{number:06d}": record for number, record in enumerate(records)}, as_tensors)
    data = map_file(as_npy, str(as_npy))
    spans = [entry.members["npy"] for entry in index_tar(data, str(as_npy))]
    size = len(picks[0])

    def from_tar() -> None:
        for rows in picks:
            pieces = (data[spans[row].offset : sum(spans[row])] for row in rows)
            np.stack([np.load(io.BytesIO(piece)) for piece in pieces])

    def from_webdataset() -> None:
        dataset = webdataset.WebDataset(str(as_npy), shardshuffle=False).decode()
        for samples in dataset.batched(size, collation_fn=None):
            np.stack([sample["npy"] for sample in samples])

    tensors = safe_open(as_tensors, framework="np")

    def from_tensors() -> None:
        for rows in picks:
            np.stack([tensors.get_tensor(f"{row:06d}") for row in rows])

    return {
        "safetensors, one tensor a sample, random rows": from_tensors,
        "np.load from an indexed tar of .npy, random rows": from_tar,
        "webdataset, tar of .npy, file order": from_webdataset,
    }
