"""Options that several verbs share, with one meaning and one check each."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from chrek.artifact.names import is_checkpoint_id
from chrek.errors import ChrekError, Reason, Refused, UsageError

if TYPE_CHECKING:
    from chrek.store.layout import Store

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_STORE = "/var/lib/chrek/checkpoints"


def _completed_ids(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    from chrek.store import Store, list_checkpoints

    try:
        with Store.open(context.params.get("store") or os.environ.get("CHREK_STORE") or DEFAULT_STORE) as store:
            ids = [listed.checkpoint_id for listed in list_checkpoints(store)]
    except (ChrekError, OSError):
        return []
    return [name for name in ids if name.startswith(incomplete)]


class _Id(click.ParamType[str]):
    """A checkpoint id; it becomes a directory's name."""

    name = "id"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        del param, ctx
        if not is_checkpoint_id(value):
            raise UsageError(
                Reason.BAD_ID,
                f"{value[:80]!r} is not a checkpoint id.",
                cure="An id is 1 to 63 characters of A-Z a-z 0-9 . _ - and starts with a letter or digit.",
            )
        return value


class _Codes(click.ParamType[frozenset[Reason]]):
    """A comma list of reason codes."""

    name = "codes"

    def convert(
        self, value: str | frozenset[Reason], param: click.Parameter | None, ctx: click.Context | None
    ) -> frozenset[Reason]:
        try:
            return value if isinstance(value, frozenset) else Reason.parse_list(value)
        except UsageError as error:
            self.fail(error.message, param, ctx)


ID = _Id()


def id_argument(function: F) -> F:
    """Add the argument ID."""
    return click.argument("checkpoint_id", metavar="ID", type=ID, shell_complete=_completed_ids)(function)


def ids_argument(function: F) -> F:
    """Add one or more arguments ID."""
    return click.argument(
        "checkpoint_ids", metavar="ID...", type=ID, nargs=-1, required=True, shell_complete=_completed_ids
    )(function)


def store_option(function: F) -> F:
    """Add --store."""
    return click.option(
        "--store",
        envvar="CHREK_STORE",
        default=DEFAULT_STORE,
        show_default=True,
        show_envvar=True,
        type=click.Path(file_okay=False),
        help="Directory of the checkpoints.",
    )(function)


def json_option(function: F) -> F:
    """Add --json; the name in Python is as_json."""
    return click.option("--json", "as_json", is_flag=True, help="Write JSON for programs (docs/cli.md has the keys).")(
        function
    )


def allow_option(function: F) -> F:
    """Add --allow."""
    return click.option(
        "--allow",
        metavar="CODE,...",
        envvar="CHREK_ALLOW",
        show_envvar=True,
        type=_Codes(),
        default=frozenset(),
        help="Refusals to override, by reason code. What they protect from may then happen.",
    )(function)


def verify_option(function: F) -> F:
    """Add --verify."""
    return click.option(
        "--verify",
        envvar="CHREK_VERIFY",
        show_envvar=True,
        type=click.Choice(["full", "sampled", "off"], case_sensitive=False),
        default="full",
        show_default=True,
        help="How much of the bulk data is compared with its digests before it is used.",
    )(function)


def timeout_option(function: F) -> F:
    """Add --timeout in seconds; None is no limit."""
    return click.option(
        "--timeout",
        metavar="SECONDS",
        type=click.FloatRange(min=0, min_open=True),
        help="Give up, and undo everything, after this long.  [default: never]",
    )(function)


def open_store(path: str, *, create: bool = False) -> Store:
    """Open the store that --store names.

    Raises:
        Refused: ``NOT_FOUND``.
    """
    from chrek.store.layout import Store

    return Store.open(path, create=create)


def require_root(verb: str) -> None:
    """Refuse what only root can do, before anything else is asked.

    Raises:
        Refused: ``NOT_SUPPORTED_HERE``.
    """
    if os.geteuid() != 0:
        raise Refused(
            Reason.NOT_SUPPORTED_HERE,
            f"`chrek {verb}` must run as root; this is user {os.geteuid()}.",
            cure="Run it with sudo. CRIU traces processes and sets their ids, which the kernel allows root only.",
        )
