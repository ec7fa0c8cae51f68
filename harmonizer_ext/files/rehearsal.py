"""Pickles of ``torch.save`` looked through without making anything of them."""

from __future__ import annotations

import pickle
import re
from typing import Any, BinaryIO

__all__ = ["Rehearsal"]

#: Bytes of an element by the name of its storage; of others it is taken to be one.
_ELEMENT = {
    **dict.fromkeys(("ShortStorage", "HalfStorage", "BFloat16Storage"), 2),
    **dict.fromkeys(("IntStorage", "FloatStorage", "QInt32Storage"), 4),
    **dict.fromkeys(("LongStorage", "DoubleStorage", "ComplexFloatStorage"), 8),
    "ComplexDoubleStorage": 16,
}


#: What takes as much memory as a number says.
_BY_NUMBER = re.compile(
    r"(builtins|__builtin__)\.bytearray|torch\.(\w+\.)*(\w*Tensor|UntypedStorage|TypedStorage)"
)


class _Nothing:
    """Stands for every object that a pickle asks for: takes all arguments, does nothing."""

    called = ""

    def __new__(cls, *arguments: Any, **_: Any) -> _Nothing:
        if _BY_NUMBER.fullmatch(cls.called) and any(isinstance(a, int) for a in arguments):
            raise pickle.UnpicklingError(f"{cls.called}{arguments!r:.80} takes memory by a number")
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    extend = add = append


class _Rest:
    """A file that is never asked for more than is left of it: the memory would be taken first."""

    def __init__(self, file: BinaryIO, end: int) -> None:
        self._file, self._end = file, end
        self.readline = file.readline

    def read(self, size: int) -> bytes:
        return self._file.read(max(0, min(size, self._end - self._file.tell())))


class Rehearsal(pickle._Unpickler):
    """Reads a pickle as PyTorch does, but what it names is noted in the place of made.

    Python's own implementation, because the one in C makes room for as many objects as a pickle
    claims to have.

    Args:
        file: where the pickle begins.
        end: of the file.

    Attributes:
        names: of everything that it would call or make, such as "collections.OrderedDict".
        storages: bytes that it says each storage has, by its key.
    """

    #: Without what asks for memory by a number alone; ``torch.save`` does not write it.
    dispatch = {  # noqa: RUF012 - as in the class that this one extends
        code: step
        for code, step in pickle._Unpickler.dispatch.items()
        if code != pickle.BYTEARRAY8[0]
    }

    def __init__(self, file: BinaryIO, end: int) -> None:
        super().__init__(_Rest(file, end), encoding="latin1")
        self.names: set[str] = set()
        self.storages: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        self.names.add(f"{module}.{name}")
        return type(name, (_Nothing,), {"called": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        # ("storage", its type, key, device, number of elements), and a view of it in old files.
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            return _Nothing()  # PyTorch says what it thinks of it
        _, kind, key, _, count, *_ = pid
        size = int(count) * _ELEMENT.get(getattr(kind, "__name__", ""), 1)
        self.storages[str(key)] = max(size, self.storages.get(str(key), 0))
        return _Nothing()
