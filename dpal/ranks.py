"""The ranks of a run: which one this process is, how they meet, and who lost another one."""

import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dpal.base.errors import DpalError

# What gloo and NCCL say when the other end of a collective is gone.
_LOST = ("by peer", "remote process exited", "Connection refused", "Broken pipe")


@dataclass(frozen=True)
class World:
    """Place of this process among all ranks."""

    rank: int
    size: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> "World":
        """Read RANK, WORLD_SIZE and LOCAL_RANK; a lone process is rank 0 of 1."""
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            size=int(os.environ.get("WORLD_SIZE", "1")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        )


def meet(world: World) -> None:
    """Join the process group of all ranks; nothing happens when that was done before."""
    if world.size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    os.environ.update(
        RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(world.local_rank)
    )
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    import_deepspeed().init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, verbose=False
    )


def leave() -> None:
    """Leave the process group of all ranks, if this process is in one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def lost_peers_told(world: World) -> Iterator[None]:
    """Turn the failure of a collective after another rank's death into one sentence.

    At the end the process group is left: a process that ends within it aborts, and its exit code
    is lost.

    Raises:
        DpalError: with exit code 1, which a scheduler tries again; the cause is the other rank's.
    """
    try:
        yield
    except RuntimeError as error:
        if world.size == 1 or not any(words in str(error) for words in _LOST):
            raise
        raise DpalError(
            f"rank {world.rank} lost another rank in the middle of a step; that rank tells why"
        ) from None
    finally:
        leave()


def import_deepspeed() -> Any:
    """Import DeepSpeed quietly, without the JIT builds it would start on a CPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # The shared-memory all-reduce is compiled at start-up (about a minute) and saves little.
    __compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that PyTorch has renamed; a user cannot mend that.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    return deepspeed


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
