"""What is wrong, or soon will be, with a recipe at a planned size: one sentence each."""

from dpal.base.recipe import Recipe
from dpal.base.teachers import teacher_name
from jobs.planning.model import GB, MB, num_nodes
from jobs.planning.rates import Rates
from jobs.planning.types import Plan, Workload

SMALL, LARGE = 4e6, 2e9  # bytes of an object; below, requests cost more than bytes
ADVISED = 256e6
SATURATED = 0.8


def advice(recipe: Recipe, work: Workload, rates: Rates, plan: Plan) -> tuple[str, ...]:
    """Warnings, the most expensive first."""
    found = [
        *_ranks(recipe, work),
        *_objects(work),
        *_copies(work, plan),
        *_network(work, rates, plan),
        *_origin(recipe, rates),
    ]
    return tuple(found)


def _ranks(recipe: Recipe, work: Workload) -> list[str]:
    train, found = recipe.train, []
    if work.lanes % work.devices:
        found.append(
            f"train.lanes={train.lanes} with train.global_batch={train.global_batch} makes "
            f"{work.lanes} lanes, which {work.devices} devices cannot share: give both a multiple "
            f"of {work.devices}"
        )
    if train.global_batch % (train.micro_batch * work.devices):
        found.append(
            f"train.global_batch={train.global_batch} is not a multiple of train.micro_batch="
            f"{train.micro_batch} times {work.devices} devices"
        )
    if work.shards < work.devices:
        found.append(
            f"{work.shards} shards for {work.devices} devices: the others wait while targets are "
            f"cached; data.samples_per_shard={max(1, work.images // work.devices)} gives each one"
        )
    return found


def _objects(work: Workload) -> list[str]:
    per_shard = min(work.images, work.samples_per_shard)
    sizes = {"image shards": work.image_bytes}
    for teacher in work.teachers:
        for kind, series in (("base views", teacher.base), ("composites", teacher.composite)):
            if series.count:
                sizes[f"targets of {kind} of {teacher.name}"] = float(series.stored_bytes)
    small, large = min(sizes, key=lambda n: sizes[n]), max(sizes, key=lambda n: sizes[n])
    advised = _power_of_two(ADVISED / sizes[large])
    found = []
    if sizes[large] * per_shard > LARGE:
        found.append(
            f"{large} are objects of {sizes[large] * per_shard / GB:.1f} GB, which are fetched, "
            f"retried and held in memory whole: data.samples_per_shard={advised} makes "
            f"{sizes[large] * advised / MB:.0f} MB of them"
        )
    elif (
        (work.remote_shards or work.remote_targets)
        and sizes[small] * per_shard < SMALL
        and advised > per_shard
        and work.images > per_shard
    ):
        found.append(
            f"{small} are objects of {sizes[small] * per_shard / MB:.1f} MB, so requests cost more "
            f"than bytes: data.samples_per_shard={advised} makes "
            f"{sizes[small] * advised / MB:.0f} MB of them"
        )
    return found


def _copies(work: Workload, plan: Plan) -> list[str]:
    if not (work.remote_shards or work.remote_targets):
        return []
    if plan.open_copies_bytes <= work.copies_bytes:
        return []
    where = "memory" if not work.copies_bytes else "local copies"
    return [
        f"storage.copies_gb={work.copies_bytes / GB:g}: a node has shards and targets of "
        f"{plan.open_copies_bytes / GB:.1f} GB open at a time ({where}); raise it, or lower "
        "train.lanes or train.window"
    ]


def _network(work: Workload, rates: Rates, plan: Plan) -> list[str]:
    found = []
    limit = min(rates.store.read_mb_per_s, rates.node.network_mb_per_s)
    phases = {"the cache job": plan.cache, "cached training": plan.cached}
    for name, phase in {**phases, "online training": plan.online}.items():
        if phase is not None and phase.node_mb_per_s > SATURATED * limit:
            found.append(
                f"{name} would move {phase.node_mb_per_s:,.0f} MB/s a node at its devices' speed; "
                f"a node reads {limit:,.0f} MB/s"
            )
    if num_nodes(work, rates) > 1 and not work.remote_shards:
        found.append(
            "data.shards is a local folder: every node needs a file system that holds it, of the "
            "speed that the rates state"
        )
    return found


def _origin(recipe: Recipe, rates: Rates) -> list[str]:
    """In what the recipe is not the one that the rates were measured with."""
    measured = rates.measured
    pairs = {
        "views": (f"{recipe.views.height}x{recipe.views.width}", measured.views),
        "student.name": (recipe.student.name, measured.student),
        "method.kind": (recipe.method.kind, measured.method),
        "cache.codec": (recipe.cache.codec, measured.codec),
    }
    for number, (spec, rate) in enumerate(
        zip(recipe.aligned_teachers, rates.teachers, strict=True)
    ):
        pairs[f"teacher {number}"] = (teacher_name(spec), rate.name)
    differing = [f"{key} {mine} ({then})" for key, (mine, then) in pairs.items() if mine != then]
    if not differing:
        return []
    return [f"the rates were measured with other settings: {', '.join(differing)}"]


def _power_of_two(number: float) -> int:
    """The largest power of two up to `number`, at least 1."""
    return int(2 ** (max(1, int(number)).bit_length() - 1))
