"""What goes into a plan and what comes out of it, as plain data: `Workload` in, `Plan` out.

Legend: N images, M images of a shard, G shards, T teachers, K and K' pinned base views and
composites, E epochs, S students, W devices.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Series:
    """Targets of one kind of view.

    Attributes:
        count: K or K'.
        record_bytes: of one view, as `dpal.record.RecordLayout` says.
        stored_bytes: the same in its tar.
    """

    count: int
    record_bytes: int
    stored_bytes: int


@dataclass(frozen=True)
class TeacherTargets:
    """What is stored of one teacher; `fixed_bytes` do not grow with the images (header)."""

    name: str
    base: Series
    composite: Series
    fixed_bytes: int = 0

    @property
    def stored_bytes(self) -> int:
        """Of one image, all views."""
        return sum(one.count * one.stored_bytes for one in (self.base, self.composite))


@dataclass(frozen=True)
class Workload:
    """What is to be done.

    Attributes:
        images: N.
        samples_per_shard: M.
        image_bytes: of one image in its shard, mean.
        tar_end_bytes: bytes of a target tar besides its records.
        teachers: whose targets the method learns from; empty for SAIP.
        uses_composite: whether a training step looks at a composite.
        calibration_images: views that a cache's header is fitted on.
        epochs, students, devices: E, S, W.
        lanes: that the order of samples really has.
        window: shards that a lane mixes.
        copies_bytes: room for local copies on a node.
        remote_shards, remote_targets: whether they are fetched from a store, or mapped in place.
        parity_samples: that the teachers look at before a cached run starts.
    """

    images: int
    samples_per_shard: int
    image_bytes: float
    tar_end_bytes: int
    teachers: tuple[TeacherTargets, ...]
    uses_composite: bool
    calibration_images: int
    epochs: float
    students: int
    devices: int
    lanes: int
    window: int
    copies_bytes: float
    remote_shards: bool
    remote_targets: bool
    parity_samples: int = 0

    @property
    def shards(self) -> int:
        """G."""
        return -(-self.images // self.samples_per_shard)

    @property
    def shard_bytes(self) -> float:
        """All image shards."""
        return self.images * self.image_bytes

    @property
    def num_series(self) -> int:
        """Target tars of one shard, all teachers."""
        return sum(one.base.count + one.composite.count for one in self.teachers)

    @property
    def target_image_bytes(self) -> int:
        """All targets of one image."""
        return sum(teacher.stored_bytes for teacher in self.teachers)

    @property
    def target_bytes(self) -> int:
        """All targets."""
        tars = self.images * self.target_image_bytes
        ends = self.shards * self.num_series * self.tar_end_bytes
        return tars + ends + sum(teacher.fixed_bytes for teacher in self.teachers)

    @property
    def target_objects(self) -> int:
        """Target tars and ledger rows of every shard; header and covariance of every teacher."""
        return self.shards * (self.num_series + len(self.teachers)) + 2 * len(self.teachers)

    @property
    def step_record_bytes(self) -> int:
        """Records that one training sample reads: a base view and a composite of every teacher."""
        return sum(
            one.base.record_bytes + self.uses_composite * one.composite.record_bytes
            for one in self.teachers
        )


@dataclass(frozen=True)
class Limit:
    """Images a second that one resource allows."""

    name: str
    images_per_s: float


@dataclass(frozen=True)
class Phase:
    """One job, or all runs of training in one way.

    Attributes:
        seconds: wall clock of one run on all devices.
        busy_hours: device-hours that devices compute, all runs.
        paid_hours: device-hours from start to end, all runs.
        read_bytes: from the store, all runs.
        gets, puts: requests, all runs; `puts` are those paid as writes.
        images_per_s: of one run, from the first image to the last.
        node_mb_per_s: what a node reads and writes a second at the devices' own speed; in
            training, of the first epoch, when nothing is among its local copies yet.
        cores_per_device: that decode and render at the devices' own speed.
        requests_per_s: of all nodes at the devices' own speed.
        limits: from the tightest up, in the mean of the run; the first is the bottleneck.
    """

    seconds: float
    busy_hours: float
    paid_hours: float
    read_bytes: float
    gets: float
    puts: float
    images_per_s: float
    node_mb_per_s: float
    cores_per_device: float
    requests_per_s: float
    limits: tuple[Limit, ...]

    @property
    def bottleneck(self) -> str:
        """Name of the tightest limit."""
        return self.limits[0].name

    @property
    def slack(self) -> float:
        """How many times wider the next limit is; infinite where there is no other."""
        if len(self.limits) < 2:
            return math.inf
        return self.limits[1].images_per_s / self.limits[0].images_per_s


@dataclass(frozen=True)
class Cost:
    """What one way costs, in `Prices.currency`."""

    devices: float
    storage: float
    egress: float
    requests: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.devices + self.storage + self.egress + self.requests


@dataclass(frozen=True)
class Plan:
    """The answer.

    Attributes:
        cache, cached: the cache job, and training on its targets; None without teachers.
        online: training with the teachers in the loop; without teachers, plain training.
        shards_month, targets_month: price of keeping them for a month.
        break_even_students: fewest students with which the cache is not dearer; None: never.
        break_even_epochs: the same, of epochs.
        open_copies_bytes: shards and targets that a node has open at a time.
        hit_share: share of what is read after the first epoch that lies among local copies.
    """

    nodes: int
    cache: Phase | None
    cached: Phase | None
    online: Phase
    cached_cost: Cost | None
    online_cost: Cost
    shards_month: float
    targets_month: float
    break_even_students: int | None
    break_even_epochs: int | None
    open_copies_bytes: float
    hit_share: float

    @property
    def cheaper(self) -> str:
        """'cached' or 'online'."""
        if self.cached_cost is None:
            return "online"
        return "cached" if self.cached_cost.total <= self.online_cost.total else "online"
