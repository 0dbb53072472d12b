"""The arithmetic of a plan: every formula by hand on one worked example, and what must always hold.

Takes about 10 s.
"""

import math
from collections import OrderedDict
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.order import Order
from data_tools.storage import open_store
from dpal.base.inputs import Storage
from jobs.planning.fetching import fetched_bytes, fetched_epochs, hit_share, num_gets
from jobs.planning.model import (
    cache_phase,
    last_device_images,
    open_copies_bytes,
    put_requests,
    reckon,
    train_phase,
)
from jobs.planning.rates import Loading, Node, Origin, Prices, Rates, Start, Store, TeacherRate
from jobs.planning.types import Phase, Series, TeacherTargets, Workload

ORIGIN = Origin(
    **dict.fromkeys(("date", "machine", "device", "recipe", "views", "student", "method"), "x"),
    codec="int8",
)

# 1,000,000 images of 10 kB in 2,000 shards of 500; one teacher, two views of 100 kB and a composite
# of 200 kB; 8 devices on 2 nodes of 4; 10 epochs, 3 students; everything in a store.
WORK = Workload(
    images=1_000_000,
    samples_per_shard=500,
    image_bytes=10_000.0,
    tar_end_bytes=1024,
    teachers=(
        TeacherTargets(
            "big", Series(2, 99_000, 100_000), Series(1, 199_000, 200_000), fixed_bytes=5_000_000
        ),
    ),
    uses_composite=True,
    calibration_images=1000,
    epochs=10.0,
    students=3,
    devices=8,
    lanes=64,
    window=4,
    copies_bytes=50e9,
    remote_shards=True,
    remote_targets=True,
)
# 2 / 2000 + 1 / 1000 = 2 ms of a device for an image's targets; 1 ms for a training sample.
RATES = Rates(
    measured=ORIGIN,
    image_bytes=9000.0,
    student_samples_per_s=1000.0,
    teachers=(
        TeacherRate(name="big", width=768, base_images_per_s=2000.0, composite_images_per_s=1000.0),
    ),
    loading=Loading(
        train_samples_per_s_core=500.0,
        cache_samples_per_s_core=250.0,
        target_read_gb_per_s_core=1.0,
        target_write_gb_per_s_core=0.4,
    ),
    store=Store(read_mb_per_s=1000.0, write_mb_per_s=800.0, requests_per_s=5000.0),
    node=Node(devices=4, cores=32, network_mb_per_s=3000.0),
    start=Start(cache_s=10.0, train_s=30.0),
    prices=Prices(
        device_hour=2.0,
        gb_month=0.02,
        gb_egress=0.01,
        thousand_gets=0.0004,
        thousand_puts=0.005,
        months=2.0,
    ),
)


def limits(phase: Phase) -> dict[str, float]:
    return {limit.name: limit.images_per_s for limit in phase.limits}


def test_bytes_and_objects_by_hand() -> None:
    assert WORK.shards == 2000
    assert WORK.shard_bytes == 10e9
    # 2 x 100 kB + 200 kB an image; 3 tars of 1,024 bytes' end a shard; the header once.
    assert WORK.target_bytes == 400_000 * 10**6 + 3 * 2000 * 1024 + 5_000_000
    assert WORK.target_objects == 2000 * 4 + 2
    assert WORK.step_record_bytes == 298_000
    assert replace(WORK, uses_composite=False).step_record_bytes == 99_000
    assert replace(WORK, images=1001, samples_per_shard=500).shards == 3


def test_the_cache_job_by_hand() -> None:
    phase = cache_phase(WORK, RATES)
    # A core: 4 ms to render, 400 kB / .4 GB/s = 1 ms to encode.
    assert limits(phase) == pytest.approx(
        {
            "teacher": 8 / 0.002,
            "decode": 64 / 0.005,
            "reading": 2 * 1e9 / 10_000,
            "writing": 2 * 0.8e9 / 400_000,
            # For 500 images: a GET; HEAD and LIST twice, as no row is there; 3 tars, a row. Once:
            # header and covariance.
            "requests": 5000 / (9 / 500 + 2 / 1e6),
        }
    )
    assert {phase.limits[0].name, phase.limits[1].name} == {"teacher", "writing"}  # both 4,000
    assert phase.slack == pytest.approx(1.0)
    # 1e6 / 4000 images/s, 1,000 calibration views at 2,000/s, 10 s to start.
    assert phase.seconds == pytest.approx(250 + 0.5 + 10)
    assert phase.busy_hours == pytest.approx(2000 / 3600)
    assert phase.paid_hours == pytest.approx(260.5 * 8 / 3600)
    assert phase.cores_per_device == pytest.approx(0.005 / 0.002)
    assert phase.node_mb_per_s == pytest.approx(2000 * 410_000 / 1e6)  # 2,000 images/s a node
    assert (phase.gets, phase.puts) == (2000 * 3, 2000 * 6 + 2)
    assert phase.read_bytes == 10e9
    assert phase.images_per_s == pytest.approx(4000)


def test_training_on_a_cache_by_hand() -> None:
    work = replace(WORK, copies_bytes=0.0)  # nothing is kept: every epoch fetches everything
    phase = train_phase(work, RATES, online=False)
    once = (work.target_bytes + 10e9) * (1 + 1 / 2000)  # one shard lies on the cut of two nodes
    core_s = 1 / 500 + 298_000 / 1e9
    gets = 2000 * (1 + 3 + 1) * (1 + 1 / 2000)  # a tar; of three series a tar; a ledger row
    assert limits(phase) == pytest.approx(
        {
            "student step": 8000,
            "decode": 64 / core_s,
            "reading": 2e9 / (once / 1e6),
            "requests": 5000 / (gets / 1e6),
        }
    )
    assert phase.bottleneck == "reading"
    assert phase.slack == pytest.approx(8000 / (2e9 / (once / 1e6)))
    assert phase.seconds == pytest.approx(10 * once / 2e9 + 30)
    assert phase.busy_hours == pytest.approx(3 * 10 * 1e6 / 1000 / 3600)
    assert phase.read_bytes == pytest.approx(3 * 10 * once)
    assert phase.gets == pytest.approx(3 * 10 * gets)
    assert phase.cores_per_device == pytest.approx(1000 * core_s)
    assert phase.node_mb_per_s == pytest.approx(4000 * once / 1e6 / 1e6)


def test_online_training_by_hand() -> None:
    phase = train_phase(replace(WORK, copies_bytes=0.0), RATES, online=True)
    # 1 ms for the step, .5 ms for the base view, 1 ms for the composite.
    assert limits(phase)["teacher"] == pytest.approx(8 / 0.0025)
    assert phase.bottleneck == "teacher"
    assert phase.busy_hours == pytest.approx(3 * 10 * 1e6 * 0.0025 / 3600)
    assert phase.seconds == pytest.approx(10 * 1e6 / 3200 + 30 + 0.5 / 3)
    assert phase.read_bytes == pytest.approx(3 * 10 * 10e9 * (1 + 1 / 2000))
    assert phase.gets == pytest.approx(3 * 10 * 2000 * (1 + 1 / 2000))
    no_composite = train_phase(replace(WORK, uses_composite=False), RATES, online=True)
    assert no_composite.busy_hours == pytest.approx(3 * 10 * 1e6 * 0.0015 / 3600)


def test_cores_that_compute_do_not_decode() -> None:
    busy = RATES.model_copy(update={"node": Node(devices=4, cores=32, student_cores=2)})
    phase = train_phase(WORK, busy, online=False)
    core_s = 1 / 500 + 298_000 / 1e9
    assert limits(phase)["decode"] == pytest.approx(64 / (core_s + 2 / 1000))


def test_money_by_hand() -> None:
    work = replace(WORK, copies_bytes=0.0)
    plan = reckon(work, RATES)
    assert plan.cache is not None
    assert plan.cached is not None
    assert plan.cached_cost is not None
    cost = plan.cached_cost
    assert cost.devices == pytest.approx(2 * (plan.cache.paid_hours + plan.cached.paid_hours))
    assert cost.storage == pytest.approx((10e9 + work.target_bytes) / 1e9 * 0.02 * 2)
    assert cost.egress == pytest.approx((10e9 + plan.cached.read_bytes) / 1e9 * 0.01)
    gets = 6000 + plan.cached.gets
    assert cost.requests == pytest.approx(gets / 1000 * 0.0004 + 12_002 / 1000 * 0.005)
    assert cost.total == pytest.approx(cost.devices + cost.storage + cost.egress + cost.requests)
    online = plan.online_cost
    assert online.storage == pytest.approx(10 * 0.02 * 2)
    assert online.devices == pytest.approx(2 * plan.online.paid_hours)
    assert plan.shards_month == pytest.approx(10 * 0.02)
    assert plan.targets_month == pytest.approx(work.target_bytes / 1e9 * 0.02)


def test_break_even_is_the_first_count_that_pays() -> None:
    work = replace(WORK, remote_shards=False, remote_targets=False, epochs=1.0)
    plan = reckon(work, RATES)
    found = plan.break_even_students
    assert found is not None
    assert found > 1
    for count, cheaper in ((found - 1, "online"), (found, "cached")):
        assert reckon(replace(work, students=count), RATES).cheaper == cheaper
    epochs = plan.break_even_epochs
    assert epochs is not None
    assert reckon(replace(work, epochs=float(epochs)), RATES).cheaper == "cached"
    if epochs > 1:
        assert reckon(replace(work, epochs=float(epochs - 1)), RATES).cheaper == "online"


def test_a_cache_that_never_pays_says_so() -> None:
    dear = RATES.model_copy(update={"prices": Prices(gb_egress=1000.0)})
    plan = reckon(replace(WORK, copies_bytes=0.0), dear)
    assert plan.cheaper == "online"
    assert plan.break_even_students is None
    assert plan.break_even_epochs is None


def test_without_a_teacher_there_is_plain_training() -> None:
    rates = RATES.model_copy(update={"teachers": ()})
    plan = reckon(replace(WORK, teachers=()), rates)
    assert plan.cache is plan.cached is plan.cached_cost is None
    assert plan.break_even_students is None
    assert plan.online.bottleneck == "student step"
    assert plan.online.busy_hours == pytest.approx(3 * 10 * 1e6 / 1000 / 3600)


def test_ten_billion_images_on_four_thousand_devices() -> None:
    plan = reckon(replace(WORK, images=10**10, devices=4096, lanes=4096), RATES)
    assert (
        replace(WORK, images=10**10).target_bytes
        == 400_000 * 10**10 + 3 * 2 * 10**7 * 1024 + 5 * 10**6
    )
    assert plan.nodes == 1024
    assert plan.cache is not None
    assert all(math.isfinite(limit.images_per_s) for limit in plan.cache.limits)
    assert plan.cache.bottleneck == "requests"  # 5,000 a second for 1,024 nodes


@pytest.mark.parametrize(
    ("images", "per_shard", "devices"), [(10, 5, 3), (11, 5, 2), (1003, 10, 7)]
)
def test_the_last_device_as_by_handing_out_shards(
    images: int, per_shard: int, devices: int
) -> None:
    sizes = [min(per_shard, images - start) for start in range(0, images, per_shard)]
    loads = [0] * devices
    for size in sizes:
        loads[loads.index(min(loads))] += size
    assert last_device_images(images, per_shard, devices) == max(loads)


def fetches(share: float, nodes: int, epochs: int, shards: int) -> list[int]:
    """Of each epoch, by keeping lists: every node reads its part and drops what it used longest."""
    kept: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(nodes)]
    rng, counts = np.random.default_rng(0), []
    for _ in range(epochs):
        missed = 0
        for mine, part in zip(kept, np.array_split(rng.permutation(shards), nodes), strict=True):
            for shard in part.tolist():
                missed += shard not in mine
                mine[shard] = None
                mine.move_to_end(shard)
                if len(mine) > share * shards:
                    mine.popitem(last=False)
        counts.append(missed)
    return counts


@pytest.mark.parametrize("nodes", [1, 2, 5, 32])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 1.0])
def test_fetches_as_simulated_local_copies_count_them(share: float, nodes: int) -> None:
    counts = fetches(share, nodes, 12, shards=2400)
    for epochs in (1, 2, 12):
        counted = sum(counts[:epochs]) / 2400
        assert fetched_epochs(share, nodes, epochs) == pytest.approx(counted, abs=0.05)
    assert hit_share(share, 1.0, nodes, 12) == pytest.approx(
        1 - sum(counts[1:]) / 2400 / 11, abs=0.02
    )


def test_shards_move_between_nodes_so_copies_of_everything_are_fetched_by_every_node() -> None:
    room = {"copies_bytes": 1e15, "epochs": 1000.0}
    once = replace(WORK, devices=4, **room)
    everywhere = replace(WORK, devices=32, **room)
    one, eight = (train_phase(work, RATES, online=False).read_bytes for work in (once, everywhere))
    assert eight / one == pytest.approx(8 * (1 + 7 / 2000))
    assert fetched_epochs(1.0, 1024, 50.0) == pytest.approx(1024 * (1 - (1023 / 1024) ** 50))
    assert fetched_epochs(0.5, 4096, 1e6) == pytest.approx(5e5, rel=0.01)  # finite and quick
    assert fetched_epochs(0.5, 3, 0.25) == 0.25
    assert fetched_epochs(1.0, 25 * 10**10, 2.0) <= 2  # although nothing is left of its digits


def test_copies_that_hold_everything_are_fetched_once() -> None:
    work = replace(WORK, copies_bytes=1e12, devices=4)
    total = work.target_bytes + 10e9
    assert fetched_bytes(work, 1, 10.0, online=False) == pytest.approx(total)
    first = train_phase(work, RATES, online=False)  # the first epoch reads as if nothing were kept
    assert first.node_mb_per_s == pytest.approx(4000 * total / 1e6 / 1e6)
    # Tars once, ledger rows in every epoch.
    assert num_gets(work, 1, 10.0, online=False) == pytest.approx(2000 * (1 + 3 + 10))
    assert hit_share(0.0, 1e9) == 0.0


def test_a_first_epoch_that_waits_for_the_store_is_not_hidden_by_later_ones() -> None:
    work = replace(WORK, copies_bytes=1e12, devices=4)
    phase = train_phase(work, RATES, online=False)
    first = (work.target_bytes + 10e9) / 1e9  # seconds of reading at 1 GB/s
    assert first > 1e6 / 4000
    assert phase.seconds == pytest.approx(first + 9 * 1e6 / 4000 + 30)
    assert phase.bottleneck == "student step"  # in the mean of the run
    assert phase.images_per_s == pytest.approx(1e7 / (phase.seconds - 30))


@pytest.mark.parametrize(
    ("share", "devices", "epochs"), [(0.3, 16, 40), (0.9, 8, 7), (2.0, 64, 90)]
)
def test_training_takes_as_long_as_its_epochs_one_by_one(
    share: float, devices: int, epochs: int
) -> None:
    work = replace(WORK, devices=devices, epochs=float(epochs), lanes=64)
    total = work.target_bytes + 10e9
    work, nodes = replace(work, copies_bytes=share * total), devices // 4
    seconds = 0.0
    for epoch in range(1, epochs + 1):
        new = fetched_epochs(share, nodes, epoch) - fetched_epochs(share, nodes, epoch - 1)
        cut = 1 + (nodes - 1) / 2000
        reading = new * total * cut / (nodes * 1e9)
        requests = 2000 * cut * (new + 3 * (new + 1)) / 5000
        decode = 1e6 * (1 / 500 + 298_000 / 1e9) / (32 * nodes)
        seconds += max(1e6 / (1000 * devices), decode, reading, requests)
    phase = train_phase(work, RATES, online=False)
    assert phase.seconds == pytest.approx(seconds + 30, rel=0.01)


def test_teachers_are_cached_one_after_the_other() -> None:
    """Each fetches and renders every shard again, and starts anew."""
    small = TeacherTargets("small", Series(2, 9_000, 10_000), Series(1, 19_000, 20_000))
    slow = TeacherRate(name="slow", width=64, base_images_per_s=500.0, composite_images_per_s=500.0)
    work = replace(WORK, teachers=(*WORK.teachers, small))
    rates = RATES.model_copy(update={"teachers": (*RATES.teachers, slow)})
    phase = cache_phase(work, rates)
    # The first is bound by its teacher and by writing, 4,000 images/s; the second by its teacher.
    big, little = 1e6 / 4000, 1e6 * (3 / 500) / 8
    assert phase.seconds == pytest.approx(big + little + 1000 / 2000 + 1000 / 500 + 2 * 10)
    assert phase.images_per_s == pytest.approx(1e6 / (big + little))
    assert phase.read_bytes == 2 * 10e9
    assert (phase.gets, phase.puts) == (2 * 6000, 2 * 12_002)
    assert limits(phase) == pytest.approx(
        {
            "teacher": 8 / 0.008,
            "decode": 64 / (2 * 0.004 + 440_000 / 0.4e9),
            "reading": 2 * 1e9 / 20_000,
            "writing": 2 * 0.8e9 / 440_000,
            "requests": 5000 / (18 / 500 + 4 / 1e6),
        }
    )
    assert phase.node_mb_per_s == pytest.approx(500 * (20_000 + 440_000) / 1e6)


@pytest.mark.parametrize(
    ("shards", "targets", "gets", "puts"),
    [(True, False, 2000, 0), (False, True, 4000, 12_002), (False, False, 0, 0)],
)
def test_only_what_is_in_a_store_takes_requests(
    shards: bool, targets: bool, gets: int, puts: int
) -> None:
    phase = cache_phase(replace(WORK, remote_shards=shards, remote_targets=targets), RATES)
    assert (phase.gets, phase.puts) == (gets, puts)
    assert ("requests" in limits(phase)) == (gets + puts > 0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the requests that s3fs makes to an empty store."""
    names: list[str] = []

    async def answer(_fs: object, method: str, *_positional: object, **_named: object) -> object:
        names.append(method)
        if method == "head_object":
            raise FileNotFoundError
        return {"UploadId": "x", "ETag": "x"}

    monkeypatch.setattr("s3fs.S3FileSystem._call_s3", answer)
    return names


@pytest.mark.parametrize("size", [5, 100 * 2**20 - 1, 100 * 2**20, 101 * 2**20])
def test_requests_of_a_written_object_are_those_that_are_made(asked: list[str], size: int) -> None:
    store = open_store("s3://bucket/targets", Storage())
    assert store.put_if_absent("object", bytes(size))
    assert len(asked) == put_requests(size)


def test_a_row_that_is_absent_is_asked_for_and_listed(asked: list[str]) -> None:
    assert not open_store("s3://bucket/targets", Storage()).exists("ledger/row.json")
    assert asked == ["head_object", "list_objects_v2"]


@pytest.mark.parametrize("devices", [1, 2, 8, 64])
def test_open_copies_are_what_the_order_opens(devices: int) -> None:
    order = Order(0, [500] * 2000, global_batch=2048, lanes=64, window=4)
    ranks = min(devices, RATES.node.devices)
    shards = min(2000, ranks * order.shards_at_once(devices))
    work = replace(WORK, devices=devices)
    expected = shards * 500 * (work.target_bytes + 10e9) / 1e6
    assert open_copies_bytes(work, RATES) == pytest.approx(expected)


NUMBERS = {
    "images": st.integers(1, 10**10),
    "samples_per_shard": st.integers(1, 10**5),
    "epochs": st.floats(0.01, 1000),
    "students": st.integers(1, 1000),
    "devices": st.integers(1, 4096),
    "copies_bytes": st.floats(0, 1e15),
    "remote_shards": st.booleans(),
    "remote_targets": st.booleans(),
}
workloads = st.builds(lambda **values: replace(WORK, **values), **NUMBERS)


def _amounts(work: Workload) -> dict[str, float]:
    plan = reckon(work, RATES)
    assert plan.cache is not None
    assert plan.cached is not None
    assert plan.cached_cost is not None
    return {
        "stored": work.target_bytes,
        "objects": work.target_objects,
        "cache job": plan.cache.seconds,
        "teacher hours": plan.cache.busy_hours,
        "cached hours": plan.cached.paid_hours,
        "online hours": plan.online.paid_hours,
        "cached cost": plan.cached_cost.total,
        "online cost": plan.online_cost.total,
        "read": plan.cached.read_bytes,
        "requests": plan.cached.gets,
    }


@settings(max_examples=50, deadline=None)
@given(workloads, st.sampled_from(["images", "epochs", "students"]), st.integers(2, 100))
def test_more_never_costs_less(work: Workload, what: str, factor: int) -> None:
    more = replace(work, **{what: getattr(work, what) * factor})
    if more.images > 10**12:
        return
    before, after = _amounts(work), _amounts(more)
    assert all(math.isfinite(value) and value >= 0 for value in after.values())
    shrunk = {name for name in before if after[name] < before[name] * (1 - 1e-9)}
    assert not shrunk


@settings(max_examples=100, deadline=None)
@given(workloads, st.integers(2, 64))
def test_more_devices_or_faster_ones_are_never_slower(work: Workload, factor: int) -> None:
    plan = reckon(replace(work, copies_bytes=0.0, remote_shards=False, remote_targets=False), RATES)
    wider = reckon(
        replace(
            work,
            copies_bytes=0.0,
            remote_shards=False,
            remote_targets=False,
            devices=work.devices * factor,
        ),
        RATES,
    )
    for name in ("cache", "cached", "online"):
        one, other = getattr(plan, name), getattr(wider, name)
        assert other.seconds <= one.seconds * (1 + 1e-9)
        assert other.busy_hours == pytest.approx(one.busy_hours)
    faster = RATES.model_copy(update={"student_samples_per_s": 1000.0 * factor})
    assert train_phase(work, faster, online=False).seconds <= train_phase(
        work, RATES, online=False
    ).seconds * (1 + 1e-9)


@settings(max_examples=50, deadline=None)
@given(workloads)
def test_the_bottleneck_is_the_tightest_limit_and_slack_is_the_way_to_the_next(
    work: Workload,
) -> None:
    plan = reckon(work, RATES)
    for field in fields(plan):
        phase = getattr(plan, field.name)
        if isinstance(phase, Phase):
            rates = [limit.images_per_s for limit in phase.limits]
            assert phase.limits[0].images_per_s == min(rates)
            assert phase.slack == pytest.approx(sorted(rates)[1] / min(rates))
