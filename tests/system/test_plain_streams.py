"""An application on a plain machine whose standard streams are files that nobody can name."""

from __future__ import annotations

import sys

from chrek.engine import capture as capturing
from chrek.engine import restore as restoring
from chrek.store.layout import Store
from chrek.system.mailbox import Mailbox
from containers import needs
from system.cycle import mode
from system.pidns import INIT, Contained

pytestmark = needs("criu")

CODE = "import sys,time\nn=0\nwhile True: n+=1; print(n, flush=True); sys.stderr.write('e'); sys.stderr.flush(); time.sleep(.02)"


def test_stderr_is_a_temporary_file(store: Store) -> None:
    """A nameless file as standard error, opened with O_NOFOLLOW, is replaced by the new container's own."""
    command = [*INIT, sys.executable, "-c", CODE]
    with Contained(command) as source:
        source.line()
        capturing.capture(capturing.Request(pid1=source.pid, store=store, checkpoint_id="plain"))
        reached = int(source.line())
    with Contained(command, env={"DYN_CHECKPOINT_HASH": "plain"}) as copy:
        while mode(copy.pid) != "waiting":
            assert copy.outside.poll() is None, copy.stderr()
        with Mailbox.claim(copy.pid, by="test") as mailbox:
            request = restoring.Request(pid1=copy.pid, mailbox=mailbox, store=store, checkpoint_id="plain")
            restoring.restore(request)
        assert int(copy.line()) >= reached - 1
        assert "start=restored" in copy.stderr()
