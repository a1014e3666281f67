"""The one place where the official client is configured, called and its errors are translated.

The client's models are half typed (every field optional, most functions untyped), so it is `Any` here and
everything that leaves this package is a value of our own.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from chrek.errors import ChrekError, Reason

_client: Any = importlib.import_module("kubernetes.client")
_config: Any = importlib.import_module("kubernetes.config")
_urllib3: Any = importlib.import_module("urllib3")

SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TIMEOUT: Final = (5.0, 30.0)
"""Seconds to connect, and to wait for an answer; watches have their own."""

FORBIDDEN: Final = 403
NOT_FOUND: Final = 404
CONFLICT: Final = 409

_DENIED: Final = re.compile(r'cannot ([a-z]+) resource "([^"]+)"')


class ApiFailed(ChrekError):
    """A request to the Kubernetes API did not succeed.

    Attributes:
        status: HTTP status, or None when nobody answered.
    """

    def __init__(self, message: str, *, status: int | None, cure: str | None = None) -> None:
        super().__init__(Reason.API_FAILED, message, cure=cure)
        self.status = status

    @property
    def denied(self) -> bool:
        """Whether it will be refused again until somebody changes the agent's rights."""
        return self.status == FORBIDDEN


class Api:
    """A connection to the API server, with the groups that are used.

    Safe to use from several threads.
    """

    def __init__(self, configuration: Any) -> None:  # noqa: ANN401 - the client's type
        # A node that is cut off leaves connections half open: the kernel notices, we would not.
        configuration.keep_alive = True
        self._client = _client.ApiClient(configuration)
        self.core: Any = _client.CoreV1Api(self._client)
        self.coordination: Any = _client.CoordinationV1Api(self._client)

    @classmethod
    def connect(cls, kubeconfig: Path | None = None) -> Api:
        """Connect as the pod's service account, or as a kubeconfig says.

        Raises:
            ApiFailed: there is neither; nothing is sent yet.
        """
        configuration = _client.Configuration()
        try:
            if kubeconfig is not None:
                _config.load_kube_config(str(kubeconfig), client_configuration=configuration)
            else:
                _config.load_incluster_config(client_configuration=configuration)
        except _config.ConfigException as error:
            raise ApiFailed(
                f"No way into the Kubernetes API: {error}.",
                status=None,
                cure="Run in a pod with a service account token, or give a kubeconfig.",
            ) from error
        return cls(configuration)

    def close(self) -> None:
        """Close idle connections."""
        self._client.close()


def own_namespace() -> str | None:
    """Return the namespace of the pod this process runs in, or None outside a pod."""
    try:
        return (SERVICE_ACCOUNT / "namespace").read_text(encoding="ascii").strip()
    except OSError:
        return None


@contextlib.contextmanager
def calling(what: str) -> Iterator[None]:
    """Translate what the client raises; *what* finishes the sentence "cannot ...".

    Raises:
        ApiFailed: with the status and the server's own words.
    """
    try:
        yield
    except (_client.exceptions.ApiException, _urllib3.exceptions.HTTPError, OSError) as error:
        raise failure(what, error) from error


def failure(what: str, error: Exception) -> ApiFailed:
    """Return the client's exception as one of ours; *what* as for `calling`."""
    if isinstance(error, _client.exceptions.ApiException):
        words = _words(error)
        return ApiFailed(f"Cannot {what}: {words}", status=error.status or None, cure=_cure(error.status, words))
    return ApiFailed(f"Cannot {what}: the API server does not answer: {error}", status=None)


def _cure(status: int, words: str) -> str | None:
    """Return what to grant, None when it is not about rights."""
    found = _DENIED.search(words)
    if status != FORBIDDEN or found is None:
        return None
    return f"Grant the agent's service account {found[1]} of {found[2]}: the chart's role has it (rbac.create)."


def _words(error: Any) -> str:  # noqa: ANN401 - the client's exception
    """Status, reason, and the message of the server's Status object."""
    message = ""
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        message = json.loads(error.body).get("message", "")
    return f"{error.status} {error.reason}{': ' if message else ''}{message}"
