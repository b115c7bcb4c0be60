"""Pickles as data: plain containers, text and numbers, and the few names of a format. Nothing else is looked up."""

import pickle
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

_KEYS = (str, int, type(None))  # bool is an int
# What such a pickle consists of (Python, Lib/pickletools.py). Not among them: whatever makes objects of classes other
# than by a call that `names` allows, the registry of extensions, sets, and what copies from the stack.
_OPCODES = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING "
    "BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 "
    "EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS "
    "PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID"
).split()


class Dictionary(dict):
    """What a pickle's dictionaries become. Keys are text or numbers; attributes that a pickle gives it are left out.

    The hash of a tuple that holds a tuple, and so on a million times, which takes a megabyte, would end the process.
    """

    def __init__(self, items: list | None = None):
        """Of [key, value] pairs, and empties the list: a pickle may call this with one list any number of times."""
        super().__init__()
        if items is None:
            return
        if not isinstance(items, list):
            raise ValueError(f"a dictionary is made of a {type(items).__name__}")
        taken, items[:] = list(items), []
        for key, value in taken:
            self[key] = value

    def __setitem__(self, key: str | int | None, value: Any) -> None:
        if not isinstance(key, _KEYS):
            raise ValueError(f"a dictionary has a key of type {type(key).__name__}")
        super().__setitem__(key, value)

    def __setstate__(self, state: Any) -> None:
        """Nothing: an OrderedDict's attributes, such as PyTorch's `_metadata`."""


class _Opcodes(dict):
    """Of the standard library's unpickler, by their byte."""

    def __missing__(self, code: int) -> None:
        raise ValueError(
            f"it has the opcode {bytes([code])!r}, which is not needed here and may be code; it was not run"
        )


class Unpickler(pickle._Unpickler):
    """Reads pickles of `names` (module, name) -> what stands for it: text, or what the pickle may call.

    The standard library's, in Python: the one in C allocates what a length or a number of the memo asks for, before
    it looks how much there is. It raises nearly anything on damaged pickles; nothing that it reads should be shown in
    messages, for a few bytes can describe what takes years to write out.

    file: in memory, since such lengths are asked of it.
    """

    append: Callable[[Any], None]  # of the standard library's, whose type stubs lack them
    pop_mark: Callable[[], list]
    stack: list

    dispatch = _Opcodes(
        {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES}
    )

    def __init__(self, file: BinaryIO, names: Mapping[tuple[str, str], Any]):
        super().__init__(file, encoding="latin1")  # how numpy reads the bytes in Python 2's pickles
        self._names = names

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name. ValueError for one that is not needed here."""
        if (module, name) not in self._names:
            raise ValueError(f"it names {module}.{name}, which is not needed here and may be code; it was not run")
        return self._names[module, name]

    def _load_empty_dictionary(self) -> None:
        self.append(Dictionary())

    def _load_dict(self) -> None:
        items = self.pop_mark()
        self.append(Dictionary(list(zip(items[::2], items[1::2], strict=True))))

    def _load_build(self) -> None:
        """State goes only to objects whose class says what it does with it: functions and classes keep theirs."""
        state, target = self.stack.pop(), self.stack[-1]
        type(target).__setstate__(target, state)

    dispatch.update(
        {pickle.EMPTY_DICT[0]: _load_empty_dictionary, pickle.DICT[0]: _load_dict, pickle.BUILD[0]: _load_build}
    )
