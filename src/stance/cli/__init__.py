"""The command line: parses and prints; the work is done by functions that return.

Data goes to standard output, everything else to standard error. Heavy libraries are imported
inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from stance import __version__
from stance.atomic import why_unwritten
from stance.cli.comparison import audit_labels, compare, crossval
from stance.cli.data import agreement, validate
from stance.cli.evaluation import evaluate, make_report
from stance.cli.options import say
from stance.cli.training import train
from stance.cli.use import export, predict, verify
from stance.errors import StanceError
from stance.processes import current, tells, told

__all__ = ["app", "main"]

app = typer.Typer(
    name="stance",
    help="Train and use models that label where a speaker stands: for dialogue or for conflict.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_EPILOG = "Exit codes: 0 ok, 1 failed at run time, 2 usage or config, 3 data, 130/143 stopped."
_EXPORT_EPILOG = "Exit codes: 0 ok, 1 failed at run time, 2 usage, 3 data, 4 not as good as the model."


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code; errors of the package are one message.

    Of several processes that make one run, the one that fails first prints it.
    """
    try:
        app(args=arguments, standalone_mode=False)
        sys.stdout.flush()
        code = 0
    except StanceError as error:
        if tells(error):
            say(f"stance: {error}")
            told()
        code = error.exit_code
    except KeyboardInterrupt:
        if tells():
            say("stance: stopped")
            told()
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        code = _reader_gone()
    except SystemExit as error:  # click turns a broken pipe into exit 1
        gone = isinstance(error.__context__, BrokenPipeError)
        code = _reader_gone() if gone else int(error.code or 0)
    except OSError as error:
        if tells():
            written = error.filename or (why_unwritten(error) and "standard output")
            say(f"stance: {f'{written}: ' if written else ''}{error.strerror or error}")
            told()
        code = 1
        if error.filename is None:
            _reader_gone()
    except typer.Abort:
        code = 1
    except Exception as error:
        first = tells()  # said before the others notice that this process is gone
        if not hasattr(error, "exit_code"):
            if current().number == 1:
                raise
            if first:
                traceback.print_exc()
                told()
        # typer's usage errors, with the message it would print itself
        show = getattr(error, "show", None)
        if show and first:
            show()
            told()
        code = getattr(error, "exit_code", 1)
    sys.exit(code)


def _reader_gone() -> int:
    """Nobody reads standard output any more (as in ``| head``): leave nothing to flush to it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _version(value: bool) -> None:
    if value:
        print(f"stance {__version__}")
        raise typer.Exit


@app.callback(epilog=_EPILOG)
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for _command in (train, validate, agreement, evaluate, compare, crossval):  # the order of ``stance --help``
    app.command(epilog=_EPILOG)(_command)
app.command("audit", epilog=_EPILOG)(audit_labels)
app.command("report", epilog=_EPILOG)(make_report)
app.command(epilog=_EPILOG)(predict)
app.command(epilog=_EXPORT_EPILOG)(export)
app.command(epilog=_EPILOG)(verify)
