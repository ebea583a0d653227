"""Settings read from TOML and overridden on the command line.

Unknown keys, wrong types and impossible values are errors that name the key and the nearest valid ones.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from hvdlm.arguments import parse_overrides
from hvdlm.config import Config, ModelSection
from hvdlm.errors import HvdlmError
from hvdlm.paths import expand_path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Presets = Mapping[str, Mapping[str, Any]]


def load(
    path: Path | None,
    overrides: Sequence[str],
    presets: Presets,
    shape_of: Callable[[str], Mapping[str, Any]] | None = None,
) -> Config:
    """Reads a TOML file (None: an empty one), then applies `--section.key value` overrides.

    `presets` maps a name of `model.preset` to the `[model]` values it stands for; given values win over the preset's.
    `shape_of`: such values of what `model.from` names, which take the place of the preset's.

    Raises HvdlmError for an unreadable file, an unknown key, a wrong type or an impossible combination.
    """
    settings = _read_toml(path) if path else {}
    origin = " and ".join(([str(path)] if path else []) + (["the command line"] if overrides else []))
    for key, value in parse_overrides(overrides):
        section, _, name = key.partition(".")
        table = settings.setdefault(section, {})
        if not isinstance(table, dict):
            raise HvdlmError(f"{origin}: {section} must be a section, [{section}]")
        table[name] = _typed(section, name, value)
    return from_dict(settings, origin, presets, shape_of)


def from_dict(
    settings: Mapping[str, Any],
    origin: str,
    presets: Presets,
    shape_of: Callable[[str], Mapping[str, Any]] | None = None,
) -> Config:
    """The configuration that nested `settings` describe; `origin` names their source in errors. `shape_of` as in
    `load`."""
    filled = dict(settings)
    model = filled.get("model", {})
    if isinstance(model, dict):
        name = model.get("preset", ModelSection.model_fields["preset"].default)
        if not isinstance(name, str) or name not in presets:
            raise HvdlmError(f"{origin}: model.preset = {name!r} is unknown{_nearest(str(name), list(presets))}")
        shape, start = presets[name], model.get("from")
        is_whole = ModelSection.setting_fields().keys() <= model.keys()
        if isinstance(start, str) and start and not is_whole:
            if shape_of is None:
                raise HvdlmError(f"{origin}: model.from begins a training; here, set the shape itself")
            try:
                shape = shape_of(expand_path(start))
            except ValueError as error:
                raise HvdlmError(f"{origin}: model.from = {error}") from None
        filled["model"] = {**shape, **model, "preset": name}
    try:
        return Config.model_validate(filled)
    except ValidationError as error:
        raise HvdlmError(f"{origin}: {'; '.join(_sentence(detail) for detail in error.errors())}") from None


def with_values(config: Config, values: Mapping[str, Mapping[str, Any]], presets: Presets) -> Config:
    """The same settings but for `values`, by section and name."""
    settings = config.model_dump()
    for section, own in values.items():
        settings[section] |= own
    return from_dict(settings, "the resolved configuration", presets)


def with_absolute_paths(config: Config, presets: Presets) -> Config:
    """The same settings for a job that starts in another directory."""
    paths = {"data": {"path": config.data.path}, "train": {"run_dir": config.train.run_dir}}
    paths["model"] = {"from": config.model.from_}
    absolute = {
        section: {name: str(Path(path).absolute()) for name, path in own.items() if path}
        for section, own in paths.items()
    }
    return with_values(config, absolute, presets)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows write a mark at the beginning
    except OSError as error:
        raise HvdlmError(f"cannot read the configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise HvdlmError(f"{path} is not UTF-8 ({error.reason}): save it as UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise HvdlmError(f"{path} is not valid TOML: {error}") from None


def _typed(section: str, name: str, text: str) -> Any:
    """The text of an override as the type its setting has: strings need no quotes on a command line."""
    section_field = Config.model_fields.get(section)
    fields = section_field.annotation.setting_fields() if section_field and section_field.annotation else {}
    if name in fields and _takes_text(fields[name].annotation):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _takes_text(annotation: Any) -> bool:
    values = get_args(annotation) if get_origin(annotation) is Literal else ()
    return annotation is str or any(isinstance(value, str) for value in values)


def _sentence(detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        section = Config.model_fields.get(str(detail["loc"][0])) if len(detail["loc"]) > 1 else None
        annotation: Any = section.annotation if section else Config
        prefix = f"{detail['loc'][0]}." if section else ""
        return f"unknown key {key}{_nearest(str(detail['loc'][-1]), list(annotation.setting_fields()), prefix)}"
    if detail["type"] == "model_type":
        return f"{key} must be a section, [{key}]"
    if detail["type"] == "string_too_short":
        return f"{key} is empty: give a path, or leave it out"
    if detail["type"] == "value_error":
        said = str(detail["ctx"]["error"])
        return f"{key} = {said}" if len(detail["loc"]) > 1 else said  # of one setting, or of several together
    return f"{key} = {detail['input']!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _nearest(name: str, valid: list[str], prefix: str = "") -> str:
    # first those that the name has become by a prefix, as rank -> matrix_rank
    close = [each for each in valid if each.endswith(f"_{name}")] or difflib.get_close_matches(
        name, valid, n=1, cutoff=0.5
    )
    if close:
        return f" (did you mean {' or '.join(prefix + each for each in close)}?)"
    return f" (valid: {', '.join(prefix + each for each in sorted(valid))})"
