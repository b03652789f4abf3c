"""The `stoker` command. Exit codes: 0 all jobs succeeded, 1 the batch ended with failed jobs,
2 wrong use or bad input, 3 a service is unreachable, 130 interrupted.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from typing import Final

import click

from runtime.errors import EXIT_INTERRUPTED, EXIT_USAGE, InvalidFile, StokerError, exit_code_of
from runtime.logs import configure_logs
from runtime.redaction import secrets_of
from runtime.settings import LogSettings, load_settings
from runtime.tracing import stop_tracing
from scripts.terminal import say

# A command's module is imported when the command is asked for: all of them together take a second.
COMMANDS: Final = {
    "run": "submit_commands",
    "submit": "submit_commands",
    "status": "batch_commands",
    "watch": "batch_commands",
    "results": "batch_commands",
    "cancel": "batch_commands",
    "resume": "batch_commands",
    "retry": "submit_commands",
    "worker": "service_commands",
    "dispatch": "service_commands",
    "gateway": "service_commands",
    "flower": "flower_command",
    "up": "service_commands",
    "migrate": "service_commands",
    "doctor": "service_commands",
    "health": "health_command",
    "cache": "cache_commands",
    "cost": "cost_commands",
    "trace": "trace_command",
    "documents": "documents_commands",
    "endpoints": "endpoints_commands",
    "keys": "keys_commands",
    "purge": "purge_command",
    "recipes": "recipe_source",
    "schedule": "schedule_commands",
    "quantize": "quantize_command",
    "webhooks": "webhooks_commands",
}


class Commands(click.Group):
    """COMMANDS, each a command of its name in its module."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command; None for a name that is none."""
        del ctx
        module = COMMANDS.get(cmd_name)
        if module is None:
            return None
        found = getattr(importlib.import_module(f"scripts.{module}"), cmd_name)
        assert isinstance(found, click.Command)  # noqa: S101
        return found


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(importlib.metadata.version("stoker"), prog_name="stoker")
@click.pass_context
def cli(context: click.Context) -> None:
    """Batch inference for language models on your own machines.

    Every job ends with exactly one result or one stated error, whatever dies in between.
    """
    context.obj = load_settings()
    warnings = LogSettings(level="warning", format=context.obj.log.format)
    configure_logs(warnings, secrets=secrets_of(context.obj))


def main() -> None:
    """Run the command line; every expected error becomes one message and an exit code."""
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_USAGE)
    except (click.Abort, KeyboardInterrupt):
        say(
            "interrupted; what was submitted is kept, and goes on whenever a worker runs: `stoker up`, and in another "
            "terminal `stoker status`, then `stoker results BATCH -o OUT` or `stoker cancel BATCH`"
        )
        sys.exit(EXIT_INTERRUPTED)
    except InvalidFile as error:
        _say_problems(error)
        sys.exit(EXIT_USAGE)
    except StokerError as error:
        say(f"stoker: {error}")
        sys.exit(exit_code_of(error))
    finally:
        stop_tracing()


def _say_problems(error: InvalidFile) -> None:
    for problem in error.problems:
        say(str(problem))
    if error.total > len(error.problems):
        say(f"… and {error.total - len(error.problems)} more")
    say(f"stoker: {error}")


if __name__ == "__main__":
    main()
