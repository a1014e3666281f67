"""Capture: save a running application and let it run on.

The order, each step undone in reverse when a later one fails::

    preflight     facts and refusals; nothing is touched
    staging       the id's lock, a directory nobody reads
    dump          CRIU stops the tree and writes its images
      frozen        memory, file changes and volumes are copied (`freeze`)
    (thaw)        the application runs again
    finish        connections to outside are closed in the images; digests; manifest
    publish       flushed, renamed into place

The source survives whatever fails: until CRIU has answered, our death or a false answer makes it roll
back; afterwards nothing of the application is touched any more.
"""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import chrek
from chrek.artifact import FileEntry, Manifest, Memory, OpenFile, Provenance, timestamp
from chrek.criu import limits
from chrek.criu.bundle import Bundle
from chrek.criu.files import loosen_external_files
from chrek.criu.process import Criu, CriuFailed, Settings
from chrek.criu.sessions import adopt_leaderless_sessions
from chrek.criu.sockets import close_foreign_connections
from chrek.cuda import handover
from chrek.engine import facts, freeze, gpu, imagefacts, sidefiles, streams
from chrek.engine.container import Container, ns_pid
from chrek.engine.estimate import Estimate, estimate
from chrek.engine.preflight import Subject, refuse
from chrek.engine.progress import Progress
from chrek.errors import CaptureFailed, Reason, Refused
from chrek.memory.adopt import adopt_pages_images
from chrek.memory.digest import digest
from chrek.memory.shard import Folders, write_index
from chrek.store.opening import identity
from chrek.store.staging import Published, Staging
from chrek.system import procfs
from chrek.system.cgroups import OwnGroup

if TYPE_CHECKING:
    from chrek.criu.messages import Notification
    from chrek.store.layout import Store
    from chrek.system.ids import HostPid

DUMP_LOG = "dump.log"
STATISTICS = "stats-dump"
"""CRIU's own timings; those in the manifest say more."""


@dataclass(frozen=True)
class Request:
    """What to capture, and how.

    Attributes:
        pid1: PID 1 of the container.
        store, checkpoint_id: where the checkpoint goes.
        location: what the marker says as the checkpoint's path (default: the path in the store).
        mode: ``auto`` takes a lazy dump where the limits allow it, else a plain one.
        allow: refusals that the user overrides.
        exclude: patterns of files to leave out.
        image, namespace, service_account: provenance, where known.
        extra: further keys for the marker, such as a pod's UID.
        instead_of: `chrek.store.identity` of what this checkpoint takes the place of; None takes the place of anything.
    """

    pid1: HostPid
    store: Store
    checkpoint_id: str
    location: str | None = None
    mode: Literal["auto", "lazy", "plain"] = "auto"
    allow: frozenset[Reason] = frozenset()
    exclude: tuple[str, ...] = ()
    settings: Settings = Settings()
    workers: int | None = None
    image: str | None = None
    namespace: str | None = None
    service_account: str | None = None
    extra: Mapping[str, object] = field(default_factory=dict)
    instead_of: str | None = None


@dataclass(frozen=True)
class Outcome:
    """A capture that worked; times in seconds, sizes in bytes."""

    published: Published
    seconds: float
    frozen_seconds: float
    memory_bytes: int
    stored_bytes: int
    phases: Mapping[str, float]
    warnings: tuple[str, ...]


def capture(request: Request, progress: Progress | None = None) -> Outcome:
    """Save the application of a container.

    Raises:
        Refused: it cannot be captured; nothing was touched.
        CaptureFailed: it did not work; the application runs on.
    """
    progress = progress or Progress()
    began = time.monotonic()
    with progress.phase("preflight"):
        found = _preflight(request)
    need = found.need
    with Staging.create(request.store, request.checkpoint_id, need=need.bytes, largest_file=need.largest_file) as staging:
        # Only now, with the id's lock held, can nobody come in between.
        if request.instead_of not in (None, identity(request.store, request.checkpoint_id)):
            message = f"Checkpoint {request.checkpoint_id!r} was written by another process meanwhile."
            raise Refused(Reason.CAPTURE_IN_PROGRESS, message)
        with gpu.held(found.gpu, progress):
            frozen, frozen_seconds = _dump(request, found, staging, progress)
        with progress.phase("finish"):
            known, memory = _finish(request, need, frozen, staging, progress)
        with progress.phase("publish"):
            pids = {process.pid for process in frozen.application.processes}
            handover.adopt(request.store.fd, request.checkpoint_id, staging.fd, pids)
            files = staging.digest(known=known, workers=request.workers)
            manifest = Manifest(
                checkpoint_id=request.checkpoint_id,
                created=timestamp(time.time()),
                provenance=_provenance(request, found, progress, frozen, frozen_seconds),
                facts=facts.machine(need.resident, gpus=found.gpu.gpus if found.gpu else None),
                application=frozen.application,
                memory=memory,
                files=files,
                open_files=found.used,
                volumes=tuple(sorted(frozen.volumes, key=lambda volume: volume.path)),
                side_files=tuple(frozen.side_files),
            )
            progress.check()
            published = staging.publish(manifest, location=request.location, extra=request.extra)
            handover.discard(request.store.fd, request.checkpoint_id)
    return Outcome(
        published=published,
        seconds=time.monotonic() - began,
        frozen_seconds=frozen_seconds,
        memory_bytes=memory.bytes,
        stored_bytes=manifest.stored_bytes,
        phases=dict(progress.seconds),
        warnings=tuple(frozen.warnings) + published.warnings,
    )


@dataclass(frozen=True)
class _Found:
    """What the preflight found: the tree, a CRIU, how much there is, files that must be there again, GPUs.

    Command and image are among it because the application may end as soon as it runs again.
    """

    subject: Subject
    bundle: Bundle
    need: Estimate
    used: tuple[OpenFile, ...]
    gpu: gpu.Use | None
    command: tuple[str, ...]
    build_id: str | None


def _preflight(request: Request) -> _Found:
    container = Container(request.pid1)
    subject = Subject.gather(container, container.application())
    named = container.environment.get("DYN_CHECKPOINT_HASH")
    checkpoint_mode = "DYN_CHECKPOINT_SIGNAL_FILE" in container.environment
    if checkpoint_mode and named and named != request.checkpoint_id and Reason.ID_MISMATCH not in request.allow:
        message = f"Id {request.checkpoint_id!r} was asked for; the container's DYN_CHECKPOINT_HASH is {named!r}."
        raise Refused(Reason.ID_MISMATCH, message)
    refuse(subject, allow=request.allow)
    bundle = Bundle.find()
    bundle.require()
    paths = [path for path, _ in container.volumes]
    on_gpu = gpu.look(subject, allow=request.allow)
    need = estimate(subject, paths, mode=request.mode, on_gpu=on_gpu.bytes if on_gpu else 0)
    return _Found(
        subject=subject,
        bundle=bundle,
        need=need,
        used=facts.used_files(subject, paths),
        gpu=on_gpu,
        command=procfs.command_line(subject.tree[0]),
        build_id=imagefacts.build_id(container),
    )


def _dump(
    request: Request, found: _Found, staging: Staging, progress: Progress
) -> tuple[freeze.Frozen, float]:
    """Run CRIU; return what was copied, and for how long the application stood still."""
    subject, need = found.subject, found.need
    container, root = subject.container, subject.tree[0]
    with ExitStack() as stack:
        directories = {name: staging.make_directory(name) for name in ("images", "memory", "volumes", sidefiles.FOLDER)}
        for fd in directories.values():
            stack.callback(os.close, fd)
        plan = freeze.Plan(
            container=container,
            root=root,
            directory=staging.fd,
            images=directories["images"],
            folder=directories["memory"],
            links=directories[sidefiles.FOLDER],
            mode=need.mode,
            root_changes=container.has_own_root,
            volumes=container.volumes,
            exclude=request.exclude,
            workers=request.workers,
            gpu_processes=gpu.ns_pids(found.gpu),
            digest_now=need.digest_now,
        )
        group = stack.enter_context(OwnGroup(f"capture-{os.getpid()}"))
        criu = stack.enter_context(
            Criu(
                bundle=found.bundle,
                pid1=container.pid1,
                images=plan.images,
                work=staging.fd,
                log=DUMP_LOG,
                settings=request.settings,
                control_groups=group.descriptors,
                real_ids=limits.reading_ids(subject.tree),
                page_server=plan.mode == "lazy",
                check=progress.check,
            )
        )
        frozen: freeze.Frozen | None = None
        since = 0.0

        def serve(notification: Notification) -> None:
            nonlocal frozen, since
            if notification.script == "pre-dump":
                since = time.monotonic()
            elif notification.script == "post-dump":
                with progress.phase("frozen"):
                    frozen = freeze.copy(plan, progress)
                criu.end_pages()

        outside = [stream.key for stream in streams.external(container) if stream.declared]
        with progress.phase("dump"):
            try:
                criu.dump(ns_pid(root), serve, watched=subject.watched, external=outside)
            except CriuFailed as error:
                reason = Reason.TIMEOUT if error.timeout else Reason.DUMP_FAILED
                raise CaptureFailed(reason, f"CRIU could not dump the application: {error}.") from error
        if frozen is None:
            raise CaptureFailed(Reason.DUMP_FAILED, "CRIU ended well without having asked for the memory.")
        return frozen, time.monotonic() - since


def _finish(
    request: Request, need: Estimate, frozen: freeze.Frozen, staging: Staging, progress: Progress
) -> tuple[dict[str, FileEntry], Memory]:
    """Complete images and memory now that the application runs again; return the digests that are known."""
    images, folder = staging.make_directory("images"), staging.make_directory("memory")
    try:
        with suppress(FileNotFoundError):
            os.unlink(STATISTICS, dir_fd=staging.fd)
        loosen_external_files(images)
        closed = close_foreign_connections(images)
        if closed:
            frozen.warnings.append(f"{closed} TCP connections to outside will be closed in the restored application")
        leaders = adopt_leaderless_sessions(images)
        if leaders:
            frozen.warnings.append(f"processes {leaders} lead a session of their own once restored: theirs has no leader")
        limits = progress.limits("digest", request.workers)
        folders = Folders(folder, folder)
        if frozen.memory is not None:
            index = digest(frozen.memory.index, folders, only=frozen.memory.undigested, limits=limits)
            scanned, zero = frozen.memory.scanned, frozen.memory.zero
        else:
            index = adopt_pages_images(frozen.adopted, folders, limits=limits)
            scanned, zero = index.size, 0
        known = {**frozen.archives, **index.entries(), "memory/index": write_index(folder, index)}
        memory = Memory(
            mode=need.mode,
            bytes=scanned,
            stored_bytes=index.size,
            zero_bytes=zero,
            shards=tuple(file.path for file in index.files),
        )
    except OSError as error:
        raise CaptureFailed(Reason.WRITE_FAILED, f"The images could not be completed: {error}.") from error
    finally:
        os.close(images)
        os.close(folder)
    return known, memory


def _provenance(
    request: Request, found: _Found, progress: Progress, frozen: freeze.Frozen, frozen_seconds: float
) -> Provenance:
    return Provenance(
        command=found.command,
        host=socket.gethostname(),
        kernel=platform.release(),
        criu=".".join(map(str, found.bundle.version())),
        chrek=chrek.__version__,
        image=request.image,
        build_id=found.build_id,
        namespace=request.namespace,
        service_account=request.service_account,
        phases={name: round(seconds, 4) for name, seconds in progress.seconds.items()},
        frozen_seconds=round(frozen_seconds, 4),
        warnings=tuple(frozen.warnings) + (found.gpu.warnings if found.gpu else ()),
    )
