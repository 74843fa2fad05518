"""The command line as documents: a page and manual pages, from the commands themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click

from guestpv import __version__
from guestpv.cli.main import main

WIDTH = 80


def contexts() -> Iterator[click.Context]:
    """A context for guestpv and each of its verbs, in the order of ``--help``."""
    settings = {**main.context_settings, "terminal_width": WIDTH, "max_content_width": WIDTH}
    yield from _below(click.Context(main, info_name="guestpv", **settings))


def _below(context: click.Context) -> Iterator[click.Context]:
    yield context
    command = context.command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None and not child.hidden:
                yield from _below(_context(child, context, name))
    for name, child in getattr(command, "beside", {}).items():
        # Not below its command in click's eyes, whose arguments would be part of its path then.
        yield from _below(_context(child, context.parent, f"{context.info_name} {name}"))


def _context(command: click.Command, parent: click.Context | None, name: str) -> click.Context:
    return click.Context(command, parent, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH)


def help_of(context: click.Context) -> str:
    """What ``--help`` prints."""
    return context.get_help()


def page() -> str:
    """All verbs on one page."""
    parts = ["# Command line", "What `--help` says of every verb."]
    for context in contexts():
        parts.append(f"## {context.command_path}\n\n```text\n{help_of(context)}\n```")
    return "\n\n".join(parts) + "\n"


def man_page(context: click.Context) -> str:
    """One command in troff's man macros."""
    command = context.command
    name = context.command_path.replace(" ", "-")
    text = (command.help or "").replace("\f", "")
    usage = re.sub(r"\s+", " ", context.get_usage().removeprefix("Usage: "))
    lines = [
        f'.TH "{name.upper()}" "1" "" "guestpv {__version__}" "guestpv"',
        ".SH NAME",
        f"{name} \\- {_escape(command.get_short_help_str(WIDTH))}",
        ".SH SYNOPSIS",
        _escape(usage),
        ".SH DESCRIPTION",
        *_paragraphs(text),
    ]
    options = [
        record
        for one in command.get_params(context)
        if isinstance(one, click.Option) and (record := one.get_help_record(context))
    ]
    if options:
        lines.append(".SH OPTIONS")
        for term, meaning in options:
            lines += [".TP", f"\\fB{_escape(term)}\\fR", _escape(meaning)]
    if isinstance(command, click.Group):
        lines.append(".SH COMMANDS")
        for verb in command.list_commands(context):
            child = command.get_command(context, verb)
            if child is not None and not child.hidden:
                meaning = child.get_short_help_str(WIDTH)
                lines += [
                    ".TP",
                    f"\\fB{_escape(context.command_path)} {_escape(verb)}\\fR(1)",
                    _escape(meaning),
                ]
    if command.epilog:
        lines += [".SH NOTES", *_paragraphs(command.epilog)]
    return "\n".join(lines) + "\n"


def _paragraphs(text: str) -> Iterator[str]:
    """Paragraphs; one that begins with ``\\b`` stays as it is, as click has it."""
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        lines = [line.strip("\n") for line in paragraph.split("\n")]
        yield ".PP"
        if lines[0].strip() == "\b":
            yield ".nf"
            yield from (_escape(line) for line in lines[1:])
            yield ".fi"
        else:
            yield _escape(" ".join(line.strip() for line in lines))


def _escape(text: str) -> str:
    plain = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{plain}" if plain.startswith((".", "'")) else plain


def write_man_pages(directory: Path) -> list[Path]:
    """Write ``guestpv.1``, ``guestpv-net-up.1``, ...; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for context in contexts():
        path = directory / f"{context.command_path.replace(' ', '-')}.1"
        path.write_text(man_page(context), encoding="utf-8")
        written.append(path)
    return written
