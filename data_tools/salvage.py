"""What is left of a damaged shard: a sample's key is the digest of its image, so each can be told.

Only a run whose error budget allows skips looks here; whoever has none stops at the checksum.
"""

from data_tools.manifest import ShardRef
from data_tools.policy import key_of
from data_tools.shard import Shard, map_file
from data_tools.storage import Buffer, LocalStore, ObjectStore
from dpal.base.errors import DataError


class SalvagedShard(Shard):
    """A shard whose checksum is wrong: every image is checked against its key when it is read."""

    def image_bytes(self, index: int) -> bytes:
        """Encoded image of sample `index`. Raises DataError when it is not what was ingested."""
        data = super().image_bytes(index)
        if key_of(data) != self.keys[index]:
            raise DataError("its bytes are not those that its key is the digest of")
        return data


def salvage_shard(store: ObjectStore, ref: ShardRef) -> SalvagedShard:
    """A shard that failed its checksum, for its sound samples.

    Raises:
        DataError: when it is gone, or so damaged that its samples cannot be found.
    """
    where = f"{store.url}/{ref.name}"
    if isinstance(store, LocalStore):
        data: Buffer = map_file(store.path(ref.name), where)
    else:
        data = store.get(ref.name)
    if len(data) != ref.num_bytes:
        raise DataError(f"shard {where!r} has {len(data)} bytes instead of {ref.num_bytes}")
    return SalvagedShard(ref, data, where)
