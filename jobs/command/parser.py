"""The words that the `dpal` command understands, in the order in which its help names them."""

import argparse
from collections.abc import Sequence

from cluster.launcher import SCHEDULERS
from jobs.command import verbs


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
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


class _Words:
    """Adds verbs to a parser."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(self, name: str, handler: verbs.Handler, text: str) -> argparse.ArgumentParser:
        sub = self._verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(handler=handler)
        return sub

    def recipe_verb(self, name: str, handler: verbs.Handler, text: str) -> argparse.ArgumentParser:
        sub = self.verb(name, handler, text)
        sub.add_argument("recipe", help="recipe file")
        _add_overrides(sub)
        return sub


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dpal",
        description="Turn person images and frozen teachers into small human-centric backbones.",
    )
    words = _Words(parser)
    _add_data(words)
    _add_stages(words)
    _add_uses_of_a_run(words)
    _add_cluster(words)
    _add_advice(words)
    return parser


def _add_data(words: _Words) -> None:
    shard = words.verb("shard", verbs.shard, "person images -> WebDataset shards + manifest")
    shard.add_argument("source", nargs="+", help="folders, tables, annotations or tars; or URLs")
    shard.add_argument("dest", help="folder or URL for the shards")
    shard.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="data.KEY")
    audit = words.verb("audit", verbs.audit, "verify shards, target caches and folders of tars")
    audit.add_argument("url", help="folder or URL; what lies in it is told by itself")
    audit.add_argument("--decode", action="store_true", help="decode every image, too")
    audit.add_argument("--json", action="store_true", help="print one JSON object")
    audit.add_argument("--unused", action="store_true", help="target caches that no recipe needs")
    audit.add_argument("--recipes", nargs="+", metavar="RECIPE", help="whose targets are to stay")
    audit.add_argument("--delete", action="store_true", help="delete what is unused")
    cache = words.recipe_verb("cache", verbs.cache, "teacher targets for every pinned view")
    cache.add_argument("--verify", type=int, metavar="N", help="recompute N records, and compare")


def _add_stages(words: _Words) -> None:
    words.recipe_verb("train", verbs.stage("jobs.train"), "train the student; resumes by itself")
    words.recipe_verb(
        "preview", verbs.stage("jobs.preview"), "pictures of views, masks and features"
    )
    words.recipe_verb("report", verbs.stage("jobs.report"), "one self-contained page about the run")
    words.recipe_verb("run", verbs.stage("jobs.run"), "all stages; skips what is done")
    parity = words.verb(
        "parity", verbs.parity, "compare cached targets with the teachers themselves"
    )
    parity.add_argument("recipe", help="recipe file")
    parity.add_argument("-n", type=int, default=32, help="samples (default 32)")
    parity.add_argument("--seed", type=int, default=0, help="another one draws other samples")
    parity.add_argument(
        "--against",
        choices=("fp32",),
        help="compare teachers in bf16 or through ONNX Runtime with themselves in fp32 instead",
    )
    parity.add_argument("--json", metavar="FILE", help="write the figures for machines too")
    parity.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe overrides")
    ablate = words.verb("ablate", verbs.ablate, "a grid of runs and one table; skips what is done")
    ablate.add_argument("grid", help="grid file")
    ablate.add_argument("--workers", type=int, default=1, help="runs at once (default 1)")
    _add_overrides(ablate)
    _add_overrides(words.verb("demo", verbs.demo, "run the tiny recipe on embedded data"))


def _add_uses_of_a_run(words: _Words) -> None:
    evaluate = words.verb(
        "evaluate", verbs.evaluate, "frozen-feature evaluation of a run or an export"
    )
    evaluate.add_argument("model", help="run folder or export folder")
    evaluate.add_argument("--task", required=True, choices=("reid", "parsing"))
    evaluate.add_argument("--data", required=True, help="folder with labels.csv")
    diagnose = words.verb("diagnose", verbs.diagnose, "how the losses of a run pull on its student")
    diagnose.add_argument("run", help="run folder")
    diagnose.add_argument("--batches", type=int, default=4, help="batches looked at (default 4)")
    export = words.verb(
        "export", verbs.export, "write the student for timm or ONNX, parity-checked"
    )
    export.add_argument("run", help="run folder")
    export.add_argument("--format", choices=("timm", "onnx"), default="timm")


def _add_cluster(words: _Words) -> None:
    submit = words.verb("submit", verbs.submit, "render, show and submit a job")
    submit.add_argument("recipe", help="recipe file")
    submit.add_argument("--stage", required=True, choices=("cache", "train", "run"))
    submit.add_argument("--on", required=True, choices=SCHEDULERS)
    _add_overrides(submit)
    for name, handler, text in (
        ("status", verbs.status, "where a job stands"),
        ("logs", verbs.logs, "what a job printed"),
        ("cancel", verbs.cancel, "stop a job"),
    ):
        words.verb(name, handler, text).add_argument("job", help="job id, as `submit` printed it")
    words.verb(
        "dashboards", verbs.dashboards, "write dashboards, scrape config and alerts"
    ).add_argument("dest")


def _add_advice(words: _Words) -> None:
    inspect = words.verb(
        "inspect", verbs.inspect, "what a weights file is, and which teacher it fits"
    )
    inspect.add_argument("weights", help="a .safetensors, torch or .onnx file")
    inspect.add_argument("other", nargs="?", help="a second file, to compare the last block with")
    plan = words.verb("plan", verbs.plan, "bytes, hours, cost and bottleneck at any size")
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
    codecs = words.verb(
        "codecs", verbs.codecs, "bytes and measured error of every way to store targets"
    )
    codecs.add_argument("recipe", help="recipe file")
    codecs.add_argument("words", nargs="*", metavar="CODEC", help="codecs; KEY=VALUE overrides")
    codecs.add_argument("--images", type=int, default=256, help="images looked at (default 256)")
    codecs.add_argument("--json", metavar="FILE", help="write the figures here too")
    codecs.set_defaults(overrides=[])
    words.verb("explain", verbs.explain, "what a recipe key means").add_argument("key")


def _count(text: str) -> int:
    """A whole number, also as 1e9; argparse says so if it is none."""
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not number.is_integer():  # nor is infinity
        raise argparse.ArgumentTypeError(f"{text!r}: accepted are whole numbers, also as 1e9")
    return int(number)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe overrides")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
