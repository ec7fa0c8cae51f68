"""The one door for PyTorch's files: tensors and plain values, never code."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .arrays import open_zip
from .reading import MAX_BYTES, UnreadableError, check_size, looks_like, open_file, reading
from .rehearsal import Rehearsal
from .text import shown

__all__ = ["read_sample_tensors", "read_weights"]

#: What a dictionary of tensors is made of, as pickle names it.
_TENSORS = re.compile(
    r"torch\._utils\.(_rebuild_tensor_v2|_rebuild_parameter)|collections\.OrderedDict|"
    r"torch\.(storage\.)?\w+Storage"
)
#: Pickles at the beginning of a file of PyTorch before 1.6; the last one is the content.
_OLD_PICKLES = 4


def read_weights(
    path: str | os.PathLike[str],
    argument: str,
    *,
    max_bytes: int = MAX_BYTES,
    allowed: tuple[type, ...] = (),
) -> Any:
    """The content of a file of ``torch.save``, on the CPU: tensors, numbers, texts, containers.

    Args:
        path: of the file.
        argument: name of the argument that gave the path, for the texts of errors.
        max_bytes: of what the file takes in memory, where that is more than the file itself.
        allowed: classes that may occur in it beside PyTorch's own; they must do nothing when made.

    Raises:
        UnreadableError: it is no such file or damaged, holds Python objects (which are not made),
            or takes more memory than the file has bytes.
    """
    name = f"{argument}: {shown(path)}"
    with open_file(path) as file:
        limit = max(os.fstat(file.fileno()).st_size, max_bytes)
        head = file.read(512)
        if head.startswith(b"PK"):
            _check_archive(file, name, limit)
        elif found := looks_like(head):
            raise UnreadableError(f"{name}: expected a file of torch.save, got {found}")
        else:
            _check_old(file, name, limit)
        file.seek(0)
        content = _load(file, name, allowed)
    _check_tensors(content, name, limit)
    return content


def _check_archive(file: BinaryIO, name: str, limit: int) -> None:
    """Sizes as the archive announces them, and what its pickle would make."""
    file.seek(0)
    with _without_traceback(name), zipfile.ZipFile(file) as archive:
        check_size(name, sum(member.file_size for member in archive.infolist()), limit)
        for member in archive.infolist():
            if member.filename.endswith("/data.pkl"):
                _check_pickle(archive, member, archive.read(member), name)


def _check_pickle(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, data: bytes, name: str
) -> set[str]:
    """Checks a pickle, and names what it would call or make."""
    rehearsal = Rehearsal(io.BytesIO(data), len(data))
    rehearsal.load()
    folder = member.filename.removesuffix("data.pkl")
    for key, size in rehearsal.storages.items():
        there = archive.getinfo(f"{folder}data/{key}").file_size
        if not 0 <= size <= there:
            raise UnreadableError(
                f"{name}: expected a storage of {there} bytes, its pickle says {size}"
            )
    return rehearsal.names


def _check_old(file: BinaryIO, name: str, limit: int) -> None:
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    with _without_traceback(name):
        for _ in range(_OLD_PICKLES):
            rehearsal = Rehearsal(file, end)
            rehearsal.load()
    check_size(name, sum(rehearsal.storages.values()), limit)


@contextlib.contextmanager
def _without_traceback(name: str) -> Iterator[None]:
    """The traceback of pickle says nothing to the user of a program."""
    try:
        with reading(name):
            yield
    except UnreadableError as error:
        if error.__cause__ is None:  # this project's own
            raise
        raise _foreign(str(error.__cause__), name) from None


def _load(file: BinaryIO, name: str, allowed: tuple[type, ...] = ()) -> Any:
    with _without_traceback(name), torch.serialization.safe_globals(list(allowed)):
        return torch.load(file, map_location="cpu", weights_only=True)


def _foreign(reason: str, name: str) -> UnreadableError:
    found = re.search(r"GLOBAL ([\w.]+)", reason)
    if found is None and "TorchScript" in reason:
        return UnreadableError(
            f"{name}: expected weights (a file of torch.save), got a TorchScript archive; save "
            f"torch.jit.load(FILE).state_dict() with torch.save"
        )
    if found is None:
        first = shown(reason.strip().partition("\n")[0])[:200]
        return UnreadableError(
            f"{name}: expected a file of torch.save, got another kind of file or a damaged one: "
            f"{first or 'it ends early'}"
        )
    return UnreadableError(
        f"{name}: expected weights alone, got Python objects too, such as {shown(found[1])}, which "
        f"would run code of whoever made the file. Where you trust it, read it once with "
        f"torch.load(FILE, weights_only=False) and save its state_dict with torch.save"
    )


def _check_tensors(content: Any, name: str, limit: int) -> None:
    """A tensor may claim a size beyond its memory: with a stride of 0, or without any."""
    todo, seen = [content], set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            _check_tensor(value, name, limit)
        elif isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            todo += value


def _check_tensor(tensor: Tensor, name: str, limit: int) -> None:
    if tensor.is_meta:
        raise UnreadableError(f"{name}: expected tensors with content, got one without (meta)")
    if tensor.layout != torch.strided or tensor.is_nested:
        return  # these have what they hold, and no more
    check_size(name, math.prod(tensor.shape) * max(tensor.element_size(), 4), 4 * limit)


def read_sample_tensors(data: bytes, name: object, max_bytes: int) -> dict[Any, Any]:
    """A dictionary of tensors, as the content of a file of ``torch.save``.

    Raises:
        UnreadableError: it is damaged or holds anything else, or is larger than ``max_bytes``.
    """
    name = shown(name)
    # An archive made anew of what was checked: PyTorch has a reader of its own, which might find
    # other files or sizes in the same bytes.
    made = io.BytesIO()
    with open_zip(data, name) as archive, zipfile.ZipFile(made, "w") as plain:
        check_size(name, sum(member.file_size for member in archive.infolist()), max_bytes)
        for member in archive.infolist():
            with reading(name, "a readable archive"):
                content = archive.read(member)
                if member.filename.endswith("/data.pkl"):
                    for made_of in sorted(_check_pickle(archive, member, content, name)):
                        if not _TENSORS.fullmatch(made_of):
                            raise UnreadableError(
                                f"{name}: expected a dictionary of tensors, got {shown(made_of)} "
                                f"in it"
                            )
                plain.writestr(zipfile.ZipInfo(member.filename), content)
    made.seek(0)
    with reading(name, "a dictionary of tensors"):
        found = torch.load(made, map_location="cpu", weights_only=True)
    if not isinstance(found, dict):
        raise UnreadableError(
            f"{name}: expected a dictionary of tensors, got {type(found).__name__}"
        )
    for tensor in found.values():
        if isinstance(tensor, Tensor):
            if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
                raise UnreadableError(f"{name}: expected dense tensors, got {tensor.layout}")
            check_size(name, math.prod(tensor.shape) * max(tensor.element_size(), 4), max_bytes)
    return found
