"""Which image a container was made of, as `checkpoint-enable` wrote it into the image itself.

Inside a pod nobody can ask a runtime for an image's digest; this file is what a restore from inside can know. The
workload may have changed it, so a difference refuses a restore, and no difference proves nothing.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from chrek.engine.container import Container

PATH: Final = "/opt/chrek/image.json"
_LONGEST: Final = 256


def build_id(container: Container) -> str | None:
    """Return the build id of a container's image, None where the image says none.

    Raises:
        Refused: ``APP_NOT_FOUND``, the container is gone.
    """
    with suppress(ValueError, RecursionError):
        found = json.loads(container.read_file(PATH) or b"null")
        value = found.get("build_id") if isinstance(found, dict) else None
        if isinstance(value, str) and value and len(value) <= _LONGEST and value.isprintable():
            return value
    return None
