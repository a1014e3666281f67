"""``chrek completion SHELL``: the script that makes a shell complete verbs, options and checkpoint ids."""

from __future__ import annotations

import click


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    r"""Print the completion script of a shell.

    \b
    bash:  eval "$(chrek completion bash)"     in ~/.bashrc
    zsh:   eval "$(chrek completion zsh)"      in ~/.zshrc
    fish:  chrek completion fish | source      in ~/.config/fish/config.fish
    """
    from click.shell_completion import get_completion_class

    from chrek.cli.program import program

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(program, {}, "chrek", "_CHREK_COMPLETE").source())
