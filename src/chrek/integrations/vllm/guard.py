"""Keep strangers away from the paths that vLLM's development mode opens.

Sleeping and waking up over HTTP need ``VLLM_SERVER_DEV_MODE=1``, which also opens paths that run code in
the workers (``/collective_rpc``). With the launcher those answer only whoever shows its token; the paths
of the ordinary API answer everyone, as without ChReK. An unknown path counts as one of development.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

TOKEN_VARIABLE = "CHREK_VLLM_TOKEN"  # noqa: S105 - the name of a variable
PATHS_VARIABLE = "CHREK_VLLM_PATHS"
HEADER = b"x-chrek-token"
PUBLIC = (
    "/v1",
    "/v2",
    "/health",
    "/ping",
    "/load",
    "/version",
    "/metrics",
    "/docs",
    "/redoc",
    "/openapi.json",
    "/tokenize",
    "/detokenize",
    "/pooling",
    "/classify",
    "/score",
    "/rerank",
    "/invocations",
    "/inference",
)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Guard:
    """ASGI middleware for ``vllm serve --middleware chrek.integrations.vllm.guard.Guard``."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._token = os.environ.get(TOKEN_VARIABLE, "").encode()
        more = os.environ.get(PATHS_VARIABLE, "").split(",")
        self._public = (*PUBLIC, *(path.strip() for path in more if path.strip()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 404 as a server without development mode does."""
        if scope["type"] == "lifespan" or self._may(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await send(
                {"type": "http.response.start", "status": 404, "headers": [(b"content-type", b"application/json")]}
            )
            await send({"type": "http.response.body", "body": b'{"detail":"Not Found"}'})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _may(self, scope: Scope) -> bool:
        path = str(scope["path"])
        if any(path == public or path.startswith(f"{public}/") for public in self._public):
            return True
        shown = dict(scope["headers"]).get(HEADER, b"")
        return bool(self._token) and hmac.compare_digest(shown, self._token)
