"""The RPC client, over a real socket, with a thread at the other end that speaks CRIU's side."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from chrek.criu.messages import Answer, Notification, Options, Request, RequestType, RestoreAnswer
from chrek.criu.rpc import Client, CriuGone

DUMP = Request(type=RequestType.DUMP, opts=Options(images_dir_fd=-1, pid=7, log_level=4))
PATIENCE = 60.0

Script = Callable[["Criu"], None]


@dataclass
class Criu:
    """CRIU's end of the socket: reads the request, notifies, and answers."""

    channel: socket.socket
    heard: list[Request] = field(default_factory=list)

    def listen(self) -> Request:
        """Read one request."""
        self.heard.append(Request.decode(self.channel.recv(1 << 16)))
        return self.heard[-1]

    def notify(self, script: str, pid: int | None = None) -> bool:
        """Notify, wait, and return whether the answer was yes."""
        notification = Notification(script=script, pid=pid)
        self.say(Answer(type=RequestType.NOTIFY, success=True, notify=notification))
        said = self.listen()
        assert said.type == RequestType.NOTIFY
        return bool(said.notify_success)

    def say(self, answer: Answer) -> None:
        """Send an answer."""
        self.channel.send(answer.encode())


@dataclass
class Stage:
    """A client, and a thread that plays CRIU for it."""

    client: Client
    criu: Criu
    thread: threading.Thread


def pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a socket like that of ``criu swrk``."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.settimeout(PATIENCE)
    return ours, theirs


@pytest.fixture
def stage() -> Iterator[Callable[..., Stage]]:
    """Return what starts a client with a CRIU that follows a script; at the end all threads are over."""
    stages: list[Stage] = []
    errors: list[BaseException] = []

    def start(script: Script, *, deadline: float | None = None, check: Callable[[], None] | None = None) -> Stage:
        ours, theirs = pair()
        criu = Criu(theirs)

        def play() -> None:
            try:
                with theirs:
                    criu.listen()
                    script(criu)
            except BaseException as error:  # noqa: BLE001 - raised again in the test
                errors.append(error)

        thread = threading.Thread(target=play)
        thread.start()
        stages.append(Stage(Client(ours, deadline=deadline, check=check), criu, thread))
        return stages[-1]

    yield start
    for each in stages:
        each.client.close()
        each.thread.join(PATIENCE)
        assert not each.thread.is_alive()
    assert errors == []


def done(criu: Criu) -> None:
    """Succeed."""
    criu.say(Answer(type=RequestType.DUMP, success=True, restore=RestoreAnswer(pid=9)))


def no_notification(_: Notification) -> None:
    """Be called in no test."""
    raise AssertionError("a notification came")


def test_request_and_answer(stage: Callable[..., Stage]) -> None:
    """The request arrives as it was made, and the final answer is returned."""
    scene = stage(done)
    answer = scene.client.call(DUMP, no_notification)
    assert scene.criu.heard == [DUMP]
    assert answer.success
    assert answer.restore == RestoreAnswer(pid=9)


def test_an_answer_of_failure_is_returned(stage: Callable[..., Stage]) -> None:
    """An answer that says no is an answer: what it means is for the caller to say."""
    scene = stage(lambda criu: criu.say(Answer(type=RequestType.DUMP, success=False, errno=3, message="no")))
    answer = scene.client.call(DUMP, no_notification)
    assert (answer.success, answer.errno, answer.message) == (False, 3, "no")


def test_notifications(stage: Callable[..., Stage]) -> None:
    """Every notification is handed on in order, CRIU waiting, and is answered with yes."""
    answers: list[bool] = []

    def script(criu: Criu) -> None:
        answers.extend([criu.notify("pre-dump"), criu.notify("post-dump", 42)])
        # One without a body is a notification, too.
        criu.say(Answer(type=RequestType.NOTIFY, success=True))
        answers.append(bool(criu.listen().notify_success))
        done(criu)

    seen: list[tuple[str | None, int | None, int]] = []
    scene = stage(script)
    scene.client.call(DUMP, lambda each: seen.append((each.script, each.pid, len(answers))))
    assert seen == [("pre-dump", None, 0), ("post-dump", 42, 0), (None, None, 2)]
    assert answers == [True, True, True]


def test_refusal(stage: Callable[..., Stage]) -> None:
    """A callback that raises says no to CRIU, is not called again, and its exception comes after CRIU's last answer."""
    answers: list[bool] = []
    over = threading.Event()

    def script(criu: Criu) -> None:
        answers.extend([criu.notify("pre-dump"), criu.notify("post-dump"), criu.notify("post-resume")])
        over.set()
        criu.say(Answer(type=RequestType.DUMP, success=False))

    called: list[str | None] = []

    def refuse(notification: Notification) -> None:
        called.append(notification.script)
        if notification.script == "post-dump":
            raise KeyError("no")

    scene = stage(script)
    with pytest.raises(KeyError, match="no"):
        scene.client.call(DUMP, refuse)
    assert over.is_set()
    assert answers == [True, False, False]
    assert called == ["pre-dump", "post-dump"]


def test_a_refusal_that_criu_ignores(stage: Callable[..., Stage]) -> None:
    """The exception comes out even where CRIU's final answer says that all went well."""

    def script(criu: Criu) -> None:
        assert not criu.notify("pre-resume")
        done(criu)

    def refuse(_: Notification) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage(script).client.call(DUMP, refuse)


def test_refusal_and_hang_up(stage: Callable[..., Stage]) -> None:
    """Where CRIU dies after a refusal, the refusal is what is raised, and the death is its cause."""

    def script(criu: Criu) -> None:
        assert not criu.notify("post-dump")

    def refuse(_: Notification) -> None:
        raise KeyError("no")

    with pytest.raises(KeyError) as caught:
        stage(script).client.call(DUMP, refuse)
    assert isinstance(caught.value.__cause__, CriuGone)


def test_hang_up(stage: Callable[..., Stage]) -> None:
    """A CRIU that ends without an answer is gone, and nobody waits for it."""
    with pytest.raises(CriuGone, match="without an answer"):  # there is no deadline: waiting would be for ever
        stage(lambda _: None).client.call(DUMP, no_notification)


def test_gone_before_the_request() -> None:
    """A request to a CRIU that is no more fails at once."""
    ours, theirs = pair()
    theirs.close()
    client = Client(ours)
    with pytest.raises(CriuGone, match="no longer listens"):
        client.call(DUMP, no_notification)
    client.close()


@pytest.mark.parametrize("data", [b"\xff\xff", b"\x08\x01", b"\x0a\x00"])
def test_nonsense(stage: Callable[..., Stage], data: bytes) -> None:
    """What is no answer, or lacks what every answer has, counts as a CRIU that is gone."""

    def script(criu: Criu) -> None:
        criu.channel.send(data)

    with pytest.raises(CriuGone, match="makes no sense"):
        stage(script).client.call(DUMP, no_notification)


def wait_for_end(criu: Criu) -> None:
    """Say nothing until the client hangs up."""
    assert criu.channel.recv(1 << 16) == b""


def test_deadline(stage: Callable[..., Stage]) -> None:
    """A CRIU that says nothing until the deadline ends the call; hanging up tells it so."""
    scene = stage(wait_for_end, deadline=time.monotonic())
    with pytest.raises(TimeoutError, match="longer than its deadline"):
        scene.client.call(DUMP, no_notification)
    scene.client.close()
    scene.thread.join(PATIENCE)
    assert not scene.thread.is_alive()


def test_refusal_and_deadline(stage: Callable[..., Stage]) -> None:
    """A CRIU that does not come back from a refusal is left at the deadline, with the refusal raised."""

    def script(criu: Criu) -> None:
        assert not criu.notify("post-dump")
        wait_for_end(criu)

    def refuse(_: Notification) -> None:
        raise KeyError("no")

    scene = stage(script, deadline=time.monotonic())
    with pytest.raises(KeyError) as caught:
        scene.client.call(DUMP, refuse)
    assert isinstance(caught.value.__cause__, TimeoutError)


def test_an_answer_that_is_there_is_taken() -> None:
    """An answer that has come counts although the deadline has passed: the work is done."""
    ours, theirs = pair()
    done(Criu(theirs))
    client = Client(ours, deadline=time.monotonic() - 1)
    assert client.call(DUMP, no_notification).success
    client.close()
    theirs.close()


def test_check(stage: Callable[..., Stage]) -> None:
    """While the client waits it asks the check again and again, and what that raises ends the call."""
    asked = []

    def check() -> None:
        asked.append(time.monotonic())
        if len(asked) == 3:
            raise LookupError("stop")

    with pytest.raises(LookupError, match="stop"):
        stage(wait_for_end, check=check).client.call(DUMP, no_notification)
    assert len(asked) == 3


def test_check_that_has_nothing_to_say(stage: Callable[..., Stage]) -> None:
    """A check that returns does not disturb the call."""
    asked = threading.Event()

    def script(criu: Criu) -> None:
        assert asked.wait(PATIENCE)
        done(criu)

    assert stage(script, check=asked.set).client.call(DUMP, no_notification).success
