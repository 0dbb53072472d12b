"""Work that rank 0 does for all, before training: the others wait for it, and end when it fails."""

from collections.abc import Callable

import torch

from dpal.base.errors import EXIT_BUG, EXIT_DONE, DpalError
from dpal.ranks import World, meet


def by_rank_0(world: World, work: Callable[[], None]) -> None:
    """Do `work` on rank 0; no rank goes on before it is done, or after it failed.

    The ranks meet first: who waited for an address where nobody listens yet would give up after
    ten minutes, and tell of it at length when it is stopped.

    Called within `lost_peers_told`, which leaves the group again.

    Raises:
        DpalError: on the other ranks, with the exit code of what `work` raises on rank 0.
    """
    if world.size == 1:
        return work()
    meet(world)
    failure: BaseException | None = None
    if world.rank == 0:
        try:
            work()
        except BaseException as error:
            failure = error
    code = _told_by_rank_0(_exit_code(failure))
    if code == EXIT_DONE:
        return None
    if failure is not None:
        raise failure
    stopped = DpalError(f"rank {world.rank} ends because rank 0 does; that rank tells why")
    stopped.exit_code = code
    raise stopped


def _told_by_rank_0(code: int) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"  # as the group's backend
    told = torch.tensor([code], device=device)
    torch.distributed.broadcast(told, src=0)
    return int(told.item())


def _exit_code(failure: BaseException | None) -> int:
    if failure is None:
        return EXIT_DONE
    return failure.exit_code if isinstance(failure, DpalError) else EXIT_BUG
