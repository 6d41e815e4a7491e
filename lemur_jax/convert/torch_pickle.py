"""The table of contents of a PyTorch file, read without running it.

A pickle is a program. This interpreter knows the few instructions that build dictionaries, tuples
and strings, and a list of names that stand for tensors; it calls nothing, and everything else is
refused by name. (The stock unpickler, even with a guarded `find_class`, still calls what it finds.)
"""

import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from lemur_jax.convert.errors import ConversionError

_STORAGES = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_REBUILD = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
_PARAMETER = "torch._utils._rebuild_parameter"
_DICTIONARY = "collections.OrderedDict"
_SIZE = "torch.Size"
_ALLOWED = {
    *_REBUILD,
    _PARAMETER,
    _DICTIONARY,
    _SIZE,
    *(f"torch.{name}" for name in _STORAGES),
}
MAX_PICKLE_BYTES = 64 << 20  # a table of contents: the largest known have a few hundred KiB


@dataclass(frozen=True)
class Global:
    """A name that the pickle asks for; never imported."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A run of elements: `key` says which, in the file's own terms."""

    key: str
    dtype: np.dtype
    elements: int


@dataclass(frozen=True)
class View:
    """A tensor: a view of a storage."""

    storage: Storage
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements


class _Mark:
    pass


def load(stream: BinaryIO, path: Path) -> Any:
    """The first pickle of `stream`: dicts, lists, tuples, strings, numbers, Views and Globals.

    Raises:
      ConversionError: it asks for anything but tensors, or is damaged.
    """
    machine = _Machine(path)
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
    except ConversionError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ConversionError(
            [f"{path} is damaged: its pickle breaks off ({error}). Download or copy it again"]
        ) from error
    raise ConversionError([f"{path} is damaged: its pickle has no end. Download it again"])


class _Machine:
    def __init__(self, path: Path):
        self.path = path
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def refuse(self, what: str) -> ConversionError:
        return ConversionError(
            [
                f"{self.path}: its pickle asks for {what}. Only tensors are read; nothing was "
                "executed. Use a safetensors copy of this checkpoint"
            ]
        )

    def step(self, name: str, argument: Any) -> None:
        push = self.stack.append
        if name in ("PROTO", "FRAME"):
            return
        if name in _CONSTANTS:
            push(_CONSTANTS[name])
        elif name in _LITERALS:
            push(argument)
        elif name in _EMPTY:
            push(_EMPTY[name]())
        elif name == "MARK":
            push(_Mark)
        elif name == "POP":
            self.stack.pop()
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            push(self.memo[argument])
        elif name == "GLOBAL":
            push(self.named(argument.replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = self.stack.pop(), self.stack.pop()
            push(self.named(f"{module}.{attribute}"))
        elif name.startswith("TUPLE"):
            push(tuple(self.marked() if name == "TUPLE" else self.top(int(name[5:]))))
        elif name in ("SETITEM", "SETITEMS"):
            items = self.top(2) if name == "SETITEM" else self.marked()
            self.mapping().update(zip(items[::2], items[1::2], strict=True))
        elif name in ("APPEND", "APPENDS"):
            items = self.top(1) if name == "APPEND" else self.marked()
            self.stack[-1].extend(items)
        elif name == "BINPERSID":
            push(self.storage(self.stack.pop()))
        elif name == "REDUCE":
            arguments, function = self.stack.pop(), self.stack.pop()
            push(self.build(function, arguments))
        elif name == "BUILD":
            self.stack.pop()  # attributes of a dictionary (_metadata of a state_dict): not ours
            self.mapping()
        else:
            raise self.refuse(f"the instruction {name}")

    def named(self, name: str) -> Global:
        if name not in _ALLOWED:
            raise self.refuse(f"{name!r}")
        return Global(name)

    def marked(self) -> list[Any]:
        """What lies above the last mark."""
        at = len(self.stack) - 1 - self.stack[::-1].index(_Mark)
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def top(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        if len(items) < count:
            raise IndexError("empty stack")
        del self.stack[-count:]
        return items

    def mapping(self) -> dict:
        if not isinstance(self.stack[-1], dict):
            raise self.refuse(f"a change of a {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def storage(self, persistent: Any) -> Storage:
        kind, typed, key, _, elements = persistent[:5]
        known = isinstance(typed, Global) and typed.name.removeprefix("torch.") in _STORAGES
        if kind != "storage" or not known or (len(persistent) > 5 and persistent[5] is not None):
            raise self.refuse(f"the stored object {persistent!r}")
        dtype = np.dtype(_STORAGES[typed.name.removeprefix("torch.")])
        return Storage(str(key), dtype, _size(elements))

    def build(self, function: Any, arguments: tuple) -> Any:
        name = function.name if isinstance(function, Global) else repr(function)
        if name == _DICTIONARY:
            return dict(*arguments)
        if name == _SIZE:
            return tuple(*arguments)
        if name == _PARAMETER and isinstance(arguments[0], View):
            return arguments[0]
        if name in _REBUILD and isinstance(arguments[0], Storage):
            storage, offset, shape, strides = arguments[:4]
            sizes = tuple(_size(n) for n in shape)
            return View(storage, _size(offset), sizes, tuple(_size(n) for n in strides))
        raise self.refuse(f"a call of {name}")


def _size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"),
    *("SHORT_BINSTRING", "BINSTRING", "STRING"),
}
