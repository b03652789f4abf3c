"""The `stoker` command. Exit codes: 0 all jobs succeeded, 1 the batch ended with failed jobs,
2 wrong use or bad input, 3 a service is unreachable, 130 interrupted.
"""

from __future__ import annotations

import importlib.metadata
import sys

import click

from runtime.errors import BadInput, InvalidFile, NotFound, StokerError
from runtime.logs import configure_logs
from runtime.settings import LogSettings, load_settings
from scripts.batch_commands import cancel, results, resume, status, watch
from scripts.cache_commands import cache
from scripts.documents_commands import documents
from scripts.keys_commands import keys
from scripts.quantize_command import quantize
from scripts.recipe_source import list_recipes
from scripts.service_commands import dispatch, doctor, gateway, migrate, up, worker
from scripts.submit_commands import retry, run, submit
from scripts.terminal import say
from scripts.webhooks_commands import webhooks

EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(importlib.metadata.version("stoker"), prog_name="stoker")
@click.pass_context
def cli(context: click.Context) -> None:
    """Batch inference for language models on your own machines.

    Every job ends with exactly one result or one stated error, whatever dies in between.
    """
    context.obj = load_settings()
    configure_logs(LogSettings(level="warning", format=context.obj.log.format))


for command in (
    run,
    submit,
    status,
    watch,
    results,
    cancel,
    resume,
    retry,
    worker,
    dispatch,
    gateway,
    up,
    migrate,
    doctor,
    cache,
    documents,
    keys,
    list_recipes,
    quantize,
    webhooks,
):
    cli.add_command(command)


def main() -> None:
    """Run the command line; every expected error becomes one message and an exit code."""
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_USAGE)
    except (click.Abort, KeyboardInterrupt):
        say(
            "interrupted; what was submitted is kept, and goes on whenever a worker runs: `stoker status`, "
            "`stoker documents list`"
        )
        sys.exit(EXIT_INTERRUPTED)
    except InvalidFile as error:
        _say_problems(error)
        sys.exit(EXIT_USAGE)
    except StokerError as error:
        say(f"stoker: {error}")
        sys.exit(_exit_code(error))


def _say_problems(error: InvalidFile) -> None:
    for problem in error.problems:
        say(str(problem))
    if error.total > len(error.problems):
        say(f"… and {error.total - len(error.problems)} more")
    say(f"stoker: {error}")


def _exit_code(error: StokerError) -> int:
    if isinstance(error, BadInput | NotFound):
        return EXIT_USAGE
    return EXIT_UNREACHABLE


if __name__ == "__main__":
    main()
