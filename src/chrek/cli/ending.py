"""Where the program ends: every error becomes one readable line and the exit code that goes with it.

With ``--json`` standard output gets one object in any case: the verb's result, or
``{"error": {"reason", "message", "cure", "exit_code"}}``; the line on standard error is the same.
"""

from __future__ import annotations

import json
import os
import sys

import click

from chrek.errors import ChrekError, ExitCode, Reason

_INTERRUPTED = 130
"""What a shell says of a program that SIGINT ended."""


class Ended(Exception):
    """The verb has said everything itself; end with this code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def run_program() -> int:
    """Run ``chrek`` with the command line of this process; return its exit code."""
    from chrek.cli.program import program

    try:
        program.main(prog_name="chrek", standalone_mode=False)
    except BaseException as error:  # noqa: BLE001 - sorted below, and raised again when it is nobody's
        return _code_of(error)
    return int(ExitCode.DONE)


def _code_of(error: BaseException) -> int:
    match error:
        case Ended():
            code = error.code
        case ChrekError():
            code = _chrek_error(error)
        case click.exceptions.Exit():
            code = error.exit_code
        case click.ClickException():
            code = _usage(error)
        case click.Abort() | KeyboardInterrupt():
            _say("interrupted")
            code = _INTERRUPTED
        case BrokenPipeError():
            # Whoever read our output has seen enough (`chrek list | head`); a later flush must not complain either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = int(ExitCode.DONE)
        case OSError():
            code = _chrek_error(ChrekError(Reason.NOT_SUPPORTED_HERE, f"{_what(error)}."))
        case _:
            raise error
    return code


def explain(error: ChrekError) -> None:
    """Write an error as people see it: what happened, then what to do."""
    _say(f"{error.reason.code}: {error.message}")
    if error.cure:
        _say(f"  {error.cure}", prefix="")


def wants_json() -> bool:
    """Return whether the command line asks for JSON: the answer is needed even when it cannot be parsed."""
    ours = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    return "--json" in ours


def _chrek_error(error: ChrekError) -> int:
    explain(error)
    if wants_json():
        fields = {"reason": error.reason.code, "message": error.message, "cure": error.cure}
        print(json.dumps({"error": {**fields, "exit_code": int(error.exit_code)}}))  # noqa: T201
    return int(error.exit_code)


def _usage(error: click.ClickException) -> int:
    """Say what is wrong with the command line, and where help is."""
    context = getattr(error, "ctx", None)
    where = f" ({context.command_path} --help has all options)" if context is not None else ""
    _say(f"{error.format_message()}{where}")
    if wants_json():
        fields = {"reason": Reason.BAD_VALUE.code, "message": error.format_message(), "cure": ""}
        print(json.dumps({"error": {**fields, "exit_code": int(ExitCode.USAGE)}}))  # noqa: T201
    return int(ExitCode.USAGE)


def _what(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def _say(text: str, prefix: str = "chrek: ") -> None:
    # Terminals act on control characters; a path or a command line of a process may have any.
    clean = "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text)
    sys.stderr.write(f"{prefix}{clean}\n")
