"""The engine run from inside a privileged container, as a child of its init.

Run by path with ``python3 -I -S``; it hands over through the init's mailbox like an engine outside.
"""

import os
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from chrek.entrypoint import environment
from chrek.errors import ChrekError, ExitCode, Reason, Refused
from chrek.system.ids import HostPid
from chrek.system.mailbox import Mailbox


def main(store: str, checkpoint_id: str) -> int:
    """Claim, restore, hand over; return an exit code."""
    init = HostPid(os.getppid())
    try:
        with Mailbox.claim(init, by="restore-entrypoint") as mailbox:
            return _restore(Path(store), checkpoint_id, init, mailbox)
    except ChrekError as error:
        os.write(2, f"chrek: {error}\n".encode(errors="replace"))
        return int(error.exit_code)


def _restore(store: Path, checkpoint_id: str, init: HostPid, mailbox: Mailbox) -> int:
    # After the claim, which the init waits for.
    from chrek.criu.process import Settings as CriuSettings  # noqa: PLC0415
    from chrek.engine.restore import restore_inside  # noqa: PLC0415
    from chrek.memory.fill import Verify  # noqa: PLC0415

    try:
        settings = environment.parse(os.environ)
        refuse_knobs(settings.criu)
        outcome = restore_inside(
            store=store,
            checkpoint_id=checkpoint_id,
            pid1=init,
            mailbox=mailbox,
            verify=Verify(settings.verify.value),
            allow=frozenset(Reason[code] for code in settings.allow),
            settings=CriuSettings(timeout=settings.criu.timeout, log_level=settings.criu.log_level),
            scratch=settings.criu.work_dir,
        )
        for warning in outcome.warnings:
            os.write(2, f"chrek: warning: {warning}\n".encode(errors="replace"))
    except ChrekError as error:
        mailbox.failed(error.reason, error.message)
        return int(error.exit_code)
    except Exception as error:
        mailbox.failed(Reason.RESTORE_FAILED, f"The restoring program has a fault: {error!r}.")
        raise
    return int(ExitCode.DONE)


def refuse_knobs(criu: environment.CriuSettings) -> None:
    """Refuse what cannot be had: what CRIU does with its own images only, its plugin, a place that cannot be written.

    ``CRIU_SKIP_IN_FLIGHT`` has nothing left to skip here.

    Raises:
        Refused: ``KNOB_REFUSED``, or ``NO_TMP`` where the place is the usual one.
    """
    if criu.lazy_pages:
        message = "CRIU_LAZY_PAGES needs a classic CRIU image, and this checkpoint keeps its pages in shards."
        raise Refused(Reason.KNOB_REFUSED, message, cure="Unset it; `chrek export` makes a classic image.")
    if criu.auto_dedup:
        message = "CRIU_AUTO_DEDUP writes into the images it reads, and a restore writes nothing into a checkpoint."
        raise Refused(Reason.KNOB_REFUSED, message, cure="Unset it; `chrek export` makes images that are yours to change.")
    usual = environment.CriuSettings()
    if criu.cuda_plugin_dir != usual.cuda_plugin_dir and os.path.exists(f"{criu.cuda_plugin_dir}/cuda_plugin.so"):
        message = f"CUDA_PLUGIN_DIR names {criu.cuda_plugin_dir} with CRIU's CUDA plugin, which is not used."
        raise Refused(Reason.KNOB_REFUSED, message, cure="Unset it: ChReK calls the driver itself.")
    if not os.path.isdir(criu.work_dir) or not os.access(criu.work_dir, os.W_OK | os.X_OK):
        reason = Reason.NO_TMP if criu.work_dir == usual.work_dir else Reason.KNOB_REFUSED
        message = f"CRIU_WORK_DIR is {criu.work_dir}, which is no directory that can be written."
        raise Refused(reason, message, cure="Mount an emptyDir there, or name another directory.")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
