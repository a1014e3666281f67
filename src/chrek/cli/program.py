"""The group of verbs. Each is imported only when it is called, or when its help is shown."""

from __future__ import annotations

import importlib

import click

import chrek

VERBS = {
    "run": "Start an application: from its checkpoint if there is one, else cold.",
    "checkpoint": "Save a running application; it runs on.",
    "restore": "Bring an application back from its checkpoint.",
    "list": "Show the checkpoints in the store.",
    "inspect": "Show what a checkpoint holds: processes, memory, files, sockets, times.",
    "verify": "Compare every byte of checkpoints with their digests.",
    "delete": "Delete checkpoints.",
    "gc": "Delete old checkpoints and what killed captures left.",
    "pin": "Keep checkpoints from garbage collection.",
    "unpin": "Let garbage collection have checkpoints again.",
    "export": "Write a checkpoint as an image directory for plain CRIU.",
    "agent": "Capture and restore the pods of this Kubernetes node.",
    "install": "Copy the bundle into a volume, for containers of unmodified images.",
    "doctor": "Say what this machine has and lacks.",
    "completion": "Print the completion script of a shell.",
}
"""Every verb with its line in ``chrek --help``, which must not have to import them all."""


class _Verbs(click.Group):
    """A group whose commands are modules: ``chrek.cli.<verb>``, each with a ``command``."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"chrek.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        import difflib

        if args and args[0] not in VERBS and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], VERBS, 1)
            hint = f" Did you mean {close[0]!r}?" if close else f" Verbs: {', '.join(VERBS)}."
            ctx.fail(f"There is no verb {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(chrek.__version__, "--version", "-V", message="chrek %(version)s")
def program() -> None:
    """Checkpoint and restore of warmed-up server applications.

    Checkpoints are kept in a store, a directory: --store DIR, or CHREK_STORE, else /var/lib/chrek/checkpoints.
    """
