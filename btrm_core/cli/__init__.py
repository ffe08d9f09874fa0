"""The `btrm` command: one function per subcommand, each a translation of flags into a call.

Decides: names of flags, exit codes, what goes to standard output (results) and standard error (all else). torch,
transformers and deepspeed are imported inside the commands that need them, so that `btrm families` and `--help` answer
at once.

Exit codes: 0; 2 for what the user can put right (one line, no traceback); 130 after Ctrl-C; 128 plus the number of
another signal that asked to stop (143 for SIGTERM); 1 for a failed check or a bug.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
import traceback
from importlib import import_module
from typing import Any

import click

from btrm_core.errors import BtrmError, printable
from btrm_core.families import strangers_here, unreadable_package
from btrm_core.signals import Stopped

SPEAK_LATER_SECONDS = 3.0
COMMANDS = {
    "cache": "cache:cache",
    "data": "data:data",
    "doctor": "preflight:doctor",
    "eval": "evaluate:evaluate",
    "export": "export:export_command",
    "families": "families:families",
    "new-family": "families:new_family_command",
    "plan": "preflight:plan_command",
    "score": "score:score",
    "serve": "serve:serve",
    "train": "train:train",
    "verify": "verify:verify",
}
"""Subcommand -> module of this package and function; a module is imported when its command is called."""


class Commands(click.Group):
    """Prints errors of the user on one line, and keeps tracebacks for bugs and `--debug`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the subcommands.

        Args:
            ctx: click's context; not looked at.
        """
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a subcommand; None if there is no such one.

        Args:
            ctx: click's context; not looked at.
            cmd_name: what was typed, e.g. "train".
        """
        if cmd_name not in COMMANDS:
            return None
        module, _, function = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(import_module(f"btrm_core.cli.{module}"), function)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run a subcommand and turn its errors into exit codes.

        Args:
            ctx: click's context of the whole command line; its `debug` asks for tracebacks.

        Raises:
            SystemExit: with the error's exit code for a BtrmError, 130 when interrupted, 2 where the system refuses
                or a package cannot be read, 141 for a closed pipe, 1 for a bug.
        """
        try:
            return super().invoke(ctx)
        except BtrmError as error:
            if not _speaks(error):
                raise SystemExit(error.exit_code) from None
            if ctx.params.get("debug"):
                traceback.print_exc()
            click.echo(f"{_own_line()}btrm: {' '.join(str(error).split())}", err=True)
            raise SystemExit(error.exit_code) from None
        except (KeyboardInterrupt, Stopped) as stopped:
            if getattr(stopped, "speaks", True):
                click.echo(f"{_own_line()}btrm: {getattr(stopped, 'reason', 'interrupted')}", err=True)
            raise SystemExit(getattr(stopped, "code", 130)) from None
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except Exception as error:
            if not _speaks(error):
                raise SystemExit(1) from None
            if isinstance(error, UnicodeDecodeError) and (culprit := unreadable_package()):
                click.echo(f"btrm: {culprit}", err=True)
                raise SystemExit(2) from None
            if isinstance(error, UnicodeEncodeError) and (name := _not_utf8()):
                click.echo(f"btrm: '{name}' is no UTF-8, which libraries take alone; rename it", err=True)
                raise SystemExit(2) from None
            if isinstance(error, OSError) and error.errno is not None and not ctx.params.get("debug"):
                if error.errno == errno.EPIPE:  # whoever was reading has seen enough
                    raise SystemExit(128 + signal.SIGPIPE) from None
                where = f" '{error.filename}'" if error.filename else ""
                click.echo(f"{_own_line()}btrm: the system refuses{where}: {error.strerror}", err=True)
                raise SystemExit(2) from None
            traceback.print_exc()
            others = " and ".join(sorted(strangers_here))
            blame = f", of btrm or of {others}, whose code runs in the same process" if others else ""
            click.echo(f"btrm: this is a bug{blame}; please report it with the lines above", err=True)
            raise SystemExit(1) from None


def _not_utf8() -> str | None:
    """What on the command line is no UTF-8: names that came from another system, with letters of its own."""
    return next((printable(text) for text in sys.argv if any("\ud800" <= c <= "\udfff" for c in text)), None)


def _own_line() -> str:
    """A line break where the main process is showing its progress bar meanwhile."""
    return "\n" if os.environ.get("RANK", "0") != "0" else ""


def _speaks(error: Exception) -> bool:
    """Of several processes that fail, one says why: the first, once they know each other; until then, the main one."""
    speaks = getattr(error, "speaks", None)
    if speaks is not None:
        return bool(speaks)
    if os.environ.get("RANK", "0") != "0":
        time.sleep(SPEAK_LATER_SECONDS)  # the launcher ends this process meanwhile, if all fail alike
    return True


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="btrm")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--local_rank", "--local-rank", type=int, hidden=True, expose_value=False)  # from deepspeed's launcher
def main(debug: bool) -> None:
    """Train, check and use Bradley-Terry reward models."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
