"""A plan as a table for people, 80 columns wide."""

import math
import textwrap
from collections.abc import Sequence

from jobs.planning.model import HOUR
from jobs.planning.rates import Rates
from jobs.planning.types import Phase, Plan, Workload

WIDTH = 80
Row = tuple[str, Sequence[str]]  # a label and its cells; without cells, a heading


def plan_text(
    name: str,
    work: Workload,
    rates: Rates,
    plan: Plan,
    warnings: Sequence[str],
    words: Sequence[str],
) -> str:
    """All of it."""
    measured = rates.measured
    size = (
        counted(work.images, "image"),
        counted(work.epochs, "epoch"),
        counted(work.students, "student"),
        f"{counted(work.devices, 'device')} on {counted(plan.nodes, 'node')}",
    )
    lines = [
        *_wrapped(f"{name}: {', '.join(size)}"),
        *_wrapped(f"rates of {measured.date}: {measured.machine}"),
        *_wrapped(f"a device is {measured.device}"),
        "",
        *_storage(work, rates, plan),
        "",
        *_phases(work, plan),
        "",
        *_money(work, rates, plan),
    ]
    if work.remote_shards or work.remote_targets:
        lines += ["", *_wrapped(_copies(work, plan))]
    if words:
        lines += ["", *_wrapped(f"on these devices with: {' '.join(words)}")]
    if warnings:
        lines += [""]
    for warning in warnings:
        lines += _wrapped(f"! {warning}")
    return "\n".join(lines)


def _storage(work: Workload, rates: Rates, plan: Plan) -> list[str]:
    per_shard, currency = min(work.images, work.samples_per_shard), rates.prices.currency
    head = ("a view", "an object", "objects", "bytes", f"{currency} a month")
    rows: list[Row] = [("STORED", head)]
    cells = (
        bytes_text(work.image_bytes),
        bytes_text(work.image_bytes * per_shard),
        count_text(work.shards),
        bytes_text(work.shard_bytes),
        money_text(plan.shards_month),
    )
    rows.append(("image shards", cells))
    price = rates.prices.gb_month / 1e9
    for teacher in work.teachers:
        rows.append((f"targets of {teacher.name}", ()))
        for kind, series in (("base view", teacher.base), ("composite", teacher.composite)):
            if series.count:
                total = work.images * series.count * series.stored_bytes
                cells = (
                    bytes_text(series.record_bytes),
                    bytes_text(series.stored_bytes * per_shard),
                    count_text(work.shards * series.count),
                    bytes_text(total),
                    money_text(total * price),
                )
                rows.append((f"  {counted(series.count, kind)}", cells))
    if work.teachers:
        total_cells = ("", "", count_text(work.target_objects), bytes_text(work.target_bytes))
        rows.append(("all targets", (*total_cells, money_text(plan.targets_month))))
    return _aligned(rows)


def _phases(work: Workload, plan: Plan) -> list[str]:
    named: list[tuple[str, Phase | None]] = [
        ("cache job", plan.cache),
        ("train, cached", plan.cached),
        ("train, online" if work.teachers else "train", plan.online),
    ]
    phases = [(name, phase) for name, phase in named if phase is not None]
    ran = [phase for _, phase in phases]
    rows: list[Row] = [
        ("DONE", [name for name, _ in phases]),
        ("device-hours of work", [number_text(one.busy_hours) for one in ran]),
        ("device-hours paid", [number_text(one.paid_hours) for one in ran]),
        ("wall clock of one run", [time_text(one.seconds) for one in ran]),
        ("images/s", [count_text(one.images_per_s) for one in ran]),
        ("read from the store", [bytes_text(one.read_bytes) for one in ran]),
        ("requests", [count_text(one.gets + one.puts) for one in ran]),
        ("bottleneck", [one.bottleneck for one in ran]),
        ("the next limit", [_next(one) for one in ran]),
        ("at the devices' own speed:", ()),
        ("  MB/s a node", [number_text(one.node_mb_per_s) for one in ran]),
        ("  requests/s", [number_text(one.requests_per_s) for one in ran]),
        ("  loader cores a device", [number_text(one.cores_per_device) for one in ran]),
    ]
    return _aligned(rows)


def _next(phase: Phase) -> str:
    if math.isinf(phase.slack):
        return "none"
    return f"{phase.limits[1].name} x{number_text(phase.slack)}"


def _money(work: Workload, rates: Rates, plan: Plan) -> list[str]:
    prices = rates.prices
    ways = [("cached", plan.cached_cost), ("online" if work.teachers else "", plan.online_cost)]
    costs = [cost for _, cost in ways if cost is not None]
    rows: list[Row] = [
        (f"COST in {prices.currency}", [name for name, cost in ways if cost is not None])
    ]
    for part in ("devices", "storage", "egress", "requests", "total"):
        rows.append((part, [money_text(getattr(cost, part)) for cost in costs]))
    lines = _aligned(rows)
    lines.append(
        f"at {prices.device_hour:g} a device-hour, {prices.gb_month:g} a GB-month (x "
        f"{prices.months:g}), {prices.gb_egress:g} a GB read,"
    )
    lines.append(
        f"   {prices.thousand_gets:g} for 1,000 GET, {prices.thousand_puts:g} for 1,000 PUT"
    )
    if plan.cached_cost is None:
        return lines
    least, most = sorted(cost.total for cost in costs)
    factor = f" by {most / least:.3g} times" if least else ""
    lines.append(f"cheaper: {plan.cheaper}{factor}")
    lines.append(
        f"the cache pays {_from(plan.break_even_students, 'student')}, "
        f"or {_from(plan.break_even_epochs, 'epoch')}"
    )
    return lines


def _from(count: int | None, noun: str) -> str:
    return f"with no number of {noun}s" if count is None else f"from {counted(count, noun)} on"


def _copies(work: Workload, plan: Plan) -> str:
    return (
        f"local copies: a node has {bytes_text(plan.open_copies_bytes)} open at a time, keeps "
        f"{bytes_text(work.copies_bytes)}, and finds {plan.hit_share:.0%} there of what it reads "
        "after the first epoch"
    )


def _aligned(rows: Sequence[Row]) -> list[str]:
    """Labels to the left, cells to the right, columns as wide as they have to be."""
    label = max(len(name) for name, cells in rows if cells)
    columns = max(len(cells) for _, cells in rows)
    widths = [max(len(cells[i]) for _, cells in rows if i < len(cells)) for i in range(columns)]
    lines = []
    for name, cells in rows:
        shown = [f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=False)]
        lines.append(f"{name:<{label}}{''.join(shown)}".rstrip())
    return lines


def _wrapped(sentence: str) -> list[str]:
    return textwrap.wrap(
        sentence, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def counted(number: float, noun: str) -> str:
    """A number of things: 1 epoch, 2 epochs."""
    return f"{count_text(number)} {noun}{'s' * (number != 1)}"


def bytes_text(number: float) -> str:
    """Bytes in decimal units: 98.3 kB."""
    for unit in ("B", "kB", "MB", "GB", "TB", "PB", "EB"):
        if number < 999.5 or unit == "EB":
            return f"{number_text(number)} {unit}"
        number /= 1000
    raise AssertionError("unreachable")


def count_text(number: float) -> str:
    """A count: 12,740 or 1.2 million."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= 0.99995 * size:  # what four digits round up to it
            return f"{number / size:,.4g} {word}"
    return number_text(number)


def number_text(number: float) -> str:
    """Three significant digits, or all of a large whole number."""
    if number >= 100:
        return f"{number:,.0f}"
    return f"{number:.3g}"


def money_text(number: float) -> str:
    """An amount; cents where there are few."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:,.2f}"


def time_text(seconds: float) -> str:
    """Seconds, minutes, hours or days."""
    for size, unit in ((86400.0 * 2, "days"), (HOUR * 2, "h"), (120.0, "min")):
        if seconds >= size:
            divisor = {"days": 86400.0, "h": HOUR, "min": 60.0}[unit]
            return f"{number_text(seconds / divisor)} {unit}"
    return f"{number_text(seconds)} s"
