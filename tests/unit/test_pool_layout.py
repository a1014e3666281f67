"""The index of a pool: cutting memory into blobs, writing it down, reading it back."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chrek.workload.pool import PoolError
from chrek.workload.pool.layout import BLOB, BLOCK, Index, Region, from_json, plan

REGIONS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5 * BLOB // 16)), max_size=4)


def make_index(sizes: list[tuple[int, int]]) -> Index:
    """An index with made-up digests; every third block is zeros."""
    regions = [Region(device, 0x7F0000000000 + (i << 36), size * 16) for i, (device, size) in enumerate(sizes)]
    index = Index("weights", "lanes128", regions, plan(regions))
    for number, block in enumerate(block for blob in index.blobs for block in blob.blocks):
        block.zero = number % 3 == 2
        block.digest = None if block.zero else number.to_bytes(16, "big")
    return index


@given(REGIONS)
def test_blobs_cover_the_regions(sizes: list[tuple[int, int]]) -> None:
    """Blocks follow each other without gap or overlap, inside one region, within the limits."""
    index = make_index(sizes)
    covered = {region.address: 0 for region in index.regions}
    for blob in index.blobs:
        assert sum(block.size for block in blob.blocks) <= BLOB
        start = max(address for address in covered if address <= blob.blocks[0].address)
        for block in blob.blocks:
            assert block.address == start + covered[start]
            assert 0 < block.size <= BLOCK
            covered[start] += block.size
    assert covered == {region.address: region.size for region in index.regions}


@given(REGIONS)
def test_the_index_round_trips(sizes: list[tuple[int, int]]) -> None:
    """What is written is what is read."""
    index = make_index(sizes)
    assert from_json(index.to_json()) == index


@pytest.mark.parametrize("region", [Region(0, 0, 0), Region(0, 0, 24), Region(0, 8, 16), Region(0, 0, -16)])
def test_regions_that_do_not_fit(region: Region) -> None:
    """Sizes and addresses are multiples of 16."""
    with pytest.raises(PoolError, match="not a multiple of 16"):
        plan([region])


def test_equal_contents_have_equal_names() -> None:
    """A name depends on contents alone, not on the address or the pool."""
    first, second = make_index([(0, BLOCK // 16)]), make_index([(1, 16), (0, BLOCK // 16)])
    second.blobs[1].blocks[0].digest = first.blobs[0].blocks[0].digest
    assert first.blobs[0].name == second.blobs[1].name


def test_the_same_digests_in_other_sizes_have_other_names() -> None:
    """A block of another size is another content."""
    first, second = make_index([(0, 16)]), make_index([(0, 17)])
    assert first.blobs[0].name != second.blobs[0].name


def edit(change: Callable[[dict[str, Any]], object]) -> str:
    """A good index with one thing changed."""
    value = json.loads(make_index([(0, 2 * BLOB // 16)]).to_json())
    change(value)
    return json.dumps(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        edit(lambda v: v.update(format=2)),
        edit(lambda v: v.pop("pool")),
        edit(lambda v: v.update(more=1)),
        edit(lambda v: v["blobs"][0].update(name="../../etc/passwd")),
        edit(lambda v: v["blobs"][0].update(address="0x1")),
        edit(lambda v: v["blobs"][0]["blocks"].append([16, "zz"])),
        edit(lambda v: v["blobs"][0]["blocks"].append([16, "00"])),
        edit(lambda v: v["regions"].append([0])),
    ],
)
def test_indexes_that_are_none(text: str) -> None:
    """Damaged, newer or self-contradicting indexes are refused, names of files above all."""
    with pytest.raises(PoolError):
        from_json(text)
