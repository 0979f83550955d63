"""A prepared object is a view of the user's: the same state, the same class, and a few methods of ours.

The view's class is made from the user's class, and its `__dict__` *is* the user's object's: parameters,
hooks, groups, counters and any attribute set on one are there on the other, `isinstance` holds, and
pickling or copying the view gives the user's object. (`fully_shard` of torch changes the class of a
module in the same spirit.) What a view knows besides lives in one slot, `_link`, outside that dict.
"""

from __future__ import annotations

import copy
import types
from typing import Any, TypeVar, cast

from ..errors import PrepareError

V = TypeVar("V", bound="View")


class View:
    """Base of the classes whose methods come before the user's in a view."""

    __slots__ = ("_link",)

    _link: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle, and copy deeply, as the user's own object."""
        return _itself, (self._link.original,)

    def __copy__(self) -> Any:
        return copy.copy(self._link.original)

    def __repr__(self) -> str:
        return repr(self._link.original)


def _itself(original: Any) -> Any:
    return original


def make_view(original: Any, methods: type[V], link: Any) -> V:
    """A view of `original` in which `methods` come first. `link.original` is what pickling and copying give."""
    cls = type(original)
    try:
        view_cls = types.new_class(
            f"Prepared{cls.__name__}",
            (methods, cls),
            exec_body=lambda namespace: namespace.update(__slots__=(), __module__=cls.__module__, __doc__=cls.__doc__),
        )
        view: Any = object.__new__(view_cls)  # not the class's own: fully_shard's makes a module without our class
        object.__setattr__(view, "__dict__", original.__dict__)
    except (TypeError, AttributeError) as error:
        raise PrepareError(
            f"{cls.__module__}.{cls.__qualname__} cannot be prepared, because it cannot be subclassed: {error}. "
            "Give an ordinary Python class."
        ) from error
    cast(Any, View)._link.__set__(view, link)
    return cast(V, view)
