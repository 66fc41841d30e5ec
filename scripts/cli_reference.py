"""Print docs/CLI.md, made from the program's own help: python -m scripts.cli_reference."""

from __future__ import annotations

from collections.abc import Iterator

import click

from cdcbridge.cli import cli


def commands(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    """Yield (path, help) of a command and of all its subcommands."""
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is None:
                raise LookupError(name)
            yield from commands(child, click.Context(child, info_name=name, parent=context, **child.context_settings))


def reference() -> str:
    """Return the whole page."""
    parts = [
        "# Command line\n\n`python -m scripts.cli_reference` makes this page from the program's own help. `make docs` runs it, and a test compares.\n"
    ]
    context = click.Context(cli, info_name="cdcbridge", **{**cli.context_settings, "max_content_width": 100})
    for path, text in commands(cli, context):
        parts.append(f"## {path}\n\n```text\n{text.rstrip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(reference(), end="")
