"""What every verb of the `dpal` command does with its parsed words.

Every verb imports only what it needs, so help and `submit` are quick.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from importlib import import_module, resources
from pathlib import Path

from dpal.base import config
from dpal.base.config import load_recipe, parse_yaml, validate
from dpal.base.errors import EXIT_DONE, ConfigError
from dpal.base.inputs import Data, Storage
from dpal.base.recipe import Recipe

Handler = Callable[[argparse.Namespace], int]


def shard(arguments: argparse.Namespace) -> int:
    """Person images to shards."""
    from jobs.build_shards import build_shards

    values = {"images": arguments.source, "shards": arguments.dest, **_options(arguments.set)}
    data = validate(Data, values, "data")
    manifest = build_shards(data.images, data.shards, data, Storage())
    print(f"{manifest.num_samples} images in {len(manifest.shards)} shards: {arguments.dest}")
    return EXIT_DONE


def audit(arguments: argparse.Namespace) -> int:
    """What is wrong with a folder, or unused in it."""
    if arguments.unused:
        from jobs.unused import run_unused

        files = arguments.recipes or ()
        return run_unused(arguments.url, files, delete=arguments.delete, as_json=arguments.json)
    if arguments.recipes or arguments.delete:
        raise ConfigError("--recipes and --delete have no effect without --unused")
    from jobs.audit import run_audit

    return run_audit(arguments.url, Storage(), decode=arguments.decode, as_json=arguments.json)


def stage(module: str) -> Handler:
    """A verb that runs one stage of a recipe, given as the module that has it."""

    def handler(arguments: argparse.Namespace) -> int:
        recipe = _recipe(arguments)
        if arguments.dry_run:
            print(recipe.to_yaml(), end="")
            return EXIT_DONE
        outcome = import_module(module).run(recipe)
        told = "DPAL_SPAWNED" in os.environ or os.environ.get("RANK", "0") != "0"
        if not isinstance(outcome, list) and not told:  # one rank, or the one that spawned it
            print(f"{'skipped' if outcome.skipped else 'done'}: {outcome.detail}")
        return EXIT_DONE

    return handler


def cache(arguments: argparse.Namespace) -> int:
    """Teacher targets, or a check of those that there are."""
    if arguments.verify is None or arguments.dry_run:
        return stage("jobs.cache_features")(arguments)
    from jobs.caching.verify import run_verify

    return run_verify(_recipe(arguments), arguments.verify)


def demo(arguments: argparse.Namespace) -> int:
    """All stages of the tiny recipe."""
    arguments.recipe = str(resources.files("jobs") / "recipes" / "demo.yaml")
    return stage("jobs.run")(arguments)


def evaluate(arguments: argparse.Namespace) -> int:
    """Frozen-feature evaluation."""
    from jobs.evaluate import evaluate_model

    evaluate_model(arguments.model, arguments.task, arguments.data)
    return EXIT_DONE


def export(arguments: argparse.Namespace) -> int:
    """The student in another format."""
    from jobs import export

    folder = Path(arguments.run)
    result = export.run(load_recipe(folder / "recipe.yaml"), arguments.format)
    print(f"{'skipped' if result.skipped else 'done'}: {result.detail}")
    return EXIT_DONE


def submit(arguments: argparse.Namespace) -> int:
    """A job for a scheduler."""
    from jobs.submit import submit

    submit(
        arguments.recipe,
        tuple(arguments.overrides),
        stage=arguments.stage,
        on=arguments.on,
        dry_run=arguments.dry_run,
    )
    return EXIT_DONE


def status(arguments: argparse.Namespace) -> int:
    """Where a job stands."""
    from jobs.submit import status

    answer = status(arguments.job)
    print(f"{arguments.job}: {answer.state} ({answer.detail})")
    return EXIT_DONE


def logs(arguments: argparse.Namespace) -> int:
    """What a job printed."""
    from jobs.submit import logs

    for line in logs(arguments.job):
        print(line)
    return EXIT_DONE


def cancel(arguments: argparse.Namespace) -> int:
    """Stop a job."""
    from jobs.submit import cancel

    cancel(arguments.job)
    print(f"{arguments.job}: cancelled")
    return EXIT_DONE


def dashboards(arguments: argparse.Namespace) -> int:
    """Dashboards, scrape config and alerts."""
    from jobs.dashboards import write_dashboards

    for path in write_dashboards(Path(arguments.dest)):
        print(path)
    return EXIT_DONE


def inspect(arguments: argparse.Namespace) -> int:
    """What a weights file is."""
    from jobs.inspect_weights import inspect_weights

    return inspect_weights(Path(arguments.weights), arguments.other and Path(arguments.other))


def ablate(arguments: argparse.Namespace) -> int:
    """A grid of runs and its table."""
    from jobs import ablate

    words = tuple(arguments.overrides)
    if arguments.workers < 1:
        raise ConfigError(f"--workers {arguments.workers}: accepted is 1 and more")
    if arguments.dry_run:
        print(ablate.dry_run(arguments.grid, words))
    else:
        ablate.ablate(arguments.grid, words, arguments.workers)
    return EXIT_DONE


def diagnose(arguments: argparse.Namespace) -> int:
    """How the losses of a run pull on its student."""
    from jobs import diagnose

    if arguments.batches < 1:
        raise ConfigError(f"--batches {arguments.batches}: accepted is 1 and more")
    print(diagnose.text(diagnose.diagnose(Path(arguments.run), arguments.batches)))
    return EXIT_DONE


def parity(arguments: argparse.Namespace) -> int:
    """Cached targets against the teachers themselves, or those against themselves in fp32."""
    file = Path(arguments.json) if arguments.json else None
    if arguments.against:
        from jobs.parity_precision import run_against_fp32

        return run_against_fp32(_recipe(arguments), arguments.n, arguments.seed, file)
    from jobs.parity import run_parity

    return run_parity(_recipe(arguments), arguments.n, arguments.seed, file)


def plan(arguments: argparse.Namespace) -> int:
    """Bytes, hours and cost at any size, or a rates file of this machine."""
    words = tuple(arguments.overrides)
    if arguments.measure:
        _require_alone(arguments)
        from jobs.planning.measure import measure_file

        print(f"rates: {measure_file(arguments.recipe, words, Path(arguments.measure))}")
        return EXIT_DONE
    from jobs.plan import plan, write_json
    from jobs.planning.workload import Size

    size = Size(arguments.images, arguments.students, arguments.epochs, arguments.devices)
    planned = plan(arguments.recipe, words, arguments.rates, size)
    print(planned.text())
    if arguments.json:
        write_json(Path(arguments.json), planned)
    return EXIT_DONE


def _require_alone(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for what says how large a plan is, where none is made."""
    nothing = {"images": None, "students": 1, "epochs": None, "devices": None, "json": None}
    for name, default in nothing.items():
        if getattr(arguments, name) != default:
            raise ConfigError(f"--{name} has no effect with --measure; accepted is it with --rates")


def codecs(arguments: argparse.Namespace) -> int:
    """Bytes and error of every way to store targets."""
    from jobs import codec_report

    if arguments.images < 1:
        raise ConfigError(f"--images {arguments.images}: accepted is 1 and more")
    overrides = [word for word in arguments.words if "=" in word]
    words = [word for word in arguments.words if "=" not in word]
    recipe = load_recipe(arguments.recipe, (*overrides, *arguments.overrides))
    reports = codec_report.codecs(recipe, words, arguments.images)
    print("\n\n".join(map(codec_report.text, reports)))
    if arguments.json:
        codec_report.write_json(reports, Path(arguments.json))
    return EXIT_DONE


def explain(arguments: argparse.Namespace) -> int:
    """What a recipe key means."""
    print(config.explain(arguments.key))
    return EXIT_DONE


def _recipe(arguments: argparse.Namespace) -> Recipe:
    return load_recipe(arguments.recipe, tuple(arguments.overrides))


def _options(pairs: Sequence[str]) -> dict[str, object]:
    """`--set min_side=64` pairs as a mapping. Raises ConfigError."""
    options: dict[str, object] = {}
    for pair in pairs:
        key, separator, raw = pair.partition("=")
        if not separator:
            raise ConfigError(f"--set {pair!r} is not of the form key=value")
        options[key] = parse_yaml(raw, f"--set {pair!r}")
    return options
