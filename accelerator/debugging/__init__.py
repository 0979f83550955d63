"""What helps to find a bug in a loop: values that are not finite, ranks that differ, ranks that wait for ever."""

from .debugging import Debugging

__all__ = ["Debugging"]
