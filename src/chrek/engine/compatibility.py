"""Whether a checkpoint can be restored in this container; asked before anything is applied.

Each difference says what was expected and what is here. Those that a restore cannot survive are
refused unless the user allows their reason; the others become warnings.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING

from chrek.engine import facts, gpu, imagefacts
from chrek.engine.container import closing_fd
from chrek.errors import Reason, Refused
from chrek.system import cgroups, procfs

if TYPE_CHECKING:
    from chrek.artifact import Manifest, OpenFile
    from chrek.engine.container import Container

_SHOWN = 5

IGNORED_VARIABLES = ("DYN_", "CRIU_", "CHREK_", "POD_", "NODE_", "NVIDIA_")
_IGNORED_NAMES = {
    *("HOSTNAME", "CUDA_VISIBLE_DEVICES", "CUDA_PLUGIN_DIR", "WAIT_FOR_CHECKPOINT", "RESTORE_WAIT_TIMEOUT", "DEBUG"),
}
"""Variables that differ between any two pods, or that are ChReK's own."""


def check(manifest: Manifest, container: Container, *, allow: Collection[Reason]) -> list[str]:
    """Compare the checkpoint's facts with this machine and container; return warnings.

    Raises:
        Refused: with the reason of the first difference that is not in *allow*.
    """
    warnings = []
    for reason, difference in CHECKS:
        text = difference(manifest, container)
        if text is None:
            continue
        if reason not in allow:
            raise Refused(reason, text)
        warnings.append(f"{reason.code} was allowed: {text}")
    names = changed_variables(manifest, container)
    if names:
        warnings.append(f"environment variables differ from the checkpoint's, whose values stay: {', '.join(names)}")
    return warnings


def machine_lacks(manifest: Manifest) -> tuple[Reason, str] | None:
    """Return what keeps a checkpoint from being restored in whatever container of this machine, None: nothing that is known."""
    for reason, difference in ((Reason.ARCH_MISMATCH, _architecture), (Reason.CPU_MISMATCH, _cpu)):
        text = difference(manifest)
        if text is not None:
            return reason, text
    return gpu.machine_lacks(manifest)


def _architecture(manifest: Manifest, _: Container | None = None) -> str | None:
    here = platform.machine()
    wanted = manifest.facts.architecture
    return None if wanted == here else f"The checkpoint was taken on {wanted}; this machine is {here}."


def _cpu(manifest: Manifest, _: Container | None = None) -> str | None:
    missing = sorted(set(manifest.facts.cpu_features) - set(facts.cpu_features()))
    return f"This machine's processor lacks {', '.join(missing)}." if missing else None


def _memory(manifest: Manifest, container: Container) -> str | None:
    limit, needed = cgroups.memory_limit(container.pid1), manifest.facts.memory_bytes
    if limit is None or needed <= limit:
        return None
    return f"The application had {needed} bytes of memory; the container's limit is {limit}. Set it to {needed} or more."


def _image(manifest: Manifest, container: Container) -> str | None:
    """Compare the build ids that both images say; where one says none the files decide alone."""
    wanted, here = manifest.provenance.build_id, imagefacts.build_id(container)
    if wanted is None or here is None or wanted == here:
        return None
    return f"The checkpoint was taken of the image with build id {wanted}; this container's has {here}."


def _image_files(manifest: Manifest, container: Container) -> str | None:
    return _differences(container, [file for file in manifest.open_files if file.mount == "/"])


def _mounted_files(manifest: Manifest, container: Container) -> str | None:
    return _differences(container, [file for file in manifest.open_files if file.mount != "/"])


def _differences(container: Container, files: Iterable[OpenFile]) -> str | None:
    with closing_fd(container.open_root()) as root:
        return _listed([text for file in files if (text := _difference(root, file))])


def _listed(wrong: list[str]) -> str | None:
    if not wrong:
        return None
    more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    return f"{'; '.join(wrong[:_SHOWN])}{more}."


def _difference(root: int, file: OpenFile) -> str | None:
    here = facts.describe(root, file.path)
    if here is None:
        return f"{file.path} is missing here"
    size, build_id = here
    if file.build_id is not None and build_id != file.build_id:
        return f"{file.path} has build id {build_id or 'none'}, not {file.build_id}"
    if size != file.size:
        return f"{file.path} has {size} bytes, not {file.size}"
    return None


def changed_variables(manifest: Manifest, container: Container) -> list[str]:
    """Return the names of variables that one of the two environments has and the other has not.

    Values are never compared one by one: the manifest has none.
    """
    recorded = manifest.application.environment
    if recorded is None:
        return []
    return sorted(name for name in set(recorded.names) ^ set(container.environment) if not _is_ignored(name))


def _is_ignored(name: str) -> bool:
    service = "_SERVICE_" in name or "_PORT" in name
    return service or name in _IGNORED_NAMES or name.startswith(IGNORED_VARIABLES)


def _user_namespace(_: Manifest, container: Container) -> str | None:
    theirs, ours = procfs.namespace(container.pid1, "user"), procfs.namespace(os.getpid(), "user")
    return None if theirs == ours else f"The container is in user namespace {theirs}, this program in {ours}."


CHECKS: tuple[tuple[Reason, Callable[[Manifest, Container], str | None]], ...] = (
    (Reason.ARCH_MISMATCH, _architecture),
    (Reason.CPU_MISMATCH, _cpu),
    (Reason.USER_NAMESPACE, _user_namespace),
    (Reason.MEMORY_LIMIT, _memory),
    (Reason.IMAGE_MISMATCH, _image),
    (Reason.IMAGE_MISMATCH, _image_files),
    (Reason.MOUNT_MISSING, _mounted_files),
)
