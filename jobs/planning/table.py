"""A plan as a table for people."""

import math
from collections.abc import Sequence

from jobs.planning.model import HOUR
from jobs.planning.rates import Rates
from jobs.planning.types import Phase, Plan, Workload

_LABEL, _COLUMN = 30, 16


def plan_text(name: str, work: Workload, rates: Rates, plan: Plan, warnings: Sequence[str]) -> str:
    """All of it, a screen of about 100 columns."""
    measured = rates.measured
    lines = [
        f"{name}: {count_text(work.images)} images, {number_text(work.epochs)} epochs, "
        f"{count_text(work.students)} student{'s' * (work.students > 1)}, {work.devices} "
        f"device{'s' * (work.devices > 1)} on {plan.nodes} node{'s' * (plan.nodes > 1)}",
        f"rates of {measured.date}: {measured.machine}; a device is {measured.device}",
        "",
        *_storage(work, rates, plan),
        "",
        *_phases(work, plan),
        "",
        *_money(work, rates, plan),
    ]
    if work.remote_shards or work.remote_targets:
        lines += ["", _copies(work, plan)]
    if warnings:
        lines += ["", *(f"! {warning}" for warning in warnings)]
    return "\n".join(lines)


def _storage(work: Workload, rates: Rates, plan: Plan) -> list[str]:
    per_shard, currency = min(work.images, work.samples_per_shard), rates.prices.currency
    head = ("a view", "an object", "objects", "bytes", f"{currency} a month")
    lines = [_row("STORED", head)]
    cells = (
        bytes_text(work.image_bytes),
        bytes_text(work.image_bytes * per_shard),
        count_text(work.shards),
        bytes_text(work.shard_bytes),
        money_text(plan.shards_month),
    )
    lines.append(_row("image shards", cells))
    price = rates.prices.gb_month / 1e9
    for teacher in work.teachers:
        for kind, series in (("base views", teacher.base), ("composites", teacher.composite)):
            if series.count:
                total = work.images * series.count * series.stored_bytes
                cells = (
                    bytes_text(series.record_bytes),
                    bytes_text(series.stored_bytes * per_shard),
                    count_text(work.shards * series.count),
                    bytes_text(total),
                    money_text(total * price),
                )
                lines.append(_row(f"{teacher.name}, {series.count} {kind}", cells))
    if work.teachers:
        total_cells = ("", "", count_text(work.target_objects), bytes_text(work.target_bytes))
        lines.append(_row("all targets", (*total_cells, money_text(plan.targets_month))))
    return lines


def _phases(work: Workload, plan: Plan) -> list[str]:
    named: list[tuple[str, Phase | None]] = [
        ("cache job", plan.cache),
        ("train, cached", plan.cached),
        ("train, online" if work.teachers else "train", plan.online),
    ]
    phases = [(name, phase) for name, phase in named if phase is not None]
    ran = [phase for _, phase in phases]
    rows = [
        ("device-hours of work", [number_text(one.busy_hours) for one in ran]),
        ("device-hours paid", [number_text(one.paid_hours) for one in ran]),
        ("wall clock of one run", [time_text(one.seconds) for one in ran]),
        ("images/s", [count_text(one.images_per_s) for one in ran]),
        ("read from the store", [bytes_text(one.read_bytes) for one in ran]),
        ("requests", [count_text(one.gets + one.puts) for one in ran]),
        ("bottleneck", [one.bottleneck for one in ran]),
        ("the next limit", [_next(one) for one in ran]),
    ]
    full = [
        ("MB/s a node", [number_text(one.node_mb_per_s) for one in ran]),
        ("requests/s", [number_text(one.requests_per_s) for one in ran]),
        ("loader cores a device", [number_text(one.cores_per_device) for one in ran]),
    ]
    lines = [_row("DONE", [name for name, _ in phases])]
    lines += [_row(name, cells) for name, cells in rows]
    lines.append("at the devices' own speed:")
    return lines + [_row(f"  {name}", cells) for name, cells in full]


def _next(phase: Phase) -> str:
    if math.isinf(phase.slack):
        return "none"
    return f"{phase.limits[1].name} x{number_text(phase.slack)}"


def _money(work: Workload, rates: Rates, plan: Plan) -> list[str]:
    prices = rates.prices
    ways = [("cached", plan.cached_cost), ("online" if work.teachers else "", plan.online_cost)]
    costs = [cost for _, cost in ways if cost is not None]
    lines = [_row(f"COST in {prices.currency}", [name for name, cost in ways if cost is not None])]
    for part in ("devices", "storage", "egress", "requests", "total"):
        lines.append(_row(part, [money_text(getattr(cost, part)) for cost in costs]))
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
    lines.append(
        f"cheaper: {plan.cheaper}{factor}; the cache pays {_from(plan.break_even_students)} "
        f"students, or {_from(plan.break_even_epochs)} epochs"
    )
    return lines


def _from(count: int | None) -> str:
    return "with no number of" if count is None else f"from {count:,}"


def _copies(work: Workload, plan: Plan) -> str:
    return (
        f"local copies: a node has {bytes_text(plan.open_copies_bytes)} open at a time, keeps "
        f"{bytes_text(work.copies_bytes)}, finds {plan.hit_share:.0%} of later epochs there"
    )


def _row(label: str, cells: Sequence[str]) -> str:
    return (label.ljust(_LABEL) + "".join(cell.rjust(_COLUMN) for cell in cells)).rstrip()


def bytes_text(number: float) -> str:
    """Bytes in decimal units: 98.3 kB."""
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if number < 999.5 or unit == "PB":
            return f"{number_text(number)} {unit}"
        number /= 1000
    raise AssertionError("unreachable")


def count_text(number: float) -> str:
    """A count: 12,740 or 1.2 million."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= size:
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
