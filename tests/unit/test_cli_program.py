"""The program as a whole: start-up, usage errors, exit codes, completion."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import chrek as package
from chrek.cli import ending, output
from chrek.cli.amounts import Duration, Size
from chrek.cli.program import VERBS
from chrek.errors import CaptureFailed, ChrekError, Reason, Refused, RestoreFailed, UsageError
from chrekcli import CHREK, chrek


def with_modules(option: str) -> subprocess.CompletedProcess[str]:
    """Run chrek with one option; its output ends with the modules that were imported."""
    code = f"""
import sys
sys.argv = ["chrek", {option!r}]
from chrek.cli import main
try:
    main()
finally:
    print(*sys.modules)
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_version_imports_nothing() -> None:
    """`--version` needs neither click nor any verb: of this project it imports the program's first page alone."""
    done = with_modules("--version")
    assert done.stdout.splitlines()[0] == f"chrek {package.__version__}"
    modules = set(done.stdout.split())
    assert not {"click", "rich", "dataclasses"} & modules
    assert {name for name in modules if name.startswith("chrek")} == {"chrek", "chrek.cli"}


def test_help_imports_no_verb() -> None:
    """The list of verbs is shown without importing them."""
    done = with_modules("--help")
    assert not {f"chrek.cli.{verb}" for verb in VERBS} & set(done.stdout.split())
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_json(verb: str) -> None:
    """Every verb explains itself, and all that end with a result speak JSON."""
    done = chrek(verb, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: chrek {verb}")
    assert ("--json" in done.stdout) == (verb not in {"completion", "agent"})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["lst"], "There is no verb 'lst'. Did you mean 'list'?"),
        (["list", "--stoer", "x"], "No such option '--stoer'"),
        (["inspect"], "Missing argument 'ID'"),
        (["inspect", "../etc"], "BAD_ID: '../etc' is not a checkpoint id."),
        (["delete", "a/b"], "BAD_ID"),
        (["run", "--id", "x"], "NO_COMMAND"),
        (["run", "--id", "x", "--allow", "NONSENSE", "--", "true"], "'NONSENSE' is not a reason code"),
        (["run", "--id", "x", "--timeout", "-1", "--", "true"], "--timeout"),
        (["run", "--id", "x", "--verify", "some", "--", "true"], "'full', 'sampled', 'off'"),
        (["gc", "--max-age", "soon"], "'soon' is no time; allowed are seconds, or 30m, 12h, 7d, 2w."),
        (["gc", "--max-bytes", "many"], "'many' is no size"),
        (["verify"], "Name the checkpoints to verify, or give --all."),
        (["completion", "csh"], "'bash', 'zsh', 'fish'"),
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], says: str, tmp_path: Path) -> None:
    """A wrong command line ends with 2 and says what is allowed, on standard error alone."""
    done = chrek(*arguments, store=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stdout == ""


def test_no_store() -> None:
    """A store that is not there is named, with the ways to name another."""
    done = chrek("list", "--store", "/no/such/store")
    assert done.returncode == 172
    assert "NOT_FOUND: The store '/no/such/store' cannot be opened" in done.stderr
    assert "--store or CHREK_STORE" in done.stderr


def test_errors_as_json() -> None:
    """With --json an error is an object on standard output, beside the line for people."""
    done = chrek("list", "--json", "--store", "/no/such/store")
    assert done.returncode == 172
    assert '"reason": "NOT_FOUND"' in done.stdout
    assert '"exit_code": 172' in done.stdout


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ChrekError(Reason.WRITE_FAILED, "a"), 1),
        (UsageError(Reason.BAD_VALUE, "a"), 2),
        (CaptureFailed(Reason.DUMP_FAILED, "a"), 170),
        (RestoreFailed(Reason.RESTORE_FAILED, "a"), 171),
        (Refused(Reason.CORRUPT, "a"), 172),
        (KeyboardInterrupt(), 130),
        (OSError(5, "Input/output error", "/some/file"), 1),
        (ending.Ended(42), 42),
    ],
)
def test_exit_codes(error: BaseException, code: int) -> None:
    """Every kind of error has one exit code."""
    assert ending._code_of(error) == code


def test_messages_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters in a message are shown, not sent."""
    ending.explain(Refused(Reason.CORRUPT, "a\x1b[2Jb\r", cure=""))
    assert capsys.readouterr().err == "chrek: CORRUPT: a\\x1b[2Jb\\r\n"


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    """`chrek … | head` does not complain when head has seen enough."""
    command = f"{' '.join(CHREK)} completion bash | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_completes_verbs_and_options() -> None:
    """The shell is offered verbs and options."""
    for words, number, offered in (("chrek ch", "1", "checkpoint"), ("chrek run --on", "2", "--on-failure")):
        env = {"_CHREK_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": number}
        code = "import sys; sys.argv = ['chrek']; from chrek.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=False
        )
        assert f"plain,{offered}" in done.stdout.splitlines()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    """Each shell gets a script that asks chrek."""
    done = chrek("completion", shell)
    assert done.returncode == 0
    assert "_CHREK_COMPLETE" in done.stdout


def test_sizes() -> None:
    """Bytes are shown in units of 1024."""
    assert [output.size(n) for n in (0, 1023, 1024, 1536 << 10, 5 << 30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 MiB",
        "5.0 GiB",
    ]


def test_durations() -> None:
    """Seconds are shown as people say them."""
    shown = [output.seconds(n) for n in (0.123, 4.5, 200, 7200, 864000)]
    assert shown == ["0.12 s", "4.5 s", "3 min 20 s", "2 h", "10 d"]


@pytest.mark.parametrize(
    ("text", "value"), [("90", 90), ("30m", 1800), ("1.5h", 5400), ("7d", 604800), ("2w", 1209600)]
)
def test_times(text: str, value: float) -> None:
    """Times may have a unit."""
    assert Duration().convert(text, None, None) == value


@pytest.mark.parametrize(
    ("text", "value"), [("10", 10), ("1k", 1024), ("1.5M", 3 << 19), ("2GiB", 2 << 30), ("1 TB", 1 << 40)]
)
def test_byte_counts(text: str, value: int) -> None:
    """Sizes may have a unit."""
    assert Size().convert(text, None, None) == value


def test_tables_line_up() -> None:
    """Columns have the width of their longest cell; numbers stand on the right."""
    text = output.table(("ID", "SIZE"), [("a", "1 B"), ("long", "10 B")], right=(1,))
    assert text == "ID    SIZE\na      1 B\nlong  10 B"
