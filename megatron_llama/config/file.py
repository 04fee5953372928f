"""From TOML and the command line to a RunConfig, and back.

A value comes from the last of these layers that gives it: the defaults, the preset, the TOML file, the flags
`--section.field value` (or `--section.field=value`). A flag's value is read as its field's type; lists are TOML.
"""

import dataclasses
import difflib
import math
import sys
import tomllib
from typing import Any

import tomli_w

from megatron_llama.config.presets import preset_layer
from megatron_llama.config.sections import DataSource, RunConfig, Sources, StageLayers, limit_error
from parallel.errors import ConfigError

Layer = dict[str, dict[str, Any]]  # section -> field -> value

MOVED = {  # fields of earlier versions, which stored configurations may hold, and where they are now
    ("parallel", "zero_stage"): ("zero", "stage"),
    ("parallel", "zero_engine"): ("zero", "engine"),
    ("parallel", "zero_shard_group_size"): ("zero", "shard_group_size"),
    ("parallel", "bucket_size"): ("zero", "bucket_size"),
}

SECTION_TYPES = {section.name: section.type for section in dataclasses.fields(RunConfig)}
SECTIONS = {name: {item.name: item for item in dataclasses.fields(section)} for name, section in SECTION_TYPES.items()}
EXPECTED = {
    str: "text",
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
    Sources: 'a list of "PREFIX" or {prefix = "PREFIX", weight = NUMBER, max_epochs = NUMBER}, weights above 0',
    StageLayers: '"auto" or a list of integers',
}
SHORT_NAMES = {str: "TEXT", int: "INTEGER", float: "NUMBER", bool: "true|false", Sources: "LIST", StageLayers: "auto|LIST"}


def load_config(argv: list[str], base: RunConfig | None = None) -> RunConfig:
    """The configuration that the arguments ask for.

    `argv` holds `--config FILE` and `--section.field value` in any order. `base` stands in for the defaults (the stored
    configuration of a checkpoint, for example). `--help` prints every field and exits; `--print-config` is left to the
    caller. Cross-field rules are not checked here: see `rules`.

    Raises ConfigError for an unreadable file, an unknown key or a value of the wrong type.
    """
    path, flags = _read_flags(argv)
    layers = {path: _read_file(path)} if path else {}
    layers["--model.preset"] = flags
    values = {name: {key: getattr(getattr(base or RunConfig(), name), key) for key in SECTIONS[name]} for name in SECTIONS}
    for layer in (_preset_of(layers), *layers.values()):
        _merge(values, layer)
    return _build(values)


def to_dict(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Plain values (text, numbers, lists, tables) of every field, fit for JSON and TOML."""
    return {
        name: {key: _plain(getattr(getattr(config, name), key)) for key in fields} for name, fields in SECTIONS.items()
    }


def from_dict(values: dict[str, dict[str, Any]], origin: str = "stored configuration") -> RunConfig:
    """The inverse of `to_dict`; fields that are absent take their defaults. Raises ConfigError naming `origin`."""
    return _build(_convert_layer(values, origin))


def to_toml(config: RunConfig) -> str:
    """TOML text of every field; read as `--config`, it gives an equal configuration."""
    return tomli_w.dumps(to_dict(config))


def help_text(program: str = "python -m megatron_llama.train") -> str:
    """Usage, and every field with its type, default and one line of help."""
    lines = [
        f"usage: {program} [--config FILE.toml] [--section.field value ...] [--print-config] [--help]",
        f"       {program} --dry-run --world-size N [--rank R | --all-stages] [--gpus-per-node N] [--json] ...",
        "",
        "--dry-run prints what the job will hold, send and compute on N GPUs, by a step without numbers on one process:",
        "parameters, bytes at the memory's peak, bytes of each message, FLOPs, of rank R (0) or of one rank of each stage.",
        "",
        "Defaults, then the preset, then the file, then the flags: the last that gives a value wins.",
    ]
    defaults = to_dict(RunConfig())
    for section, fields in SECTIONS.items():
        lines += ["", f"[{section}]  {SECTION_TYPES[section].__doc__.splitlines()[0]}"]
        for name, item in fields.items():
            kind = "|".join(item.metadata["choices"]) or SHORT_NAMES[item.type]
            default = tomli_w.dumps({"value": defaults[section][name]}).removeprefix("value = ").strip()
            lines.append(f"  --{section}.{name} {kind}  (default {default})")
            lines.append(f"        {item.metadata['help']}")
    return "\n".join(lines) + "\n"


def _build(values: Layer) -> RunConfig:
    return RunConfig(**{name: section(**values.get(name, {})) for name, section in SECTION_TYPES.items()})


def _preset_of(layers: dict[str, Layer]) -> Layer:
    """The layer of the preset that the last of `layers` (origin -> layer) names; empty if none does."""
    named = [(origin, layer["model"]["preset"]) for origin, layer in layers.items() if "preset" in layer.get("model", {})]
    origin, preset = named[-1] if named else ("", "")
    return preset_layer(preset, origin) if preset else {}


def _merge(values: Layer, layer: Layer) -> None:
    """Lays `layer` over `values`; of train.steps and train.tokens the one that a layer gives drops the other."""
    length = {key: layer.get("train", {}).get(key, 0) for key in ("steps", "tokens")}
    if any(length.values()):
        values["train"] |= {"steps": 0, "tokens": 0}
    for section, given in layer.items():
        values[section] |= given


def _read_flags(argv: list[str]) -> tuple[str, Layer]:
    """The file of `--config` ("" if none) and the layer of the other flags."""
    path, layer = "", {}
    remaining = iter(argv)
    for argument in remaining:
        if argument in ("--help", "-h"):
            sys.stdout.write(help_text())
            raise SystemExit(0)
        if argument == "--print-config":
            continue
        if not argument.startswith("--"):
            hint = f"; did you mean --config {argument}?" if argument.endswith(".toml") else ""
            raise ConfigError(f"unexpected argument {argument!r}: settings are given as --section.field value{hint}")
        flag, equals, text = argument[2:].partition("=")
        if not equals:
            text = next(remaining, "--")
            if text.startswith("--"):
                raise ConfigError(f"--{flag} needs a value: --{flag} VALUE")
        if flag == "config":
            path = text
            continue
        section, _, name = flag.partition(".")
        if section in SECTIONS and not name:
            example = next(iter(SECTIONS[section]))
            raise ConfigError(f"--{section} is a section: name a field of it, for example --{section}.{example}")
        section, name = MOVED.get((section, name), (section, name))
        item = _find_field(section, name, "the command line")
        layer.setdefault(section, {})[name] = _convert(_parse_text(text, item.type), section, item, f"--{flag}")
    _reject_two_lengths(layer, "the command line")
    return path, layer


def _read_file(path: str) -> Layer:
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not valid TOML: {error}") from error
    layer = _convert_layer(values, path)
    _reject_two_lengths(layer, path)
    return layer


def _convert_layer(values: dict[str, Any], origin: str) -> Layer:
    layer: Layer = {}
    for section, given in values.items():
        if section not in SECTIONS:
            raise ConfigError(_unknown(section, "", origin))
        if not isinstance(given, dict):
            raise ConfigError(f"{origin}: {section} = {given!r} is not a section; write [{section}] and its fields below it")
        for name, value in given.items():
            place, key = MOVED.get((section, name), (section, name))
            item = _find_field(place, key, origin)
            layer.setdefault(place, {})[key] = _convert(value, place, item, origin)
    return layer


def _reject_two_lengths(layer: Layer, origin: str) -> None:
    train = layer.get("train", {})
    if train.get("steps") and train.get("tokens"):
        raise ConfigError(
            f"{origin} gives both train.steps = {train['steps']} and train.tokens = {train['tokens']}; remove one of them"
        )


def _find_field(section: str, name: str, origin: str) -> dataclasses.Field:
    if name not in SECTIONS.get(section, {}):
        raise ConfigError(_unknown(section, name, origin))
    return SECTIONS[section][name]


def _unknown(section: str, name: str, origin: str) -> str:
    """The message for a section or field that does not exist, with the closest that does."""
    dotted = f"{section}.{name}" if name else section
    known = [f"{known_section}.{key}" for known_section, fields in SECTIONS.items() for key in fields]
    same_name = [candidate for candidate in known if candidate.endswith(f".{name or section}")]
    in_section = [f"{section}.{key}" for key in difflib.get_close_matches(name, SECTIONS.get(section, {}), n=1, cutoff=0.5)]
    sections = difflib.get_close_matches(section, [*SECTIONS, "config"], n=1, cutoff=0.5) if not name else []
    closest = same_name or in_section or sections or difflib.get_close_matches(dotted, known, n=1, cutoff=0.0)
    return f"{origin}: unknown setting {dotted}; the closest known one is {closest[0]}"


def _parse_text(text: str, kind: Any) -> Any:
    """A flag's text as the type of its field; the text itself where it doesn't read as one, for `_convert` to refuse."""
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind in (int, float):
            return kind(text)
        if kind in (Sources, StageLayers) and text[:1] in ("[", "{"):
            return tomllib.loads(f"value = {text}")["value"]
    except (KeyError, ValueError):  # TOMLDecodeError is a ValueError
        pass
    return text


def _convert(value: Any, section: str, item: dataclasses.Field, origin: str) -> Any:
    """The value as its field holds it. Raises ConfigError for a wrong type or one outside the field's own limits."""
    dotted = f"{section}.{item.name}"
    converted = _as_type(value, item.type)
    if converted is None:
        raise ConfigError(f"{origin}: {dotted} = {value!r} has the wrong type; expected {EXPECTED[item.type]}")
    problem = limit_error(dotted, item.metadata, converted)
    if problem:
        raise ConfigError(f"{origin}: {problem}")
    return converted


def _as_type(value: Any, kind: Any) -> Any:
    """The value as type `kind`, or None where it is of another type."""
    if kind is Sources:
        sources = [_as_source(entry) for entry in (value if isinstance(value, list | tuple) else [value])]
        return None if None in sources else tuple(sources)
    if kind is StageLayers:
        numbers = isinstance(value, list | tuple) and all(type(entry) is int for entry in value)
        return tuple(value) if numbers else ("auto" if value == "auto" else None)
    if kind is float:
        number = value if type(value) is not int else (float(value) if abs(value) < 2**1000 else math.inf)
        return number if type(number) is float and math.isfinite(number) else None
    return value if type(value) is kind else None


def _as_source(entry: Any) -> DataSource | None:
    if isinstance(entry, str):
        return DataSource(entry) if entry else None
    if not isinstance(entry, dict) or not isinstance(entry.get("prefix"), str):
        return None
    numbers = {key: _as_type(value, float) for key, value in entry.items() if key != "prefix"}
    if not numbers.keys() <= {"weight", "max_epochs"} or any(value is None or value <= 0 for value in numbers.values()):
        return None
    return DataSource(entry["prefix"], **numbers)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, DataSource):
        given = {key: number for key, number in dataclasses.asdict(value).items() if number is not None}
        return value.prefix if len(given) == 1 else given
    return value
