"""The command line: `ltx-batch VERB`, and `submit.py`, which is the verb `run`.

Verbs are thin: each reads its options, calls the part that does the work, and prints what came of it. Data go to
standard output, progress and errors to standard error. Nothing heavy is imported before a verb needs it.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer

from ltx_batch.cli.conditions import WithLists
from ltx_batch.cli.fetch import fetch
from ltx_batch.cli.jobs import plan, report, retry, run, status, validate
from ltx_batch.cli.output import print_json
from ltx_batch.cli.quality import quality
from ltx_batch.cli.quantize import quantize
from ltx_batch.cli.render import render
from ltx_batch.cli.text import encode, enhance
from ltx_batch.errors import LtxBatchError, ManifestError

_SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda name: name.replace("_", "-"),  # --num_frames, as the official script spells it
}
_STOPPED = 3  # what an error nobody foresaw comes to: 1 would say that the job ran to its end

app = typer.Typer(
    help="Render LTX-Video from manifests. Exit codes: 0 all rows ok, 1 finished with failed rows, 2 bad input (nothing "
    "was started), 3 stopped before the end, 130 and 143 ended by a second signal.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut long options' names
    context_settings=_SETTINGS,
)
app.command(cls=WithLists)(render)
for _verb in (run, validate, plan, status, retry, report, quality, encode, enhance, fetch, quantize):
    app.command()(_verb)

_submit = typer.Typer(
    pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None, context_settings=_SETTINGS
)
_submit.command()(run)


def main(argv: Sequence[str] | None = None) -> int:
    """`ltx-batch`; returns the exit code."""
    return _call(app, sys.argv[1:] if argv is None else argv, "ltx-batch")


def submit(argv: Sequence[str]) -> int:
    """`submit.py`; returns the exit code."""
    return _call(_submit, argv, "submit.py")


def _call(commands: typer.Typer, argv: Sequence[str], name: str) -> int:
    as_json = "--json" in argv
    try:
        code = commands(args=list(argv), prog_name=name, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except LtxBatchError as error:
        return _fail(str(error), error.exit_code, as_json, _issues(error))
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130, as_json)
    except Exception as error:
        if hasattr(
            error, "format_message"
        ):  # click's own errors; typer may carry a copy of click, with its own classes
            context = getattr(error, "ctx", None)
            path = name if context is None else context.command_path
            return _fail(f"{error.format_message()}\n`{path} --help` lists the options.", 2, as_json)
        traceback.print_exc()
        return _fail(f"{type(error).__name__}: {error}", _STOPPED, as_json)


def _fail(message: str, code: int, as_json: bool, more: dict[str, Any] | None = None) -> int:
    print(message, file=sys.stderr)
    if as_json:
        print_json({"error": message, **(more or {})})
    return code


def _issues(error: LtxBatchError) -> dict[str, Any]:
    """A bad manifest's rows, in the shape that `validate --json` gives them."""
    if not isinstance(error, ManifestError):
        return {}
    return {"errors": [issue.as_dict() for issue in error.issues], "warnings": [], "rows": None}
