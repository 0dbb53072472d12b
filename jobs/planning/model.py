"""The arithmetic of a plan: bytes, hours, rates and money of a run, as plain formulas.

Nothing here reads a file or a recipe: `Workload` says what is to be done, `Rates` how fast things
go, and `reckon` answers with a `Plan`. Every stage of work is a list of limits (images per second
that one resource would allow); the smallest is the bottleneck.

Legend: N images, M images of a shard, G shards, T teachers, K and K' pinned base views and
composites, E epochs, S students, W devices, n nodes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from jobs.planning.fetching import (
    fetched_bytes,
    hit_share,
    num_gets,
    remote_bytes,
    shared,
    stretches,
)
from jobs.planning.rates import Prices, Rates, TeacherRate
from jobs.planning.types import Cost, Limit, Phase, Plan, TeacherTargets, Workload

GB = 1e9
HOUR = 3600.0
MOST = 10**6  # break-even is looked for up to so many students or epochs
MB = 1e6
PART = 50 * 2**20  # bytes of a part of an object that s3fs writes


def reckon(work: Workload, rates: Rates) -> Plan:
    """The plan of a workload."""
    cached_cost, online_cost = _costs(work, rates)
    has_teachers, nodes = bool(work.teachers), num_nodes(work, rates)
    kept, total = work.copies_bytes, remote_bytes(work, online=not has_teachers)
    return Plan(
        nodes=nodes,
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
        hit_share=hit_share(kept, total, nodes, work.epochs),
    )


def num_nodes(work: Workload, rates: Rates) -> int:
    """n = W / devices of a node, rounded up."""
    return -(-work.devices // rates.node.devices)


def cache_phase(work: Workload, rates: Rates) -> Phase:
    """The cache job: teachers one after the other; for each, every image with all pinned views.

    A device takes whole shards, so the last ones may leave others idle (`last_device_images`).
    Calibration comes first, on one device.
    """
    nodes, is_remote = num_nodes(work, rates), work.remote_shards or work.remote_targets
    jobs = [
        _one_teacher(work, rates, targets, rate)
        for targets, rate in zip(work.teachers, rates.teachers, strict=True)
    ]
    limits = _joined([job.limits for job in jobs])
    images_s = sum(1 / min(job.limits.values()) for job in jobs)
    fitted = sum(work.calibration_images / rate.base_images_per_s for rate in rates.teachers)
    seconds = work.images * images_s + fitted + len(jobs) * rates.start.cache_s
    device_s = sum(job.device_s for job in jobs)
    full_speed = work.devices / device_s
    requests = sum(job.gets + job.puts for job in jobs)
    moved = len(jobs) * work.image_bytes + work.target_image_bytes
    return Phase(
        seconds=seconds,
        busy_hours=work.images * device_s / HOUR,
        paid_hours=seconds * work.devices / HOUR,
        read_bytes=len(jobs) * work.shard_bytes if work.remote_shards else 0.0,
        gets=sum(job.gets for job in jobs),
        puts=sum(job.puts for job in jobs),
        images_per_s=1 / images_s,
        node_mb_per_s=full_speed * moved / nodes / MB,
        cores_per_device=sum(job.core_s for job in jobs) / device_s,
        requests_per_s=full_speed * requests / work.images if is_remote else 0.0,
        limits=limits,
    )


class _Job(NamedTuple):
    """One teacher's part of a cache job: seconds of an image, requests, images per second."""

    device_s: float
    core_s: float
    gets: float
    puts: float
    limits: dict[str, float]


def _one_teacher(work: Workload, rates: Rates, targets: TeacherTargets, rate: TeacherRate) -> _Job:
    node, load, nodes = rates.node, rates.loading, num_nodes(work, rates)
    device_s = (
        targets.base.count / rate.base_images_per_s
        + targets.composite.count / rate.composite_images_per_s
    )
    core_s = 1 / load.cache_samples_per_s_core + targets.stored_bytes / (
        load.target_write_gb_per_s_core * GB
    )
    gets, puts = _cache_requests(work, targets)
    longest = last_device_images(work.images, work.samples_per_shard, work.devices)
    limits = {
        "teacher": work.images / longest / device_s,
        "decode": nodes * node.cores / (core_s + node.teacher_cores * device_s),
        "reading": nodes * _read_rate(rates) / work.image_bytes,
        "writing": nodes * _write_rate(rates) / max(1, targets.stored_bytes),
    }
    if gets + puts:
        limits["requests"] = rates.store.requests_per_s / ((gets + puts) / work.images)
    return _Job(device_s, core_s, gets, puts, limits)


def _cache_requests(work: Workload, targets: TeacherTargets) -> tuple[float, float]:
    """Read and write requests of one teacher's cache.

    Whether the ledger has a shard's row is asked before the shard is fetched, and again before the
    teacher begins it. Where it is absent, each time costs a HEAD, and a listing that is paid as a
    write.
    """
    gets = puts = 0.0
    if work.remote_shards:
        gets += work.shards
    if work.remote_targets:
        full = min(work.images, work.samples_per_shard)
        series = sum(
            one.count * put_requests(full * one.stored_bytes)
            for one in (targets.base, targets.composite)
        )
        gets += 2 * work.shards
        puts += work.shards * (2 + series + 1) + 2
    return gets, puts


def put_requests(num_bytes: float) -> int:
    """Requests that write one object: from two parts on, beginning, parts of 50 MiB, and end."""
    return 1 if num_bytes < 2 * PART else 2 + math.ceil(num_bytes / PART)


def _joined(jobs: Sequence[dict[str, float]]) -> tuple[Limit, ...]:
    """The limits of work that is done one after the other, the tightest first."""
    names = {name: 0.0 for job in jobs for name in job}
    limits = [Limit(name, _inverse(sum(1 / job[name] for job in jobs))) for name in names]
    return tuple(sorted(limits, key=lambda limit: limit.images_per_s))


def _inverse(seconds: float) -> float:
    return 1 / seconds if seconds else math.inf


def train_phase(work: Workload, rates: Rates, *, online: bool) -> Phase:
    """S runs of E epochs on W devices each, with targets from the cache or from the teachers.

    With teachers in the loop a device runs them between its steps: a base view, and a composite
    where the method uses one, for every sample.
    """
    node, nodes = rates.node, num_nodes(work, rates)
    student_s = 1 / rates.student_samples_per_s
    teacher_s = _online_teacher_s(work, rates) if online else 0.0
    core_s = 1 / rates.loading.train_samples_per_s_core
    if not online:
        core_s += work.step_record_bytes / (rates.loading.target_read_gb_per_s_core * GB)
    device_s = student_s + teacher_s
    busy_cores = node.student_cores * student_s + node.teacher_cores * teacher_s
    compute = {
        "teacher" if teacher_s > student_s else "student step": work.devices / device_s,
        "decode": nodes * node.cores / (core_s + busy_cores),
    }
    samples = work.images * work.epochs
    limits = _joined([compute | _store_limits(work, rates, 0.0, work.epochs, online=online)])
    training = sum(
        work.images
        * (end - begin)
        / min((compute | _store_limits(work, rates, begin, end, online=online)).values())
        for begin, end in stretches(work.epochs)
    )
    seconds = training + rates.start.train_s
    if online:  # one header is fitted for all students
        fitted = sum(work.calibration_images / rate.base_images_per_s for rate in rates.teachers)
        seconds += fitted / work.students
    else:
        seconds += work.parity_samples * _online_teacher_s(work, rates)
    full_speed = work.devices / device_s
    gets = num_gets(work, nodes, work.epochs, online=online)
    return Phase(
        seconds=seconds,
        busy_hours=work.students * samples * device_s / HOUR,
        paid_hours=work.students * seconds * work.devices / HOUR,
        read_bytes=work.students * fetched_bytes(work, nodes, work.epochs, online=online),
        gets=work.students * gets,
        puts=0.0,
        images_per_s=samples / training,
        node_mb_per_s=full_speed * _first_epoch_bytes(work, nodes, online=online) / nodes / MB,
        cores_per_device=core_s / device_s,
        requests_per_s=full_speed * gets / samples,
        limits=limits,
    )


def _store_limits(
    work: Workload, rates: Rates, begin: float, end: float, *, online: bool
) -> dict[str, float]:
    """Images per second that reading and requests allow between two times in epochs, in the mean.

    What is mapped in place is read as often as it is needed.
    """
    nodes, images = num_nodes(work, rates), work.images * (end - begin)
    if work.remote_shards or work.remote_targets:
        needed = fetched_bytes(work, nodes, end, online=online)
        needed -= fetched_bytes(work, nodes, begin, online=online)
    else:
        needed = images * _first_epoch_bytes(work, nodes, online=online)
    gets = num_gets(work, nodes, end, online=online) - num_gets(work, nodes, begin, online=online)
    limits = {"reading": nodes * _read_rate(rates) * images / needed if needed > 0 else math.inf}
    if gets > 0:
        limits["requests"] = rates.store.requests_per_s * images / gets
    return limits


def _first_epoch_bytes(work: Workload, nodes: int, *, online: bool) -> float:
    """Bytes of a sample while nothing is among the local copies."""
    if work.remote_shards or work.remote_targets:
        return remote_bytes(work, online=online) / work.images * (1 + shared(work, nodes))
    return work.image_bytes + (0 if online else work.step_record_bytes)


def last_device_images(images: int, per_shard: int, devices: int) -> int:
    """Images of the device that has most, when shards are handed out one by one.

    All shards but the last are full; a device whose last shard is the smaller one has less.
    """
    shards = -(-images // per_shard)
    rest = images - (shards - 1) * per_shard
    rounds = -(-shards // devices)
    alone = (shards - 1) % devices == 0  # the smaller shard makes up the last round by itself
    return (rounds - 1) * per_shard + (rest if alone else per_shard)


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
