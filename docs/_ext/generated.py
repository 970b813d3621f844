"""Reference pages written from the program itself: every configuration key, every command and option.

`configuration` and `command_line` return Markdown; the directive `generated` puts it into a page.
"""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import typer
import yaml
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel

KINDS = {"pretraining": "PretrainConfig", "fine-tuning": "FinetuneConfig"}
_WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}
_BOUNDS = {
    Gt: "above {}",
    Ge: "at least {}",
    Lt: "below {}",
    Le: "at most {}",
    MinLen: "at least {} of them",
    MaxLen: "at most {} of them",
}
_METAVARS = {int: "N", float: "NUMBER", str: "TEXT", Path: "PATH"}


def configuration() -> str:
    """Return every key of both kinds of run, section by section: its type, default and meaning."""
    from mgt_fast.train import config

    sections = {}
    for name, kind in KINDS.items():
        for prefix, section, defaults in _sections(getattr(config, kind)()):
            summaries, keys = sections.setdefault(prefix, ({}, {}))
            summaries[name] = inspect.getdoc(section).partition("\n\n")[0].replace("\n", " ")
            for key, kind_of_key in _keys(section):
                text = _plain(_meaning(section, key))
                text = text[0].upper() + text[1:]
                keys.setdefault(prefix + key, (kind_of_key, text, {}))[2][name] = _yaml(defaults[key])
    lines = []
    for prefix, (summaries, keys) in sections.items():
        lines += [f"## {prefix.rstrip('.') or 'Whole run'}", ""]
        if prefix:
            lines += [" ".join(dict.fromkeys(summaries.values())), ""]
        for key, (kind_of_key, text, defaults) in keys.items():
            lines += _directive(
                "confval", key, f":type: {kind_of_key}", f":default: {_by_kind(defaults)}", "", text
            )
    return "\n".join(lines)


def _sections(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, type, dict]]:
    """Yield prefix of the keys, class and defaults of a configuration and of all sections in it."""
    yield prefix, type(config), config.model_dump(mode="json")
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from _sections(value, f"{prefix}{name}.")
        elif dataclasses.is_dataclass(value):
            yield f"{prefix}{name}.", type(value), dataclasses.asdict(value)


def _keys(section: type) -> Iterator[tuple[str, str]]:
    """Yield name and type, in words, of each key that is no section."""
    if dataclasses.is_dataclass(section):
        hints = typing.get_type_hints(section)
        fields = [(field.name, hints[field.name], ()) for field in dataclasses.fields(section)]
    else:
        fields = [(name, field.annotation, field.metadata) for name, field in section.model_fields.items()]
    for name, annotation, metadata in fields:
        if not (
            isinstance(annotation, type)
            and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation))
        ):
            yield name, _type(annotation, metadata)


def _type(annotation, metadata=()) -> str:
    """Say in words what a value may be."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0], arguments[1:])
    if origin in (typing.Union, types.UnionType):
        some = [_type(argument, metadata) for argument in arguments if argument is not type(None)]
        return ", ".join(some) + ("; or null" if type(None) in arguments else "")
    if origin is typing.Literal:
        return " or ".join(f"`{_yaml(value)}`" for value in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return ", ".join([f"list of {_type(arguments[0])}", *_bounds(metadata)])
        return f"list of {len(arguments)}: {_type(arguments[0])} each"
    return ", ".join([_WORDS[annotation], *_bounds(metadata)])


def _bounds(metadata) -> list[str]:
    metadata = [bound for one in metadata for bound in getattr(one, "metadata", [one])]  # of pydantic's Field
    return [_BOUNDS[type(bound)].format(*dataclasses.astuple(bound)) for bound in metadata]


def _meaning(section: type, key: str) -> str:
    """Return what the docstring of a class, or of one it extends, says of an attribute.

    Raises:
        KeyError: if none says anything.
    """
    for cls in section.__mro__:
        if key in (said := _attributes(cls.__dict__.get("__doc__") or "")):
            return said[key]
    raise KeyError(f"{section.__name__}: no docstring says what {key} means")


def _attributes(docstring: str) -> dict[str, str]:
    """Return the entries of a docstring's section Attributes; one entry may be of several names."""
    said, names = {}, []
    for line in inspect.cleandoc(docstring).partition("Attributes:\n")[2].split("\n"):
        if line.startswith("    ") and not line.startswith("     "):
            head, _, text = line.strip().partition(": ")
            names = head.split(", ")
            said |= dict.fromkeys(names, text)
        elif not line.startswith("    "):
            break
        else:
            said |= {name: f"{said[name]} {line.strip()}" for name in names}
    return said


def _by_kind(defaults: dict[str, str]) -> str:
    """Name the kind of run where a default, or the key, is not of both."""
    if len(defaults) == len(KINDS) and len(set(defaults.values())) == 1:
        return f"`{next(iter(defaults.values()))}`"
    return ", ".join(f"`{value}` ({name})" for name, value in defaults.items())


def _yaml(value) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def command_line() -> str:
    """Return every command with its arguments and options, and the options that all share."""
    from mgt_fast.cli import app

    hints = typing.get_type_hints(app.registered_callback.callback)
    shared = [parameter for parameter in typer.main.get_command(app).params if parameter.name in hints]
    lines = ["## Every command", "", "```text", "mgt-fast [OPTIONS] COMMAND ...", "```", ""]
    lines += _directive("program", "mgt-fast")
    for parameter in shared:
        lines += _parameter(parameter, hints)
    for name, command, callback in _commands(app, "mgt-fast"):
        hints = typing.get_type_hints(callback)
        usage = [name]
        for parameter in command.params:
            if parameter.required:
                metavar = _metavar(parameter, hints)
                usage.append(metavar if _is_argument(parameter) else f"{parameter.opts[0]} {metavar}")
        lines += [f"## {name}", "", "```text", " ".join([*usage, "[OPTIONS]"]), "```", ""]
        lines += [_plain(inspect.cleandoc(command.help)), "", *_directive("program", name)]
        for parameter in command.params:
            lines += _parameter(parameter, hints)
    return "\n".join(lines)


def _parameter(parameter, hints: dict) -> list[str]:
    metavar = _metavar(parameter, hints)
    names = [metavar] if _is_argument(parameter) else [f"{flag} {metavar}".strip() for flag in parameter.opts]
    said = [_plain(parameter.help or "")]
    if _is_argument(parameter) and (choices := _choices(hints[parameter.name])):
        said.append(" or ".join(f"`{choice}`" for choice in choices) + ".")
    if parameter.required and not _is_argument(parameter):
        said.append("Required.")
    elif parameter.default is not None and parameter.default is not False:
        said.append(f"Default: `{parameter.default}`.")
    return _directive("option", ", ".join(names), "", " ".join(said))


def _plain(text: str) -> str:
    """Return text for Markdown in which <name> stands for a name and is no HTML."""
    return re.sub(r"(`[^`]*`)|<", lambda match: match[1] or r"\<", text)


def _commands(app: typer.Typer, name: str) -> Iterator[tuple]:
    """Yield full name, command and function of every command, in the order of `--help`."""
    group = typer.main.get_command(app)
    functions = {
        info.name or info.callback.__name__.replace("_", "-"): info.callback
        for info in app.registered_commands
    }
    groups = {info.name: info.typer_instance for info in app.registered_groups}
    for own, command in group.commands.items():
        if own in groups:
            yield from _commands(groups[own], f"{name} {own}")
        else:
            yield f"{name} {own}", command, functions[own]


def _is_argument(parameter) -> bool:
    return parameter.param_type_name == "argument"


def _metavar(parameter, hints: dict) -> str:
    """Return what stands for a parameter's value, as INPUTS... or PATH; nothing for a flag."""
    if getattr(parameter, "is_flag", False):
        return ""
    repeated = "..." if parameter.nargs == -1 else ""
    if parameter.metavar:
        return parameter.metavar + repeated
    if _is_argument(parameter):
        return parameter.name.upper() + repeated
    hint = hints[parameter.name]
    return "|".join(_choices(hint)) or next(_METAVARS[one] for one in _parts(hint) if one in _METAVARS)


def _choices(hint) -> list[str]:
    """Return the values that a parameter may have, if only some are allowed."""
    literals = [one for one in _parts(hint) if typing.get_origin(one) is typing.Literal]
    return [str(value) for literal in literals for value in typing.get_args(literal)]


def _parts(hint) -> Iterator:
    """Yield a type and the types that it is made of."""
    yield hint
    if typing.get_origin(hint) is not typing.Literal:
        for argument in typing.get_args(hint):
            yield from _parts(argument)


def _directive(name: str, argument: str, *content: str) -> list[str]:
    return [f"````{{{name}}} {argument}", *content, "````", ""]


def setup(app):
    """Add the directive `generated`, whose argument is the name of a function above."""
    from sphinx.util.docutils import SphinxDirective

    class Generated(SphinxDirective):
        required_arguments = 1

        def run(self):
            writers = {function.__name__: function for function in (configuration, command_line)}
            return self.parse_text_to_nodes(writers[self.arguments[0]](), allow_section_headings=True)

    app.add_directive("generated", Generated)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
