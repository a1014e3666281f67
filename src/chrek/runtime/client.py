"""The CRI client: a unary gRPC call for each question.

grpcio carries the bytes; the messages are our own (`chrek.runtime.messages`), so no code is generated.

Odd facts:

- gRPC makes a URL's authority out of a socket's path, which Go servers refuse since grpc-go 1.57
  ("malformed :authority"): one is set.
- A process with open channels must not go on using them after a fork; the agent forks. grpcio's own fork
  handlers wait for other threads, so they are switched off; a child only ever executes another program.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from chrek.errors import ChrekError, Reason, Refused
from chrek.runtime import sockets
from chrek.runtime.container import CONTAINER_NAME, POD_UID, Container, from_status
from chrek.runtime.messages import (
    SERVICE,
    Filter,
    ListRequest,
    ListResponse,
    Pair,
    State,
    StateValue,
    StatusRequest,
    StatusResponse,
    VersionRequest,
    VersionResponse,
)
from chrek.system.protobuf import Message, WireError

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc  # type: ignore[import-untyped]

_OPTIONS = (
    ("grpc.default_authority", "localhost"),
    ("grpc.enable_http_proxy", 0),
    # The kubelet's own limit; a verbose status holds the whole runtime spec.
    ("grpc.max_receive_message_length", 16 << 20),
    # gRPC waits up to two minutes between attempts to connect; a runtime is back from a restart in a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)

_Answer = TypeVar("_Answer", bound=Message)


class Runtime:
    """The container runtime behind one socket.

    Args:
        socket: its path as this process sees it.
        timeout: seconds for one call.
    """

    def __init__(self, socket: Path, *, timeout: float = 10.0) -> None:
        self.socket = socket
        self._timeout = timeout
        self._channel: Any = grpc.insecure_channel(f"unix:{socket}", options=_OPTIONS)

    @classmethod
    def find(cls, configured: str | None = None, *, root: Path = Path("/"), timeout: float = 10.0) -> Self:
        """Return the first runtime that speaks CRI; see `chrek.runtime.sockets` for where is looked.

        Raises:
            ChrekError: RUNTIME_UNREACHABLE, none does; the message has what each socket said.
        """
        tried = sockets.candidates(configured, root=root)
        complaints = []
        for socket in sockets.existing(tried):
            runtime = cls(socket, timeout=timeout)
            try:
                runtime.version()
            except ChrekError as error:
                runtime.close()
                complaints.append(error.message)
            else:
                return runtime
        said = " ".join(complaints) or f"None of {', '.join(map(str, tried))} is a socket."
        raise ChrekError(Reason.RUNTIME_UNREACHABLE, f"No container runtime answers. {said}")

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def version(self) -> str:
        """Return the runtime's name and version, for example ``containerd v2.2.9``.

        Raises:
            ChrekError: RUNTIME_UNREACHABLE.
        """
        answer = self._call("Version", VersionRequest(), VersionResponse, patient=False)
        return f"{answer.runtime_name} {answer.runtime_version}"

    def container(self, container_id: str) -> Container:
        """Return a running container by its id, with or without the scheme the API puts before it.

        Raises:
            Refused: CONTAINER_GONE, there is none or it does not run.
            ChrekError: RUNTIME_UNREACHABLE.
        """
        plain = container_id.rpartition("://")[2]
        return from_status(self._call("ContainerStatus", StatusRequest(plain, verbose=True), StatusResponse))

    def container_of(self, *, pod_uid: str, name: str) -> Container:
        """Return the running container *name* of a pod.

        Raises:
            Refused: CONTAINER_GONE, the pod has no such container that runs.
            ChrekError: RUNTIME_UNREACHABLE.
        """
        labels = [Pair(POD_UID, pod_uid), Pair(CONTAINER_NAME, name)]
        wanted = Filter(state=StateValue(State.RUNNING), labels=labels)
        found = self._call("ListContainers", ListRequest(wanted), ListResponse).containers
        if not found:
            raise Refused(Reason.CONTAINER_GONE, f"No container {name} of pod {pod_uid} runs on this node.")
        # While one start replaces another both may be listed for an instant.
        newest = max(found, key=lambda each: (each.metadata.attempt if each.metadata else None) or 0)
        return self.container(newest.id or "")

    def _call(self, method: str, request: Message, answer: type[_Answer], *, patient: bool = True) -> _Answer:
        """Ask; a patient caller also waits, within the timeout, for a runtime that is being restarted."""
        call: Callable[..., _Answer] = self._channel.unary_unary(
            f"{SERVICE}/{method}", request_serializer=Message.encode, response_deserializer=answer.decode
        )
        try:
            return call(request, timeout=self._timeout, wait_for_ready=patient)
        except grpc.RpcError as error:
            raise self._translated(method, error) from error
        except WireError as error:
            raise ChrekError(
                Reason.RUNTIME_UNREACHABLE, f"{self.socket}: the answer to {method} makes no sense: {error}."
            ) from error

    def _translated(self, method: str, error: Any) -> ChrekError:  # noqa: ANN401 - grpcio has no types
        code, details = error.code(), error.details()
        if code == grpc.StatusCode.NOT_FOUND:
            return Refused(Reason.CONTAINER_GONE, f"The container runtime does not know it: {details}.")
        return ChrekError(Reason.RUNTIME_UNREACHABLE, f"{self.socket}: {method}: {code.name}: {details}.")
