"""What a plan is reckoned with: measured rates, the machines, and prices, in one YAML file.

The unit of a number is the end of its name. `dpal plan RECIPE --measure FILE` writes such a file;
any number can be given by hand, there or as `rates.node.cores=96` on the command line.
"""

import difflib
import io
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field, ValidationError

from dpal.base.config import parse_yaml
from dpal.base.errors import ConfigError, StorageError
from dpal.base.inputs import Views
from dpal.base.section import Section

PREFIX = "rates."
FORMAT = 1


class Origin(Section):
    """Where the rates come from, and for which work they hold."""

    date: str = Field(description="day of the measurement, YYYY-MM-DD")
    machine: str = Field(description="processor, and accelerator if there is one")
    device: str = Field(description="what 'a device' means in this file")
    recipe: str = Field(description="recipe they were measured with")
    views: str = Field(description="size of the base view, e.g. 256x128")
    student: str = Field(description="student.name")
    method: str = Field(description="method.kind")
    codec: str = Field(description="cache.codec")
    pinned: str = Field("", description="pinned base views and composites, e.g. 4 + 1")
    images: str = Field("", description="which images were looked at")


class TeacherRate(Section):
    """One teacher on one device."""

    name: str = Field(description="what it is called in the plan")
    width: int = Field(ge=1, description="channels of a token")
    base_images_per_s: float = Field(gt=0, description="base views")
    composite_images_per_s: float = Field(gt=0, description="composites")


class Loading(Section):
    """What one CPU core does for the loader and for the cache job."""

    train_samples_per_s_core: float = Field(
        gt=0, description="samples decoded and rendered for a training step: all its views"
    )
    cache_samples_per_s_core: float = Field(
        gt=0, description="samples decoded and rendered for the teacher: all pinned views"
    )
    target_read_gb_per_s_core: float = Field(gt=0, description="records read and checked")
    target_write_gb_per_s_core: float = Field(gt=0, description="records encoded and packed")


class Store(Section):
    """The object store, as one node meets it."""

    read_mb_per_s: float = Field(gt=0, description="whole objects, one node")
    write_mb_per_s: float = Field(gt=0, description="whole objects, one node")
    requests_per_s: float = Field(
        5500.0, gt=0, description="requests the store serves to all nodes together"
    )


class Node(Section):
    """One machine."""

    devices: int = Field(1, ge=1, description="devices in it")
    cores: int = Field(1, ge=1, description="CPU cores in it")
    network_mb_per_s: float = Field(1e9, gt=0, description="what its network card carries")
    teacher_cores: int = Field(
        0, ge=0, description="cores that a device takes while the teacher runs; 0: an accelerator"
    )
    student_cores: int = Field(
        0, ge=0, description="cores that a device takes while the student trains"
    )


class Start(Section):
    """Seconds before the first image: imports, Ray, DeepSpeed."""

    cache_s: float = Field(20.0, ge=0, description="of a cache job")
    train_s: float = Field(20.0, ge=0, description="of a training run")


class Prices(Section):
    """What things cost; the defaults are of the order of public list prices."""

    currency: str = Field("USD", description="a word for the table")
    device_hour: float = Field(2.5, ge=0, description="a device and its share of the node")
    gb_month: float = Field(0.023, ge=0, description="storage of 1e9 bytes for a month")
    gb_egress: float = Field(0.0, ge=0, description="1e9 bytes read from the store; 0 in a region")
    thousand_gets: float = Field(0.0004, ge=0, description="1,000 read requests")
    thousand_puts: float = Field(0.005, ge=0, description="1,000 write requests")
    months: float = Field(1.0, ge=0, description="how long shards and targets are kept")


class Rates(Section):
    """Everything that a plan needs to know besides the recipe."""

    format: int = Field(FORMAT, ge=FORMAT, le=FORMAT, description="of this file")
    measured: Origin
    image_bytes: float = Field(gt=0, description="mean size of an encoded image")
    student_samples_per_s: float = Field(
        gt=0, description="samples that one device trains with cached targets"
    )
    teachers: Annotated[tuple[TeacherRate, ...], Field(strict=False)] = ()
    loading: Loading
    store: Store
    node: Node = Node()
    start: Start = Start()
    prices: Prices = Prices()


def pinned_views(views: Views) -> str:
    """As `Origin.pinned` has it."""
    return f"{views.count} + {views.composites}"


def read_rates(path: Path, words: tuple[str, ...] = ()) -> Rates:
    """The rates of a file, with `rates.<key>=<value>` words in place of its numbers.

    Raises:
        ConfigError: naming file, key and value.
        StorageError: when the file cannot be read.
    """
    if path.is_dir():
        raise ConfigError(f"rates file {str(path)!r} is a folder; accepted is a YAML file")
    if not path.exists():
        raise ConfigError(
            f"rates file {str(path)!r} does not exist; `dpal plan RECIPE --measure {path}` writes "
            "one"
        )
    try:
        values = parse_yaml(path.read_text(), str(path))
    except OSError as error:
        raise StorageError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"rates file {str(path)!r} is not a text file") from None
    if not isinstance(values, dict):
        raise ConfigError(f"rates file {str(path)!r} is empty or not a mapping of sections")
    for word in words:
        _override(values, word)
    try:
        return Rates.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"rates file {str(path)!r}: {_sentence(error)}") from None


def write_rates(path: Path, rates: Rates) -> None:
    """Write rates as YAML, every number with its meaning behind it. Raises StorageError."""
    text = io.StringIO()
    text.write("# Rates for `dpal plan`: units are in the names, a device is `measured.device`.\n")
    _write(text, rates, "")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.getvalue())
    except OSError as error:
        raise StorageError(f"cannot write {str(path)!r}: {error.strerror}") from None


def split_words(words: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Words for the recipe, and words for the rates."""
    mine = tuple(word for word in words if word.startswith(PREFIX))
    return tuple(word for word in words if not word.startswith(PREFIX)), mine


def _write(text: io.StringIO, section: BaseModel, indent: str) -> None:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            text.write(f"{indent}{name}:\n")
            _write(text, value, indent + "  ")
        elif isinstance(value, tuple):
            text.write(f"{indent}{name}:\n" if value else f"{indent}{name}: []\n")
            for one in value:
                plain = {key: _rounded(number) for key, number in one.model_dump().items()}
                text.write(f"{indent}  - {_flow(plain)}\n")
        else:
            meaning = f"  # {field.description}" if field.description else ""
            text.write(f"{indent}{name}: {_flow(_rounded(value))}{meaning}\n")


def _rounded(value: Any) -> Any:
    """Four significant digits are more than a measurement is worth."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _flow(value: Any) -> str:
    dumped = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
    return dumped.removesuffix("\n").removesuffix("\n...")


def _override(values: dict[str, Any], word: str) -> None:
    key, separator, raw = word.removeprefix(PREFIX).partition("=")
    if not separator or not key:
        raise ConfigError(f"{word!r} is not of the form rates.key=value")
    *parents, last = key.split(".")
    node: Any = values
    for parent in parents:
        if isinstance(node, list) and parent.isdigit() and int(parent) < len(node):
            node = node[int(parent)]
        elif isinstance(node, dict):
            node = node.setdefault(parent, {})
        if not isinstance(node, dict | list):
            raise ConfigError(f"{word!r}: {parent!r} is not a section of rates")
    if not isinstance(node, dict):
        raise ConfigError(f"{word!r}: accepted is rates.teachers.0.<key>=value")
    node[last] = parse_yaml(raw, repr(word))


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        names = _keys(Rates, "")
        close = difflib.get_close_matches(key, names, n=1, cutoff=0.4)
        hint = f"; the nearest valid name is {close[0]!r}" if close else ""
        return f"unknown key {key!r}{hint}"
    if first["type"] == "missing":
        return f"key {key!r} is required"
    shown = first["input"] if isinstance(first["input"], str | int | float | bool) else "..."
    return f"{key}={shown}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _keys(model: type[BaseModel], prefix: str) -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names += _keys(inner, f"{prefix}{name}.")
        names.append(f"{prefix}{name}")
    return names
