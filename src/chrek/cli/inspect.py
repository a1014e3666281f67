"""``chrek inspect ID``: what a checkpoint holds, and where the time of its capture went."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from chrek.cli import options, output

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from chrek.artifact import Checkpoint, Manifest
    from chrek.artifact.manifest import Process
    from chrek.engine.contents import Contents

_WIDTH = 40
_INSIDE = {"frozen": "dump", "memory": "frozen", "digest": "finish"}
"""Phases of a capture that happen within another one."""
_MOST_FILES = 20


@click.command()
@options.id_argument
@click.option("--files", "all_files", is_flag=True, help="Show all open files, not only the first of each process.")
@options.store_option
@options.json_option
def command(*, checkpoint_id: str, all_files: bool, store: str, as_json: bool) -> None:
    """Show what a checkpoint holds: processes, memory by kind, files, sockets, and the times of its capture."""
    from chrek.engine import contents
    from chrek.store import open_checkpoint

    with options.open_store(store) as opened, open_checkpoint(opened, checkpoint_id) as checkpoint:
        held = contents.read(checkpoint)
        if as_json:
            output.emit(_members(checkpoint, held))
        else:
            _show(checkpoint, held, most=1 << 30 if all_files else _MOST_FILES)


def _show(checkpoint: Checkpoint, held: Contents, *, most: int) -> None:
    manifest = checkpoint.manifest
    _section(f"Checkpoint {manifest.checkpoint_id}", _about(checkpoint))
    _section("Processes", _tree(manifest))
    _section("Memory", _memory(held).splitlines())
    _section("Sockets", [f"{file.pid} fd {file.number}: {file.name}" for file in held.sockets])
    _section("Open files", _files(held, most))
    _section("Volumes", [f"{volume.path} ({volume.kind})" for volume in manifest.volumes])
    times = manifest.provenance
    _section(f"Times of the capture (frozen for {output.seconds(times.frozen_seconds)})", waterfall(times.phases))
    _section("Warnings of the capture", times.warnings)


def _section(title: str, lines: Iterable[str]) -> None:
    lines = list(lines)
    if lines:
        click.echo(title)
        for line in lines:
            click.echo(f"  {output.clean(line)}")


def _about(checkpoint: Checkpoint) -> list[str]:
    manifest = checkpoint.manifest
    origin, memory = manifest.provenance, manifest.memory
    zeros, needed = output.size(memory.zero_bytes), len(manifest.open_files)
    lines = [
        f"command   {output.short(output.command_line(origin.command), 200)}",
        f"taken     {manifest.created} on {origin.host}, Linux {origin.kernel}, {manifest.facts.architecture}",
        f"by        ChReK {origin.chrek}, CRIU {origin.criu}, format {manifest.format_version}, {memory.mode} dump",
        f"stored    {output.size(manifest.stored_bytes)} in {len(manifest.files)} files at {checkpoint.path}",
        f"memory    {output.size(memory.stored_bytes)} in {len(memory.shards)} shards, {zeros} of zeros left out",
        f"needs     {output.size(manifest.facts.memory_bytes)} of memory, {needed} files that must be there again",
    ]
    lines += [f"GPU       {gpu.model}, driver {gpu.driver}, {gpu.uuid}" for gpu in manifest.facts.gpus or ()]
    if origin.image:
        lines.append(f"image     {origin.image}")
    if origin.namespace:
        lines.append(f"tenant    {origin.namespace}/{origin.service_account or 'default'}")
    return lines


def _tree(manifest: Manifest) -> list[str]:
    children: dict[int, list[Process]] = {}
    root = manifest.application.root_pid
    for process in manifest.application.processes:
        children.setdefault(process.ppid if process.pid != root else 0, []).append(process)
    lines: list[str] = []
    queue = [(process, 0) for process in reversed(children.get(0, []))]
    while queue:
        process, depth = queue.pop()
        threads = f", {process.threads} threads" if process.threads > 1 else ""
        about = f"{output.size(process.memory_bytes)}{threads}, uid {process.uid}"
        lines.append(f"{'  ' * depth}{process.pid} {output.short(output.command_line(process.command), 70)} ({about})")
        queue += [(child, depth + 1) for child in reversed(children.get(process.pid, []))]
    return lines


def _memory(held: Contents) -> str:
    sums: dict[str, list[int]] = {}
    for part in held.memory:
        total = sums.setdefault(part.kind, [0, 0])
        total[0] += part.mapped
        total[1] += part.stored
    rows = [
        (kind, output.size(mapped), output.size(stored))
        for kind, (mapped, stored) in sorted(sums.items(), key=lambda item: -item[1][1])
    ]
    return output.table(("KIND", "MAPPED", "STORED"), rows, right=(1, 2)) if rows else ""


def _files(held: Contents, most: int) -> list[str]:
    lines, count = [], 0
    for file in held.files:
        count += 1
        if count <= most:
            lines.append(f"{file.pid} fd {file.number}: {file.kind} {file.name}".rstrip())
    if count > most:
        lines.append(f"... and {count - most} more (--files shows them)")
    return lines


def waterfall(phases: Mapping[str, float]) -> list[str]:
    """Return one line a phase, with a bar where in the whole it was; those inside another end with it."""
    begins: dict[str, float] = {}
    at = 0.0
    for name in phases:
        if name not in _INSIDE or _INSIDE[name] not in phases:
            begins[name] = at
            at += phases[name]
    scale = _WIDTH / at if at else 0
    lines: list[str] = []

    def add(name: str, depth: int, begin: float) -> None:
        left, length = int(begin * scale), max(int(phases[name] * scale + 0.5), 1)
        bar = " " * min(left, _WIDTH - 1) + "#" * max(min(length, _WIDTH - left), 1)
        lines.append(f"{'  ' * depth + name:<14}{phases[name]:8.3f} s  |{bar:<{_WIDTH}}|")
        for inner, outer in _INSIDE.items():
            if outer == name and inner in phases:
                add(inner, depth + 1, max(begin + phases[name] - phases[inner], begin))

    for name, begin in begins.items():
        add(name, 0, begin)
    return lines


def _members(checkpoint: Checkpoint, held: Contents) -> dict[str, object]:
    manifest = checkpoint.manifest
    origin, memory = manifest.provenance, manifest.memory
    return {
        "id": manifest.checkpoint_id,
        "path": checkpoint.path,
        "created": manifest.created,
        "format_version": manifest.format_version,
        "command": list(origin.command),
        "host": origin.host,
        "kernel": origin.kernel,
        "criu": origin.criu,
        "chrek": origin.chrek,
        "image": origin.image,
        "gpus": [{"uuid": gpu.uuid, "model": gpu.model, "driver": gpu.driver} for gpu in manifest.facts.gpus or ()],
        "stored_bytes": manifest.stored_bytes,
        "files": len(manifest.files),
        "memory": {
            "mode": memory.mode,
            "bytes": memory.bytes,
            "stored_bytes": memory.stored_bytes,
            "zero_bytes": memory.zero_bytes,
            "needed_bytes": manifest.facts.memory_bytes,
            "kinds": [
                {"pid": part.pid, "kind": part.kind, "mapped_bytes": part.mapped, "stored_bytes": part.stored}
                for part in held.memory
            ],
        },
        "processes": [
            {
                "pid": process.pid,
                "ppid": process.ppid,
                "command": list(process.command),
                "threads": process.threads,
                "memory_bytes": process.memory_bytes,
                "uid": process.uid,
                "gid": process.gid,
            }
            for process in manifest.application.processes
        ],
        "open_files": [
            {"pid": file.pid, "fd": file.number, "kind": file.kind, "name": file.name} for file in held.files
        ],
        "volumes": [{"path": volume.path, "kind": volume.kind} for volume in manifest.volumes],
        "phases": dict(origin.phases),
        "frozen_seconds": origin.frozen_seconds,
        "warnings": list(origin.warnings),
    }
