"""What Triton's interpreter need not do: more than half of the time of the interpreted tests.

It puts its own functions into triton.language at every call of a device function, for which it looks through all of it:
once a launch and module is enough. And it computes all sums and products of integers in 64 bits again, to see whether
they overflow, and then asserts that in debug mode alone: here it does both or neither.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Optional, Set


class _OnceALaunch:
    def __init__(self, patch: Any, empty: Any) -> None:
        self.patch, self.empty = patch, empty
        self.patched: Optional[Set[int]] = None  # modules that call, by their globals; None between launches

    def __call__(self, fn: Any) -> Any:
        caller = id(fn.__globals__)
        if self.patched is None:
            scope = self.patch(fn)
            self.patched, restore = {caller}, scope.restore

            def end() -> None:
                self.patched = None
                restore()

            scope.restore = end
            return scope
        if caller not in self.patched:
            self.patched.add(caller)
            return self.patch(fn)
        return self.empty()


def install() -> None:
    """For the process. Without effect where Triton has no such functions any more."""
    from triton.runtime import interpreter

    patch, empty = (getattr(interpreter, name, None) for name in ("_patch_lang", "_LangPatchScope"))
    if patch and empty and not isinstance(patch, _OnceALaunch):
        interpreter._patch_lang = _OnceALaunch(patch, empty)
    check_integers(False)


def check_integers(on: bool) -> None:
    """Whether sums, differences and products of integers that overflow raise."""
    from triton.runtime import interpreter

    builder = getattr(interpreter, "interpreter_builder", None)
    if hasattr(getattr(builder, "options", None), "sanitize_overflow"):
        builder.options = replace(builder.options, debug=on, sanitize_overflow=on)
