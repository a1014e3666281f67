"""Forms of seccomp filters: equal forms are equal filters, whatever the order of the checks."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

import pytest

from chrek.system import seccomp
from chrek.system.bpf import Form, Meanings

Instruction = tuple[int, int, int, int]

LOAD, JUMP, AND, RETURN, EQUAL, GREATER, AT_LEAST, ANY_BIT = 0x20, 0x05, 0x54, 0x06, 0x15, 0x25, 0x35, 0x45
X86_64, I386 = 0xC000003E, 0x40000003
TESTS: dict[int, Callable[[int, int], bool]] = {
    EQUAL: lambda a, b: a == b,
    GREATER: lambda a, b: a > b,
    AT_LEAST: lambda a, b: a >= b,
    ANY_BIT: lambda a, b: bool(a & b),
}
ALLOW, DENY, KILL = 0x7FFF0000, 0x50001, 0x80000000


def assemble(*code: Instruction) -> bytes:
    """Return a program's bytes."""
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


def run(program: bytes, words: tuple[int, ...]) -> int:
    """Run a program as the kernel does, over the words of a call's data."""
    code, at, value = list(struct.iter_unpack("<HBBI", program)), 0, 0
    while True:
        operation, yes, no, k = code[at]
        at += 1
        if operation == RETURN:
            return int(k)
        if operation == LOAD:
            value = words[k // 4]
        elif operation == AND:
            value &= k
        elif operation == JUMP:
            at += k
        else:
            at += yes if TESTS[operation](value, k) else no


def same(one: bytes, other: bytes) -> bool:
    """Whether two programs have one form that is not their bytes."""
    meanings = Meanings()
    return meanings.of(one) == meanings.of(other) != one


@pytest.mark.parametrize("arches", [(X86_64, I386), (I386, X86_64)])
def test_order_of_architectures(arches: tuple[int, int]) -> None:
    """Programs that ask for the architectures in another order are the same filter, as containerd makes them."""
    body = [(LOAD, 0, 0, 0), (EQUAL, 1, 0, 163), (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, DENY)]
    reference = assemble((LOAD, 0, 0, 4), (EQUAL, 2, 0, X86_64), (EQUAL, 1, 0, I386), (RETURN, 0, 0, KILL), *body)
    other = assemble((LOAD, 0, 0, 4), (EQUAL, 2, 0, arches[0]), (EQUAL, 1, 0, arches[1]), (RETURN, 0, 0, KILL), *body)
    assert same(reference, other)
    only = assemble((LOAD, 0, 0, 4), (EQUAL, 1, 0, X86_64), (RETURN, 0, 0, KILL), *body)
    assert not same(reference, only)


def test_order_of_calls() -> None:
    """Calls that are asked for one by one, by ranges or in another order are the same filter."""
    one_by_one = assemble(
        (LOAD, 0, 0, 0), (EQUAL, 3, 0, 5), (EQUAL, 2, 0, 4), (EQUAL, 1, 0, 6), (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, DENY)
    )
    by_range = assemble(
        (LOAD, 0, 0, 0), (AT_LEAST, 0, 2, 4), (GREATER, 1, 0, 6), (RETURN, 0, 0, DENY), (RETURN, 0, 0, ALLOW)
    )
    assert same(one_by_one, by_range)
    assert not same(one_by_one, by_range.replace(struct.pack("<HBBI", GREATER, 1, 0, 6), struct.pack("<HBBI", GREATER, 1, 0, 7)))


@pytest.mark.parametrize(
    ("answer", "argument", "offset"), [(ALLOW, 9, 16), (DENY, 8, 16), (DENY, 9, 20), (KILL, 9, 16)]
)
def test_arguments(answer: int, argument: int, offset: int) -> None:
    """Filters that look at other arguments, compare them with others or answer otherwise are different."""

    def program(answer: int, argument: int, offset: int) -> bytes:
        head = [(LOAD, 0, 0, 0), (EQUAL, 0, 3, 41), (LOAD, 0, 0, offset), (EQUAL, 0, 1, argument)]
        return assemble(*head, (RETURN, 0, 0, answer), (RETURN, 0, 0, ALLOW))

    assert same(program(DENY, 9, 16), program(DENY, 9, 16))
    assert not same(program(DENY, 9, 16), program(answer, argument, offset))


@pytest.mark.parametrize(
    "program",
    [
        b"x",
        assemble((LOAD, 0, 0, 0), (RETURN, 0, 0, ALLOW))[:-1],
        assemble((JUMP, 0, 0, 7)),
        assemble((LOAD, 0, 0, 4), (GREATER, 0, 0, X86_64), (RETURN, 0, 0, ALLOW)),
        assemble((LOAD, 0, 0, 0), (ANY_BIT, 0, 0, 3), (RETURN, 0, 0, ALLOW)),
        assemble((EQUAL, 0, 0, 3), (RETURN, 0, 0, ALLOW)),
        assemble((0x16, 0, 0, 0)),
        assemble((JUMP, 0, 0, 0xFFFFFFFF)),
    ],
    ids=lambda program: program.hex()[:24],
)
def test_not_understood(program: bytes) -> None:
    """What is not understood stands for itself."""
    assert Meanings().of(program) == program


def test_own_filter() -> None:
    """The init's own filter masks the number, which is not followed: it stands for itself."""
    program = assemble(*seccomp.program())
    assert Meanings().of(program) == program


def test_long_programs() -> None:
    """Programs as long as the kernel takes them, however nested, come to an end."""
    chain = assemble((LOAD, 0, 0, 0), *((EQUAL, 0, 0, number) for number in range(4094)), (RETURN, 0, 0, ALLOW))
    assert Meanings().of(chain) == chain
    nested = [item for number in range(2000) for item in ((LOAD, 0, 0, 16), (EQUAL, 0, 0, number))]
    deep = assemble(*nested, (RETURN, 0, 0, ALLOW))
    assert Meanings().of(deep) == Meanings().of(deep)


OFFSETS = [0, 4, 16, 20]
CONSTANTS = [0, 1, 2, 3, 5, 1 << 30, X86_64, I386, (1 << 32) - 1]


def some_program(dice: random.Random) -> bytes:
    """Return a small program that ends."""
    length = dice.randint(2, 9)
    code: list[Instruction] = [(LOAD, 0, 0, dice.choice(OFFSETS))]
    for at in range(1, length):
        kind = dice.choice([LOAD, EQUAL, EQUAL, GREATER, AT_LEAST, ANY_BIT, JUMP, AND, RETURN])
        yes, no = dice.randint(0, length - at - 1), dice.randint(0, length - at - 1)
        k = yes if kind == JUMP else dice.choice(OFFSETS if kind == LOAD else CONSTANTS)
        code.append((kind, yes, no, k) if kind in TESTS else (kind, 0, 0, k))
    return assemble(*code, (RETURN, 0, 0, dice.choice([ALLOW, DENY])))


def answer(meanings: Meanings, form: Form, words: tuple[int, ...]) -> int:
    """Return what a form says about a call."""
    nodes: dict[int, Any] = {number: what for what, number in meanings._nodes.items()}
    assert isinstance(form, tuple)
    other, named = form
    pieces: Any = dict(named).get(words[1], other)
    node = nodes[next(outcome for start, outcome in reversed(pieces) if start <= words[0])]
    while node[0] != "return":
        code, value, k, then, otherwise = node
        node = nodes[then if TESTS[code](words[value.offset // 4] & value.mask, k) else otherwise]
    return int(node[1])


def test_forms_say_what_programs_say() -> None:
    """The form gives the program's answer to every call, so that equal forms are equal filters."""
    dice, understood = random.Random(1), 0
    near = [value for k in CONSTANTS for value in (k - 1, k, k + 1) if 0 <= value < 1 << 32]
    for _ in range(4000):
        meanings, program = Meanings(), some_program(dice)
        form = meanings.of(program)
        if form == program:
            continue
        understood += 1
        for _ in range(40):
            words = tuple(dice.choices(near, k=6))
            assert answer(meanings, form, words) == run(program, words), program.hex(" ", 8)
    assert understood > 1000
