"""The `dpal` command. Every verb imports only what it needs, so help and `submit` are quick."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from dpal.base.config import explain, load_recipe, parse_yaml, validate
from dpal.base.errors import EXIT_BUG, EXIT_DONE, ConfigError, DpalError, StorageError
from dpal.base.inputs import Storage
from dpal.base.recipe import Recipe

Handler = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the return value is the exit code (see `dpal.base.errors`)."""
    arguments = _parse(argv)
    handler: Handler = arguments.handler
    try:
        code = handler(arguments)
        sys.stdout.flush()
        return code
    except DpalError as error:
        return _told(arguments.verb, error)
    except KeyboardInterrupt:
        print(f"dpal {arguments.verb}: interrupted; run the same command again", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `dpal logs JOB | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except Exception as error:
        known = StorageError.of(error) if isinstance(error, OSError) else None
        if known is not None:
            return _told(arguments.verb, known)
        traceback.print_exc()
        print(f"dpal {arguments.verb}: this is a bug; please report the above", file=sys.stderr)
        return EXIT_BUG


def _told(verb: str, error: DpalError) -> int:
    print(f"dpal {verb}: {error}", file=sys.stderr)
    return error.exit_code


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, and let overrides stand behind options too (argparse alone refuses them there)."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not all("=" in word and not word.startswith("-") for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        if not hasattr(arguments, "overrides"):
            parser.error(f"{arguments.verb} takes no overrides: {' '.join(rest)}")
        arguments.overrides += rest
    return arguments


def _shard(arguments: argparse.Namespace) -> int:
    from dpal.base.inputs import Data
    from jobs.build_shards import build_shards

    values = {"images": arguments.source, "shards": arguments.dest, **_options(arguments.set)}
    data = validate(Data, values, "data")
    manifest = build_shards(data.images, data.shards, data, Storage())
    print(f"{manifest.num_samples} images in {len(manifest.shards)} shards: {arguments.dest}")
    return EXIT_DONE


def _audit(arguments: argparse.Namespace) -> int:
    if arguments.unused:
        from jobs.unused import run_unused

        files = arguments.recipes or ()
        return run_unused(arguments.url, files, delete=arguments.delete, as_json=arguments.json)
    if arguments.recipes or arguments.delete:
        raise ConfigError("--recipes and --delete have no effect without --unused")
    from jobs.audit import run_audit

    return run_audit(arguments.url, Storage(), decode=arguments.decode, as_json=arguments.json)


def _stage(module: str) -> Handler:
    def handler(arguments: argparse.Namespace) -> int:
        recipe = _recipe(arguments)
        if arguments.dry_run:
            print(recipe.to_yaml(), end="")
            return EXIT_DONE
        from importlib import import_module

        outcome = import_module(module).run(recipe)
        told = "DPAL_SPAWNED" in os.environ or os.environ.get("RANK", "0") != "0"
        if not isinstance(outcome, list) and not told:  # one rank, or the one that spawned it
            print(f"{'skipped' if outcome.skipped else 'done'}: {outcome.detail}")
        return EXIT_DONE

    return handler


def _cache(arguments: argparse.Namespace) -> int:
    if arguments.verify is None or arguments.dry_run:
        return _stage("jobs.cache_features")(arguments)
    from jobs.caching.verify import run_verify

    return run_verify(_recipe(arguments), arguments.verify)


def _demo(arguments: argparse.Namespace) -> int:
    arguments.recipe = str(resources.files("jobs") / "recipes" / "demo.yaml")
    return _stage("jobs.run")(arguments)


def _evaluate(arguments: argparse.Namespace) -> int:
    from jobs.evaluate import evaluate_model

    evaluate_model(arguments.model, arguments.task, arguments.data)
    return EXIT_DONE


def _export(arguments: argparse.Namespace) -> int:
    from jobs import export

    folder = Path(arguments.run)
    result = export.run(load_recipe(folder / "recipe.yaml"), arguments.format)
    print(f"{'skipped' if result.skipped else 'done'}: {result.detail}")
    return EXIT_DONE


def _submit(arguments: argparse.Namespace) -> int:
    from jobs.submit import submit

    submit(
        arguments.recipe,
        tuple(arguments.overrides),
        stage=arguments.stage,
        on=arguments.on,
        dry_run=arguments.dry_run,
    )
    return EXIT_DONE


def _status(arguments: argparse.Namespace) -> int:
    from jobs.submit import status

    answer = status(arguments.job)
    print(f"{arguments.job}: {answer.state} ({answer.detail})")
    return EXIT_DONE


def _logs(arguments: argparse.Namespace) -> int:
    from jobs.submit import logs

    for line in logs(arguments.job):
        print(line)
    return EXIT_DONE


def _cancel(arguments: argparse.Namespace) -> int:
    from jobs.submit import cancel

    cancel(arguments.job)
    print(f"{arguments.job}: cancelled")
    return EXIT_DONE


def _dashboards(arguments: argparse.Namespace) -> int:
    from jobs.dashboards import write_dashboards

    for path in write_dashboards(Path(arguments.dest)):
        print(path)
    return EXIT_DONE


def _inspect(arguments: argparse.Namespace) -> int:
    from jobs.inspect_weights import inspect_weights

    return inspect_weights(Path(arguments.weights), arguments.other and Path(arguments.other))


def _ablate(arguments: argparse.Namespace) -> int:
    from jobs import ablate

    words = tuple(arguments.overrides)
    if arguments.workers < 1:
        raise ConfigError(f"--workers {arguments.workers}: accepted is 1 and more")
    if arguments.dry_run:
        print(ablate.dry_run(arguments.grid, words))
    else:
        ablate.ablate(arguments.grid, words, arguments.workers)
    return EXIT_DONE


def _diagnose(arguments: argparse.Namespace) -> int:
    from jobs import diagnose

    if arguments.batches < 1:
        raise ConfigError(f"--batches {arguments.batches}: accepted is 1 and more")
    print(diagnose.text(diagnose.diagnose(Path(arguments.run), arguments.batches)))
    return EXIT_DONE


def _parity(arguments: argparse.Namespace) -> int:
    from jobs.parity import run_parity

    file = Path(arguments.json) if arguments.json else None
    return run_parity(_recipe(arguments), arguments.n, arguments.seed, file)


def _plan(arguments: argparse.Namespace) -> int:
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


def _count(text: str) -> int:
    """A whole number, also as 1e9; argparse says so if it is none."""
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not number.is_integer():  # nor is infinity
        raise argparse.ArgumentTypeError(f"{text!r}: accepted are whole numbers, also as 1e9")
    return int(number)


def _codecs(arguments: argparse.Namespace) -> int:
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


def _explain(arguments: argparse.Namespace) -> int:
    print(explain(arguments.key))
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dpal",
        description="Turn person images and frozen teachers into small human-centric backbones.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, handler: Handler, text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(handler=handler)
        return sub

    def recipe_verb(name: str, handler: Handler, text: str) -> argparse.ArgumentParser:
        sub = verb(name, handler, text)
        sub.add_argument("recipe", help="recipe file")
        _add_overrides(sub)
        return sub

    shard = verb("shard", _shard, "person images -> WebDataset shards + manifest")
    shard.add_argument("source", nargs="+", help="folders, tables, annotations or tars; or URLs")
    shard.add_argument("dest", help="folder or URL for the shards")
    shard.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="data.KEY")
    audit = verb("audit", _audit, "verify shards, target caches and folders of tars")
    audit.add_argument("url", help="folder or URL; what lies in it is told by itself")
    audit.add_argument("--decode", action="store_true", help="decode every image, too")
    audit.add_argument("--json", action="store_true", help="print one JSON object")
    audit.add_argument("--unused", action="store_true", help="target caches that no recipe needs")
    audit.add_argument("--recipes", nargs="+", metavar="RECIPE", help="whose targets are to stay")
    audit.add_argument("--delete", action="store_true", help="delete what is unused")
    cache = recipe_verb("cache", _cache, "teacher targets for every pinned view")
    cache.add_argument("--verify", type=int, metavar="N", help="recompute N records, and compare")
    recipe_verb("train", _stage("jobs.train"), "train the student; resumes by itself")
    recipe_verb("preview", _stage("jobs.preview"), "pictures of views, masks and features")
    recipe_verb("report", _stage("jobs.report"), "one self-contained page about the run")
    recipe_verb("run", _stage("jobs.run"), "all stages; skips what is done")
    parity = verb("parity", _parity, "compare cached targets with the teachers themselves")
    parity.add_argument("recipe", help="recipe file")
    parity.add_argument("-n", type=int, default=32, help="samples (default 32)")
    parity.add_argument("--seed", type=int, default=0, help="another one draws other samples")
    parity.add_argument("--json", metavar="FILE", help="write the figures for machines too")
    parity.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe overrides")
    ablate = verb("ablate", _ablate, "a grid of runs and one table; skips what is done")
    ablate.add_argument("grid", help="grid file")
    ablate.add_argument("--workers", type=int, default=1, help="runs at once (default 1)")
    _add_overrides(ablate)
    _add_overrides(verb("demo", _demo, "run the tiny recipe on embedded data"))

    evaluate = verb("evaluate", _evaluate, "frozen-feature evaluation of a run or an export")
    evaluate.add_argument("model", help="run folder or export folder")
    evaluate.add_argument("--task", required=True, choices=("reid", "parsing"))
    evaluate.add_argument("--data", required=True, help="folder with labels.csv")
    diagnose = verb("diagnose", _diagnose, "how the losses of a run pull on its student")
    diagnose.add_argument("run", help="run folder")
    diagnose.add_argument("--batches", type=int, default=4, help="batches looked at (default 4)")
    export = verb("export", _export, "write the student for timm or ONNX, parity-checked")
    export.add_argument("run", help="run folder")
    export.add_argument("--format", choices=("timm", "onnx"), default="timm")

    from cluster.launcher import SCHEDULERS

    submit = verb("submit", _submit, "render, show and submit a job")
    submit.add_argument("recipe", help="recipe file")
    submit.add_argument("--stage", required=True, choices=("cache", "train", "run"))
    submit.add_argument("--on", required=True, choices=SCHEDULERS)
    _add_overrides(submit)
    for name, handler, text in (
        ("status", _status, "where a job stands"),
        ("logs", _logs, "what a job printed"),
        ("cancel", _cancel, "stop a job"),
    ):
        verb(name, handler, text).add_argument("job", help="job id, as `submit` printed it")
    verb("dashboards", _dashboards, "write dashboards, scrape config and alerts").add_argument(
        "dest"
    )
    inspect = verb("inspect", _inspect, "what a weights file is, and which teacher it fits")
    inspect.add_argument("weights", help="a .safetensors, torch or .onnx file")
    inspect.add_argument("other", nargs="?", help="a second file, to compare the last block with")
    plan = verb("plan", _plan, "bytes, hours, cost and bottleneck at any size")
    plan.add_argument("recipe", help="recipe file")
    plan.add_argument("--images", type=_count, help="images (default: those that there are)")
    plan.add_argument("--students", type=_count, default=1, help="runs on one cache (default 1)")
    plan.add_argument("--epochs", type=float, help="default: train.duration")
    plan.add_argument("--devices", type=_count, help="default: those of one node")
    what = plan.add_mutually_exclusive_group(required=True)
    what.add_argument("--rates", help="rates file; its numbers as rates.<key>=<value>")
    what.add_argument("--measure", metavar="FILE", help="measure this machine, write a rates file")
    plan.add_argument("--json", metavar="FILE", help="write the plan for machines too")
    plan.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of recipe or rates")
    codecs = verb("codecs", _codecs, "bytes and measured error of every way to store targets")
    codecs.add_argument("recipe", help="recipe file")
    codecs.add_argument("words", nargs="*", metavar="CODEC", help="codecs; KEY=VALUE overrides")
    codecs.add_argument("--images", type=int, default=256, help="images looked at (default 256)")
    codecs.add_argument("--json", metavar="FILE", help="write the figures here too")
    codecs.set_defaults(overrides=[])
    verb("explain", _explain, "what a recipe key means").add_argument("key")
    return parser


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe overrides")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and stop")


if __name__ == "__main__":
    sys.exit(main())
