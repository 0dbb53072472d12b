"""What is wrong, or soon will be, with a recipe at a planned size, and what runs it so."""

from dpal.base.recipe import Recipe
from dpal.base.teachers import teacher_name
from jobs.planning.model import GB, MB, num_nodes
from jobs.planning.rates import Rates, pinned_views
from jobs.planning.types import Plan, Workload

SMALL, LARGE = 4e6, 2e9  # bytes of an object; below, requests cost more than bytes
ADVISED = 256e6
MOST_SAMPLES = 131_072  # that `data.samples_per_shard` accepts
FEWEST = 64  # images that are worth a shard
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


def words_for(recipe: Recipe, work: Workload, rates: Rates) -> tuple[str, ...]:
    """Overrides with which the recipe uses the planned devices; none where it does, or cannot."""
    nodes = num_nodes(work, rates)
    each, rest = divmod(work.devices, nodes)
    if rest:
        return ()
    pairs = [("train.processes", recipe.train.processes, each)]
    pairs += [("job.nodes", recipe.job.nodes, nodes)]
    if rates.node.student_cores == 0:
        pairs += [("job.gpus_per_node", recipe.job.gpus_per_node, each)]
    if work.teachers:
        pairs += [("cache.actors", recipe.cache.actors, work.devices)]
    if work.teachers and rates.node.teacher_cores == 0 and not recipe.cache.gpus_per_actor:
        pairs += [("cache.gpus_per_actor", 0, 1)]
    return tuple(f"{key}={wanted}" for key, mine, wanted in pairs if mine != wanted)


def _ranks(recipe: Recipe, work: Workload) -> list[str]:
    train, found = recipe.train, []
    if work.lanes % work.devices:
        found.append(
            f"train.lanes={train.lanes} with train.global_batch={train.global_batch} makes "
            f"{work.lanes} lanes, which {work.devices} devices cannot share: give both a multiple "
            f"of {work.devices}"
        )
    together = train.micro_batch * work.devices
    if train.global_batch % together:
        found.append(
            f"train.global_batch={train.global_batch} is not a multiple of train.micro_batch="
            f"{train.micro_batch} times {work.devices} devices; "
            f"{-(-train.global_batch // together) * together} is"
        )
    if work.teachers and work.shards < work.devices:
        each = work.images // work.devices
        mended = (
            f"data.samples_per_shard={each} gives each one"
            if each >= FEWEST
            else "that job is as fast on fewer"
        )
        found.append(
            f"{work.shards:,} shard{'s' * (work.shards > 1)} for {work.devices:,} devices: the "
            f"others wait while targets are cached; {mended}"
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
    each = max(1, work.images // work.devices)  # so that every device has a shard to cache
    advised = _power_of_two(min(ADVISED / sizes[large], MOST_SAMPLES, each))
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
    """A node's reading and writing at its devices' speed, where that is more than it can."""
    network = rates.node.network_mb_per_s
    reads = ("read", "reads", min(rates.store.read_mb_per_s, network))
    writes = ("write", "writes", min(rates.store.write_mb_per_s, network))
    flows = []
    if plan.cache is not None:
        read, written = len(work.teachers) * work.image_bytes, work.target_image_bytes
        share = read / (read + written)
        flows.append(("the cache job", plan.cache.node_mb_per_s * share, reads))
        flows.append(("the cache job", plan.cache.node_mb_per_s * (1 - share), writes))
    if plan.cached is not None:
        flows.append(("cached training", plan.cached.node_mb_per_s, reads))
    flows.append(("online training", plan.online.node_mb_per_s, reads))
    found = [
        f"{name} would {verb} {amount:,.0f} MB/s a node at its devices' speed, where a node "
        f"{verbs} {limit:,.0f} MB/s"
        for name, amount, (verb, verbs, limit) in flows
        if amount > SATURATED * limit
    ]
    local = ["data.shards"] * (not work.remote_shards)
    local += ["cache.url"] * (not work.remote_targets and bool(work.teachers))
    if num_nodes(work, rates) > 1 and local:
        found.append(
            f"{' and '.join(local)}: local folders, so every node needs a file system that holds "
            "them, of the speed that the rates state"
        )
    return found


def _origin(recipe: Recipe, rates: Rates) -> list[str]:
    """In what the recipe is not the one that the rates were measured with."""
    measured, views = rates.measured, recipe.views
    pairs = {
        "views": (f"{views.height}x{views.width}", measured.views),
        "pinned views": (pinned_views(views), measured.pinned or pinned_views(views)),
        "student.name": (recipe.student.name, measured.student),
        "method.kind": (recipe.method.kind, measured.method),
        "cache.codec": (recipe.cache.codec, measured.codec),
    }
    others = []
    for number, (spec, rate) in enumerate(
        zip(recipe.aligned_teachers, rates.teachers, strict=True)
    ):
        pairs[f"teacher {number}"] = (teacher_name(spec), rate.name)
        if rate.name != teacher_name(spec):
            others.append(f"rates.teachers.{number}.width={rate.width}")
    differing = [f"{key} {mine} ({then})" for key, (mine, then) in pairs.items() if mine != then]
    if not differing:
        return []
    bytes_of = f"; bytes are those of {', '.join(others)}" if others else ""
    return [
        f"the rates were measured with other settings: {', '.join(differing)}{bytes_of}; "
        "`dpal plan RECIPE --measure FILE` measures this recipe"
    ]


def _power_of_two(number: float) -> int:
    """The largest power of two up to `number`, at least 1."""
    return int(2 ** (max(1, int(number)).bit_length() - 1))
