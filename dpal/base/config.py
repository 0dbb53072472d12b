"""Reading recipes: YAML files and `key=value` overrides in, a `Recipe` or one sentence out.

Refused is what is unknown, of the wrong type, out of range, or without effect; the sentence names
the key, the value, what is accepted, and the nearest valid name.
"""

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dpal.base.errors import ConfigError
from dpal.base.inputs import Data, Storage
from dpal.base.methods import Method
from dpal.base.recipe import Cache, Recipe
from dpal.base.teachers import Teacher

Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its surprises: `1e-3` is a number, `on` and `yes` are words."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rx) for tag, rx in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$"), list("tf"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML `text`; `source` names it in the error. Raises ConfigError."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{where}: not valid YAML") from None


def load_recipe(path: str | Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file and apply `key=value` overrides such as `train.lr=1e-3`.

    Raises:
        ConfigError: with the key, the value, what is accepted, and the nearest valid name.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"recipe {str(path)!r} does not exist")
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        raise ConfigError(f"recipe {str(path)!r} is not a text file") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {str(path)!r} is empty or not a mapping of sections")
    for override in overrides:
        _apply_override(values, override)
    return resolve_recipe(values)


def resolve_recipe(values: dict[str, Any]) -> Recipe:
    """Validate a mapping as a recipe and fill `{run}` in its paths. Raises ConfigError."""
    if isinstance(values.get("name"), str):
        run = str(Path(str(values.get("output", "runs"))) / values["name"])
        values = _fill(_with_path_defaults(values), run)
    return validate(Recipe, values)


def validate(model: type[Model], values: dict[str, Any], section: str = "") -> Model:
    """`values` as a recipe or as one of its sections. Raises ConfigError."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_sentence(error, section)) from None


def explain(key: str) -> str:
    """What a recipe key means, its type and default. Raises ConfigError for an unknown key."""
    model: type[BaseModel] = Recipe
    parts = key.split(".")
    for depth, part in enumerate(parts):
        fields: dict[str, Any] = {}
        variants = _variants(model)
        for candidate in reversed(variants):  # the first that has a key says what it means
            fields.update(candidate.model_fields)
        if part not in fields:
            raise ConfigError(f"no recipe key {key!r}{_nearest(part, fields, parts[: depth + 1])}")
        field = fields[part]
        if depth == len(parts) - 1:
            return f"{key}: {_meaning(key, field)}"
        model = field.annotation
    raise AssertionError("unreachable")


def _meaning(key: str, field: FieldInfo) -> str:
    """Text and default of a key."""
    section = "teacher" if "teacher" in key else key.partition(".")[0]
    if section in ("method", "teacher") and key.removesuffix(".kind") in (section, "more_teachers"):
        default = "; default dpal" if section == "method" else ""
        several = "a list of teachers beside `teacher`, each " if key == "more_teachers" else ""
        return f"{several}chosen by the word `kind`: {_words_of(section)}{default}"
    default = "required" if field.is_required() else f"default {field.default!r}"
    text = field.description or (field.annotation.__doc__ or "").strip()
    return f"{text} ({default})"


def _variants(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in get_args(annotation) for model in _variants(arg)]


def _kinds() -> set[str]:
    """Words that choose a class of a section; pydantic puts them into the path of an error."""
    return {*_words("teacher"), *_words("method")}


def _kinds_of(section: type[BaseModel]) -> tuple[str, ...]:
    """The kinds that one class of a section serves."""
    field = section.model_fields.get("kind")
    return get_args(field.annotation) if field is not None else ()


def _with_path_defaults(values: dict[str, Any]) -> dict[str, Any]:
    filled = dict(values)
    sections = (("data", "shards", Data), ("cache", "url", Cache), ("storage", "copies", Storage))
    for section, key, model in sections:
        current = filled.get(section, {})
        if isinstance(current, dict):
            filled[section] = {key: model.model_fields[key].default, **current}
    return filled


def _fill(value: Any, run: str) -> Any:
    if isinstance(value, str):
        return value.replace("{run}", run)
    if isinstance(value, dict):
        return {key: _fill(item, run) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(item, run) for item in value]
    return value


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, raw = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value")
    *parents, last = key.split(".")
    node = values
    for parent in parents:
        if parent == "method" and isinstance(node.get(parent), str):
            node[parent] = {"kind": node[parent]}  # `method: proteus` is short for this
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is not a section")
    # Nothing behind the equals sign is the empty word, not YAML's null: `teacher.weights=`.
    node[last] = parse_yaml(raw, f"override {override!r}") if raw else ""


def _nearest(name: str, valid: Any, parts: list[str]) -> str:
    """What may stand instead of `name`, the last of `parts`."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    if close:
        return f"; the nearest valid name is {'.'.join([*parts[:-1], close[0]])!r}"
    return f"; valid names are {', '.join(sorted(valid))}"


def _sentence(error: ValidationError, section: str = "") -> str:
    first = error.errors()[0]
    parts = [*filter(None, [section]), *(str(part) for part in first["loc"])]
    chosen = [part for i, part in enumerate(parts) if part in _kinds() and i in (1, 2)]
    parts = [part for i, part in enumerate(parts) if not (part in _kinds() and i in (1, 2))]
    key = ".".join(parts)
    if first["type"] == "extra_forbidden":
        return f"unknown recipe key {key!r}{_nearest(parts[-1], _siblings(parts, chosen), parts)}"
    if first["type"] == "missing":
        return f"recipe key {key!r} is required"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    if first["type"] == "union_tag_not_found":
        return f"recipe key '{key}.kind' is required; accepted are {_words_of(parts[0])}"
    if first["type"] == "union_tag_invalid":
        tag = str(first["ctx"]["tag"])
        return (
            f"{key}.kind={tag}: accepted are {_words_of(parts[0])}"
            f"{_nearest_word(tag, _words(parts[0]))}"
        )
    shown = first["input"] if isinstance(first["input"], str | int | float | bool) else ""
    if first["type"] == "tuple_type":
        given = f"={shown}" if shown else ""
        return f"{key}{given}: accepted is a list, [...]"
    if first["type"] in ("model_type", "model_attributes_type"):
        word = ", or one word of its `kind`" if parts[0] == "method" else ""
        return f"{key}={shown}: accepted is a section of keys and values{word}"
    return f"{key}={shown}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _siblings(parts: list[str], kinds: list[str]) -> dict[str, Any]:
    """Valid fields where the last of `parts` stands; of a chosen kind alone, if one is."""
    fields: dict[str, Any] = dict(Recipe.model_fields)
    for part in parts[:-1]:
        if part not in fields:
            continue  # an index into a list of sections
        variants = _variants(fields[part].annotation)
        if kinds:
            variants = [v for v in variants if kinds[0] in _kinds_of(v)]
        fields = {}
        for variant in variants:
            fields.update(variant.model_fields)
    return fields


def _words(section: str) -> list[str]:
    """Words that `kind` of a section may be, in the order of the schema."""
    variants = _variants(Method if section == "method" else Teacher)
    return [kind for variant in variants for kind in _kinds_of(variant)]


def _words_of(section: str) -> str:
    return ", ".join(_words(section))


def _nearest_word(word: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"; the nearest is {close[0]!r}" if close else ""
