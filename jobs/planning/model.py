"""The arithmetic of a plan: bytes, hours, rates and money of a run, as plain formulas.

Nothing here reads a file or a recipe: `Workload` says what is to be done, `Rates` how fast things
go, and `reckon` answers with a `Plan`. Every stage of work is a list of limits (images per second
that one resource would allow); the smallest is the bottleneck.

Legend: N images, M images of a shard, G shards, T teachers, K and K' pinned base views and
composites, E epochs, S students, W devices, n nodes.
"""

import math
from collections.abc import Callable
from dataclasses import replace

from jobs.planning.rates import Prices, Rates
from jobs.planning.types import Cost, Limit, Phase, Plan, Workload

GB = 1e9
HOUR = 3600.0
MOST = 10**6  # break-even is looked for up to so many students or epochs
MB = 1e6


def reckon(work: Workload, rates: Rates) -> Plan:
    """The plan of a workload."""
    cached_cost, online_cost = _costs(work, rates)
    has_teachers = bool(work.teachers)
    return Plan(
        nodes=num_nodes(work, rates),
        cache=cache_phase(work, rates) if has_teachers else None,
        cached=train_phase(work, rates, online=False) if has_teachers else None,
        online=train_phase(work, rates, online=True),
        cached_cost=cached_cost,
        online_cost=online_cost,
        shards_month=work.shard_bytes / GB * rates.prices.gb_month,
        targets_month=work.target_bytes / GB * rates.prices.gb_month,
        break_even_students=_first(
            lambda count: _cached_pays(replace(work, students=count), rates)
        ),
        break_even_epochs=_first(lambda count: _cached_pays(replace(work, epochs=count), rates)),
        open_copies_bytes=open_copies_bytes(work, rates),
        hit_share=hit_share(work.copies_bytes, remote_bytes(work, online=False)),
    )


def num_nodes(work: Workload, rates: Rates) -> int:
    """n = W / devices of a node, rounded up."""
    return -(-work.devices // rates.node.devices)


def cache_phase(work: Workload, rates: Rates) -> Phase:
    """The cache job: every image once, all its pinned views through every teacher.

    A device takes whole shards, so the last ones may leave others idle (`last_device_images`).
    Calibration comes first, on one device.
    """
    node, load, nodes = rates.node, rates.loading, num_nodes(work, rates)
    device_s = sum(
        one.base.count / rate.base_images_per_s + one.composite.count / rate.composite_images_per_s
        for one, rate in zip(work.teachers, rates.teachers, strict=True)
    )
    core_s = 1 / load.cache_samples_per_s_core + work.target_image_bytes / (
        load.target_write_gb_per_s_core * GB
    )
    longest = last_device_images(work.images, work.samples_per_shard, work.devices)
    per_shard_gets = 1 + len(work.teachers)  # the shard; whether its ledger row is there
    per_shard_puts = work.num_series + len(work.teachers)
    per_image = (per_shard_gets + per_shard_puts) * work.shards / work.images
    limits = [
        Limit("teacher", work.images / longest / device_s),
        Limit("decode", nodes * node.cores / (core_s + node.teacher_cores * device_s)),
        Limit("reading", nodes * _read_rate(rates) / work.image_bytes),
        Limit("writing", nodes * _write_rate(rates) / max(1, work.target_image_bytes)),
    ]
    is_remote = work.remote_shards or work.remote_targets
    if is_remote:
        limits.append(Limit("requests", rates.store.requests_per_s / per_image))
    limits.sort(key=lambda limit: limit.images_per_s)
    fitted = sum(work.calibration_images / rate.base_images_per_s for rate in rates.teachers)
    seconds = work.images / limits[0].images_per_s + fitted + rates.start.cache_s
    full_speed = work.devices / device_s
    return Phase(
        seconds=seconds,
        busy_hours=work.images * device_s / HOUR,
        paid_hours=seconds * work.devices / HOUR,
        read_bytes=work.shard_bytes if work.remote_shards else 0.0,
        gets=per_shard_gets * work.shards if is_remote else 0.0,
        puts=per_shard_puts * work.shards + 2 * len(work.teachers) if is_remote else 0.0,
        node_mb_per_s=full_speed * (work.image_bytes + work.target_image_bytes) / nodes / MB,
        cores_per_device=core_s / device_s,
        requests_per_s=full_speed * per_image if is_remote else 0.0,
        limits=tuple(limits),
    )


def train_phase(work: Workload, rates: Rates, *, online: bool) -> Phase:
    """S runs of E epochs on W devices each, with targets from the cache or from the teachers.

    With teachers in the loop a device runs them between its steps: a base view, and a composite
    where the method uses one, for every sample.
    """
    node, load, nodes = rates.node, rates.loading, num_nodes(work, rates)
    student_s = 1 / rates.student_samples_per_s
    teacher_s = _online_teacher_s(work, rates) if online else 0.0
    records = 0 if online else work.step_record_bytes
    core_s = 1 / load.train_samples_per_s_core + records / (load.target_read_gb_per_s_core * GB)
    samples = work.images * work.epochs
    fetched = fetched_bytes(work, rates, online=online)
    peak = per_sample = (
        work.image_bytes + records
    )  # mapped in place: what is read is what is needed
    if work.remote_shards or work.remote_targets:
        per_sample = fetched / samples
        peak = remote_bytes(work, online=online) / work.images * (1 + _shared(work, rates))
    gets = num_gets(work, rates, online=online)
    device_s = student_s + teacher_s
    busy_cores = node.student_cores * student_s + node.teacher_cores * teacher_s
    limits = [
        Limit("teacher" if teacher_s > student_s else "student step", work.devices / device_s),
        Limit("decode", nodes * node.cores / (core_s + busy_cores)),
        Limit("reading", nodes * _read_rate(rates) / per_sample if per_sample else math.inf),
    ]
    if gets:
        limits.append(Limit("requests", rates.store.requests_per_s / (gets / samples)))
    limits.sort(key=lambda limit: limit.images_per_s)
    seconds = samples / limits[0].images_per_s + rates.start.train_s
    if online:  # one header is fitted for all students
        fitted = sum(work.calibration_images / rate.base_images_per_s for rate in rates.teachers)
        seconds += fitted / work.students
    else:
        seconds += work.parity_samples * _online_teacher_s(work, rates)
    full_speed = work.devices / device_s
    return Phase(
        seconds=seconds,
        busy_hours=work.students * samples * device_s / HOUR,
        paid_hours=work.students * seconds * work.devices / HOUR,
        read_bytes=work.students * fetched,
        gets=work.students * gets,
        puts=0.0,
        node_mb_per_s=full_speed * peak / nodes / MB,
        cores_per_device=core_s / device_s,
        requests_per_s=full_speed * gets / samples,
        limits=tuple(limits),
    )


def last_device_images(images: int, per_shard: int, devices: int) -> int:
    """Images of the device that has most, when shards are handed out one by one.

    All shards but the last are full; a device whose last shard is the smaller one has less.
    """
    shards = -(-images // per_shard)
    rest = images - (shards - 1) * per_shard
    rounds = -(-shards // devices)
    alone = (shards - 1) % devices == 0  # the smaller shard makes up the last round by itself
    return (rounds - 1) * per_shard + (rest if alone else per_shard)


def remote_bytes(work: Workload, *, online: bool) -> float:
    """What one epoch needs from the store: whole shards, and every series of their targets.

    A loader fetches all K + K' tars of a shard, as its samples may show any of their views.
    """
    targets = 0 if online or not work.remote_targets else work.target_bytes
    return targets + (work.shard_bytes if work.remote_shards else 0.0)


def hit_share(copies: float, total: float) -> float:
    """Share of re-reads that find a local copy: c + (1 - c) ln(1 - c), c = copies / total.

    The least recently used go first and every epoch permutes the shards. Between a shard's turn at
    u from the end of one epoch and at v from the beginning of the next, u + v - uv of all shards
    are read; it is still there if that is below c, and u and v are uniform. For one node; with
    several, where shards move between nodes, it comes closer to c.
    """
    if total <= 0 or copies >= total:
        return 1.0
    c = copies / total
    return c + (1 - c) * math.log1p(-c)


def fetched_bytes(work: Workload, rates: Rates, *, online: bool) -> float:
    """What one run fetches: all of it in the first epoch, then what is no longer copied.

    Where a cut between two nodes goes through a shard, both fetch it.
    """
    total = remote_bytes(work, online=online)
    epochs = _fetched_epochs(work, total)
    return total * epochs * (1 + _shared(work, rates))


def num_gets(work: Workload, rates: Rates, *, online: bool) -> float:
    """Read requests of one run: a shard's tar; of each of its series the tar and its ledger row.

    The ledger row is read whether the tar is among the local copies or not.
    """
    epochs = _fetched_epochs(work, remote_bytes(work, online=online))
    per_shard = epochs if work.remote_shards else 0.0
    if work.remote_targets and not online:
        per_shard += work.num_series * (epochs + work.epochs)
    return work.shards * per_shard * (1 + _shared(work, rates))


def open_copies_bytes(work: Workload, rates: Rates) -> float:
    """Bytes of the shards and targets that the ranks of a node read from or asked for at a time.

    A rank has lanes / W lanes, and opens two windows and a shard more of each
    (`data_tools.order.Order.shards_at_once`).
    """
    ranks = min(work.devices, rates.node.devices)
    lanes = max(1, work.lanes // work.devices)
    shards = min(work.shards, ranks * lanes * 2 * (work.window + 1))
    full = min(work.images, work.samples_per_shard)
    return shards * full * (remote_bytes(work, online=False) / work.images)


def _fetched_epochs(work: Workload, total: float) -> float:
    """Epochs' worth of shards that are fetched in one run."""
    again = max(0.0, work.epochs - 1) * (1 - hit_share(work.copies_bytes, total))
    return min(1.0, work.epochs) + again


def _shared(work: Workload, rates: Rates) -> float:
    """Shards that two nodes read, over all shards."""
    return min(num_nodes(work, rates) - 1, work.shards) / work.shards


def _online_teacher_s(work: Workload, rates: Rates) -> float:
    return sum(
        1 / rate.base_images_per_s + work.uses_composite / rate.composite_images_per_s
        for _one, rate in zip(work.teachers, rates.teachers, strict=True)
    )


def _read_rate(rates: Rates) -> float:
    """Bytes a second that a node reads."""
    return min(rates.store.read_mb_per_s, rates.node.network_mb_per_s) * MB


def _write_rate(rates: Rates) -> float:
    return min(rates.store.write_mb_per_s, rates.node.network_mb_per_s) * MB


def _costs(work: Workload, rates: Rates) -> tuple[Cost | None, Cost]:
    """Both ways, shards kept in both. The cached way: the job, its targets, and the training."""
    prices = rates.prices
    online = train_phase(work, rates, online=True)
    other = _cost(prices, work.shard_bytes, online)
    if not work.teachers:
        return None, other
    jobs = cache_phase(work, rates), train_phase(work, rates, online=False)
    return _cost(prices, work.shard_bytes + work.target_bytes, *jobs), other


def _cost(prices: Prices, kept_bytes: float, *phases: Phase) -> Cost:
    return Cost(
        devices=sum(one.paid_hours for one in phases) * prices.device_hour,
        storage=kept_bytes / GB * prices.gb_month * prices.months,
        egress=sum(one.read_bytes for one in phases) / GB * prices.gb_egress,
        requests=sum(
            one.gets / 1000 * prices.thousand_gets + one.puts / 1000 * prices.thousand_puts
            for one in phases
        ),
    )


def _cached_pays(work: Workload, rates: Rates) -> bool:
    cached, online = _costs(work, rates)
    return cached is not None and cached.total <= online.total


def _first(pays: Callable[[int], bool]) -> int | None:
    """The smallest count from 1 to MOST with which the cache pays; once it does, more pay too."""
    low, high = 0, 1
    while not pays(high):
        if high == MOST:
            return None
        low, high = high, min(2 * high, MOST)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high
