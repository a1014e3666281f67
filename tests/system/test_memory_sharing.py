"""Pages that forked processes share copy-on-write are found, whoever wrote to what afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from chrek.errors import CaptureFailed, Reason
from chrek.memory import Range, capture, shared_pages
from chrek.system.ids import HostPid, NsPid
from system.memory_child import BASE, PAGE, Child

PARENT, CHILD, GRANDCHILD, OTHER = NsPid(1), NsPid(2), NsPid(3), NsPid(4)
PAGES = 1500


@pytest.fixture(params=["small pages", "huge pages"])
def parent(request: pytest.FixtureRequest) -> Iterator[Child]:
    """Run a process with random memory that can fork."""
    with Child() as process:
        advice = "check(libc.madvise(BASE, N, 14))" if request.param == "huge pages" else "None"
        process(f"N = {PAGES * PAGE}\nanon(BASE, N)\n{advice}\nrandomise(BASE, N, 1)\nforked = []")
        yield process
        process("for pid in forked: os.kill(pid, 9); os.waitpid(pid, 0)")


def fork(parent: Child, body: str = "pass") -> HostPid:
    """Fork a child that runs *body*, and return its id once it has."""
    return HostPid(parent(f"forked.append(fork_child({body!r}))\nforked[-1]"))


def whole(*pids: NsPid) -> list[Range]:
    """Return the whole area in each of the processes."""
    return [Range(pid, BASE, PAGES * PAGE) for pid in pids]


def pages(found: Iterable[Range], pid: NsPid) -> set[int]:
    """Return the numbers of the pages found for one process."""
    return {
        (address - BASE) // PAGE for span in found if span.pid == pid for address in range(span.start, span.end, PAGE)
    }


@pytest.mark.parametrize("by_contents", [False, True], ids=["frames", "contents"])
def test_parent_and_child(parent: Child, by_contents: bool) -> None:
    """Both keep what neither has written since the fork, and nothing else."""
    child = fork(parent, "for n in range(0, 300, 3): put(BASE + n * PAGE, b'child')")
    parent("for n in range(600, 1400): put(BASE + n * PAGE, b'parent')")
    host = {PARENT: HostPid(parent.pid), CHILD: child}
    found = shared_pages({PARENT: None, CHILD: PARENT}, whole(*host), host_pids=host, by_contents=by_contents, close=0)
    expected = set(range(PAGES)) - set(range(0, 300, 3)) - set(range(600, 1400))
    assert pages(found, CHILD) == expected
    assert pages(found, PARENT) == expected


@pytest.mark.parametrize("by_contents", [False, True], ids=["frames", "contents"])
def test_three_generations(parent: Child, by_contents: bool) -> None:
    """What a middle process shares with either side is kept; what only its neighbours share is not."""
    body = (
        "put(BASE, b'child' * 8000)\n"  # 10 pages
        "second = fork_child('put(BASE + 20 * PAGE, bytes(5 * PAGE))')\n"
        "open(f'/proc/self/fd/{done}', 'wb', buffering=0).write(second.to_bytes(4, 'little'))"
    )
    pids = parent(
        "ready, done = os.pipe()\n"
        f"first = fork_child({body!r}.replace('done', str(done)))\n"
        "second = int.from_bytes(os.read(ready, 4), 'little')\n"
        "forked.append(first)\n"
        "[first, second]"
    )
    host = {PARENT: HostPid(parent.pid), CHILD: HostPid(pids[0]), GRANDCHILD: HostPid(pids[1])}
    tree = {PARENT: None, CHILD: PARENT, GRANDCHILD: CHILD}
    try:
        found = shared_pages(tree, whole(*host), host_pids=host, by_contents=by_contents, close=0)
    finally:
        parent(f"os.kill({pids[1]}, 9)")
    everything, written, zeroed = set(range(PAGES)), set(range(10)), set(range(20, 25))
    assert pages(found, PARENT) == everything - written
    assert pages(found, CHILD) == everything
    assert pages(found, GRANDCHILD) == everything - zeroed


def test_ten_workers_are_found_quickly_and_each_page_once(parent: Child) -> None:
    """A page shared with ten children is named once for each process."""
    host = {NsPid(10 + n): fork(parent) for n in range(10)} | {PARENT: HostPid(parent.pid)}
    tree = {pid: None if pid == PARENT else PARENT for pid in host}
    found = shared_pages(tree, whole(*host), host_pids=host)
    assert found == [Range(pid, BASE, PAGES * PAGE) for pid in sorted(host)]


def test_only_the_ranges_are_named(parent: Child) -> None:
    """Each side keeps its shared pages inside its own ranges, wherever the other side keeps them."""
    host = {PARENT: HostPid(parent.pid), CHILD: fork(parent)}
    mine = [Range(CHILD, BASE + 2 * n * PAGE, PAGE) for n in range(PAGES // 2)]
    upper = [Range(PARENT, BASE, 100 * PAGE)]
    found = shared_pages({CHILD: PARENT}, [*mine, *upper], host_pids=host, close=0)
    assert pages(found, CHILD) == set(range(0, PAGES, 2))
    assert pages(found, PARENT) == set(range(100))


def test_small_holes_are_named_too(parent: Child) -> None:
    """Holes of up to the given number of pages do not cut a run, larger ones do."""
    child = fork(parent, "for n in (10, 11, 12, 50, 51, 52, 53): put(BASE + n * PAGE, b'x')")
    host = {PARENT: HostPid(parent.pid), CHILD: child}
    found = shared_pages({CHILD: PARENT}, whole(*host), host_pids=host, close=3)
    for pid in host:
        assert pages(found, pid) == set(range(PAGES)) - {50, 51, 52, 53}
    assert len(found) == 4


def test_strangers_share_nothing(parent: Child) -> None:
    """Equal contents in pages that were never one are not sharing, and a parent outside the tree is no parent."""
    with Child() as other:
        other(f"anon(BASE, {PAGES * PAGE})\nrandomise(BASE, {PAGES * PAGE}, 1)")
        host = {PARENT: HostPid(parent.pid), OTHER: HostPid(other.pid)}
        for contents in (False, True):
            found = shared_pages({PARENT: None, OTHER: PARENT}, whole(*host), host_pids=host, by_contents=contents)
            assert found == []
        assert shared_pages({OTHER: NsPid(99)}, whole(OTHER), host_pids=host) == []


def test_a_process_that_is_gone(parent: Child) -> None:
    """A dead process is an error with its name."""
    child = fork(parent)
    parent("os.kill(forked[-1], 9)\nos.waitpid(forked.pop(), 0)")
    with pytest.raises(CaptureFailed, match=str(child)) as caught:
        shared_pages({CHILD: PARENT}, whole(CHILD), host_pids={PARENT: HostPid(parent.pid), CHILD: child})
    assert caught.value.reason is Reason.MEMORY_UNREADABLE


@pytest.mark.parametrize("written", [set(), {100}], ids=["parent whole", "parent written"])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_capture_leaves_sharing_as_it_was(parent: Child, tmp_path: Path, written: set[int], workers: int) -> None:
    """Reading the memory of forked processes does not give each of them pages of its own."""
    # One child that writes has its huge page in parts while the parent has it whole.
    host = {NsPid(10 + n): fork(parent, f"put(BASE + {n} * PAGE, b'x')") for n in range(workers)}
    for page in written:  # children still share the old page among themselves
        parent(f"put(BASE + {page} * PAGE, b'parent')")
    host[PARENT] = HostPid(parent.pid)
    trees: list[dict[NsPid, NsPid | None]] = [{pid: None if pid == PARENT else PARENT for pid in host}]
    if workers > 1:
        trees.append({NsPid(11): NsPid(10)})
    before = [shared_pages(tree, whole(*host), host_pids=host, close=0) for tree in trees]
    fd = os.open(tmp_path, os.O_RDONLY)
    captured = capture(whole(*host), host_pids=host, folder=fd)
    os.close(fd)
    assert captured.stored == len(host) * PAGES * PAGE
    assert [shared_pages(tree, whole(*host), host_pids=host, close=0) for tree in trees] == before
    assert len(pages(before[0], PARENT)) >= PAGES - 2
    if workers > 1:
        assert pages(before[1], NsPid(10)) == set(range(PAGES)) - {0, 1}
