"""A frozen dataclass that costs nothing to import.

`dataclasses` pulls in `inspect`, `ast` and `re`: 14 ms and 3 MB on a 2-core machine, in the first
process of every container. The few records that a container's init needs are made by this decorator
instead: keyword construction, defaults, equality, `repr`, a copy with changes, no assignment. Type
checkers are shown the real `dataclasses.dataclass(frozen=True, kw_only=True)`, so both must agree
on what a class body means; default factories and inheritance are left out on purpose.
"""

# The types are those of the declarations under TYPE_CHECKING; the other half only runs.
# ruff: noqa: ANN001, ANN003, ANN201, ANN202, ARG001

from __future__ import annotations

TYPE_CHECKING = False  # see chrek.system.ids

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar, dataclass_transform

    _T = TypeVar("_T")

    @dataclass_transform(frozen_default=True, kw_only_default=True)
    def record(cls: type[_T], /) -> type[_T]:
        """Make a frozen, keyword-only record of an annotated class."""
        ...

    def changed(value: _T, /, **changes: Any) -> _T:
        """Return a copy of a record with some fields replaced."""
        ...

    _Method = Callable[..., Any]

else:

    def record(cls):
        """Make a frozen, keyword-only record of an annotated class."""
        fields = tuple(cls.__annotations__)
        defaults = {name: getattr(cls, name) for name in fields if hasattr(cls, name)}
        required = frozenset(fields) - frozenset(defaults)

        def init(self, **values):
            unknown, missing = values.keys() - set(fields), required - values.keys()
            if unknown or missing:
                message = f"{cls.__name__}: unknown {sorted(unknown)}, missing {sorted(missing)}"
                raise TypeError(message)
            self.__dict__.update(defaults)
            self.__dict__.update(values)

        def frozen(self, name, value=None):
            message = f"{cls.__name__}.{name} cannot be changed"
            raise AttributeError(message)

        def key(self):
            return tuple(self.__dict__[name] for name in fields)

        cls.__init__ = init
        cls.__setattr__ = frozen
        cls.__delattr__ = frozen
        cls.__eq__ = lambda self, other: type(other) is cls and key(self) == key(other)
        cls.__hash__ = lambda self: hash(key(self))
        cls.__repr__ = lambda self: f"{cls.__name__}({', '.join(f'{n}={self.__dict__[n]!r}' for n in fields)})"
        return cls

    def changed(value, /, **changes):
        """Return a copy of a record with some fields replaced."""
        return type(value)(**{**value.__dict__, **changes})
