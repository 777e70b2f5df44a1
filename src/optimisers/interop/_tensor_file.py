"""A file of named tensors and one text: safetensors, written whole or not at all, and checked before it is believed.

The file is an ordinary safetensors file. Its metadata hold the text under ``"optimisers"`` and a SHA-256 of the text and of
every tensor's name, dtype, shape and bytes under ``"sha256"``.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..arrays import address, dtype_name, kind, torch_if_loaded
from ..errors import CheckpointError, MissingPackageError
from ..tree.sharding import is_sharded, whole

CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""The dtypes that are stored, and what safetensors calls them. Complex numbers are stored as pairs of real ones."""

_HEADER_LIMIT = 100_000_000  # bytes; safetensors' own
_FORGOTTEN = 3600.0  # seconds after which an unfinished file is taken to be that of a process that died


def library() -> Any:
    """The package safetensors, or MissingPackageError."""
    try:
        return importlib.import_module("safetensors")
    except ImportError as error:
        msg = "checkpoints need the package safetensors; install it with: pip install safetensors"
        raise MissingPackageError(msg) from error


# --- writing ----------------------------------------------------------------------------------------------------------


def write(path: Path, tensors: Mapping[str, Any], text: str, fetch: Callable[[str], Any] | None = None) -> None:
    """Write tensors (as `stored` gives them) and a text; a crash leaves the old file or the new one, whole.

    ``fetch`` gives the content of a tensor by its name, where it is not at hand, in the order of `ordered`.

    The bytes go to a new file in the same folder, are forced to the disk, and the file then takes the place of the old one.
    A process killed on the way leaves an unfinished ``.name.*.tmp``, which a later write to this path removes once nothing
    was written to it for an hour.
    """
    library()  # what could not be read back here should not be written here
    path = Path(os.path.realpath(path))  # a link stays a link
    _sweep(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            _fill(file, tensors, text, fetch or tensors.__getitem__)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def ordered(tensors: Mapping[str, Any]) -> list[str]:
    """The names in the order in which tensors are written: so that all lie aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))


def _fill(file: IO[bytes], tensors: Mapping[str, Any], text: str, fetch: Callable[[str], Any]) -> None:
    # The checksum is known only once everything is written: its place is kept, and filled in at the end.
    unknown = "0" * 64
    header: dict[str, Any] = {"__metadata__": {"optimisers": text, "sha256": unknown}}
    names = ordered(tensors)
    end = 0
    for name in names:
        x = tensors[name]
        start, end = end, end + int(x.nbytes)
        header[name] = {"dtype": CODES[dtype_name(x)], "shape": list(x.shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    if len(head) > _HEADER_LIMIT:
        msg = (
            f"save: the description of the state takes {len(head):,} bytes, and a safetensors header {_HEADER_LIMIT:,} at most"
        )
        raise CheckpointError(msg)
    file.write(len(head).to_bytes(8, "little") + head)
    digests = {}
    for name in names:
        data = raw(fetch(name))
        digests[name] = (header[name]["dtype"], header[name]["shape"], sha256(data).digest())
        file.write(data)
    place = head.rindex(f'"sha256":"{unknown}"'.encode()) + len('"sha256":"')
    file.seek(8 + place)
    file.write(_checksum(text, digests).encode())


def raw(x: Any) -> memoryview:
    """The bytes of a contiguous array on the host, without a copy."""
    if kind(x) == "torch":
        x = x.reshape(-1).view(_torch().uint8).numpy() if x.numel() else np.empty(0, np.uint8)
    return memoryview(x.reshape(-1).view(np.uint8)) if x.size else memoryview(b"")


def _checksum(text: str, tensors: Mapping[str, tuple[str, list[int], bytes]]) -> str:
    total = sha256(text.encode())
    for name in sorted(tensors):
        code, shape, digest = tensors[name]
        total.update(json.dumps([name, code, list(shape)]).encode() + digest)
    return total.hexdigest()


def _sweep(path: Path) -> None:
    """Remove what processes that died while they wrote to this path have left."""
    for left in path.parent.glob(f".{_literal(path.name)}.{'[0-9a-f]' * 32}.tmp"):
        with contextlib.suppress(OSError):  # another process may have been quicker
            if time.time() - left.stat().st_mtime > _FORGOTTEN:
                left.unlink()


def _literal(name: str) -> str:
    """A name as a glob that matches nothing else."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _sync_folder(folder: Path) -> None:
    """Force the folder's entry to the disk, where the system can (Windows cannot)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- reading ----------------------------------------------------------------------------------------------------------


def read(path: Path, keep: Callable[[str, Any], Any] | None = None) -> tuple[str, dict[str, Any]]:
    """(text, tensors by name) of a file that `write` made; the tensors are torch's if torch is imported, else NumPy's.

    ``keep`` says what is kept of each of them, which are read one after another.

    Sizes are checked against the file's own before anything is allocated, and the checksum before anything is returned.
    Raises CheckpointError for anything but such a file, and OSError if it cannot be opened.
    """
    safetensors = library()
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
    length = int.from_bytes(start, "little")
    if size < 8 or length > size - 8 or length > _HEADER_LIMIT:
        msg = f"load: {str(path)!r} is no checkpoint, or it is cut off: its {size:,} bytes cannot hold the header it announces"
        if start.startswith(b"PK\x03\x04"):  # a zip archive
            msg = f"load: {str(path)!r} is no checkpoint of opt.save, but a file as torch.save writes; read it with torch.load"
        raise CheckpointError(msg)
    torch = torch_if_loaded()
    try:
        with safetensors.safe_open(path, framework="np" if torch is None else "pt") as file:
            metadata = file.metadata() or {}
            if "optimisers" not in metadata or "sha256" not in metadata:
                msg = f"load: {str(path)!r} is a safetensors file, but not one that opt.save made"
                raise CheckpointError(msg)
            tensors: dict[str, Any] = {}
            digests: dict[str, tuple[str, list[int], bytes]] = {}
            for name, code, shape in _listed(file, torch_is_there=torch is not None):
                own = _own(file.get_tensor(name))
                tensors[name] = own if keep is None else keep(name, own)
                digests[name] = (code, shape, sha256(raw(own)).digest())
    except safetensors.SafetensorError as error:
        msg = f"load: {str(path)!r} is damaged, or no checkpoint: {error}"
        raise CheckpointError(msg) from None
    if _checksum(metadata["optimisers"], digests) != metadata["sha256"]:
        msg = f"load: {str(path)!r} is damaged: its checksum is not that of its contents. Go back to an earlier checkpoint"
        raise CheckpointError(msg)
    return metadata["optimisers"], tensors


def import_torch_for(path: Path) -> None:
    """Import torch if a file holds what NumPy cannot, and it is not there yet."""
    safetensors = library()
    with (
        contextlib.suppress(safetensors.SafetensorError, OSError, ImportError),
        safetensors.safe_open(path, framework="np") as file,
    ):
        if any(file.get_slice(name).get_dtype() == "BF16" for name in file.keys()):  # noqa: SIM118 (no dict)
            importlib.import_module("torch")


def _listed(file: Any, *, torch_is_there: bool) -> Iterator[tuple[str, str, list[int]]]:
    known = set(CODES.values())
    for name in sorted(file.keys()):
        part = file.get_slice(name)
        code = part.get_dtype()
        if code not in known:
            msg = f"load: the tensor {name!r} is stored as {code}, which no checkpoint of this library holds"
            raise CheckpointError(msg)
        if code == "BF16" and not torch_is_there:
            msg = f"load: the tensor {name!r} is bfloat16, which NumPy does not have; import torch before loading"
            raise CheckpointError(msg)
        yield name, code, list(part.get_shape())


def _own(x: Any) -> Any:
    """The tensor in memory of its own: as it comes, it may be a view of the file."""
    return np.array(x) if kind(x) != "torch" else x.clone()


# --- arrays as they are stored ------------------------------------------------------------------------------------------


def stored(x: Any, where: str) -> tuple[Any, dict[str, Any]]:
    """(contiguous array on the host, what else is to be known of it): complex numbers become a last axis of length two.

    The second part holds ``dtype``, and ``axes``, the order of the axes in memory, where it is not the usual one.
    """
    torch_is = kind(x) == "torch"
    if is_sharded(x):
        if not x.is_complex():
            return x.detach(), {"dtype": dtype_name(x)}  # put together when it is written
        x = whole(x)
    if torch_is:
        x = x.detach().cpu().resolve_conj().resolve_neg()
    else:
        x = np.asarray(x)
        x = x.astype(x.dtype.newbyteorder("="), copy=False)
    known: dict[str, Any] = {"dtype": dtype_name(x)}
    axes = memory_order(x)
    if axes != sorted(axes):
        known["axes"] = axes
    if torch_is and x.numel() and address(x) is None:
        msg = f"save: {where} is a {type(x).__name__}, a tensor that has no bytes of its own; unwrap it first"
        raise CheckpointError(msg)
    x = x.contiguous() if torch_is else np.array(x, order="C", copy=None)
    if known["dtype"].startswith("complex"):
        x = _torch().view_as_real(x) if torch_is else x[..., None].view(x.real.dtype)
    if dtype_name(x) not in CODES:
        msg = f"save: {where} is of dtype {known['dtype']}, which safetensors cannot hold"
        raise CheckpointError(msg)
    return x, known


def restored(x: Any, known: Mapping[str, Any], array_kind: str, device: Any) -> Any:
    """The reverse of `stored`, as an array of this kind on this device (None: the host). ValueError if it cannot be."""
    torch = _torch()
    dtype = known["dtype"]
    if array_kind == "numpy" and kind(x) == "torch":
        x = x.numpy()
    elif array_kind == "torch" and kind(x) == "numpy":
        x = torch.from_numpy(x)
    if dtype.startswith("complex"):
        if x.shape[-1:] != (2,):
            msg = "complex numbers are stored as pairs"
            raise ValueError(msg)
        pairs = np.result_type(x.dtype, np.complex64) if array_kind == "numpy" else None
        x = torch.view_as_complex(x) if pairs is None else x.view(pairs)[..., 0]
    if dtype_name(x) != dtype:
        msg = f"it is stored as {dtype_name(x)}, and described as {dtype}"
        raise ValueError(msg)
    axes = known.get("axes")
    if axes is not None and not is_sharded(x):
        if sorted(axes) != list(range(x.ndim)):
            msg = f"{axes!r} is no order of its {x.ndim} axes"
            raise ValueError(msg)
        back = [axes.index(i) for i in range(x.ndim)]
        x = x.permute(axes).contiguous().permute(back) if array_kind == "torch" else x.transpose(axes).copy().transpose(back)
    if array_kind == "numpy" or device is None:
        return x
    if device.type == "meta":
        msg = "it would go to the meta device, which holds no numbers; load into a model that has some"
        raise ValueError(msg)
    return x.to(device)


def _torch() -> Any:
    return torch_if_loaded()


def memory_order(x: Any) -> list[int]:
    """The axes from the slowest in memory to the fastest; axes that tie stay in order."""
    strides: Callable[[int], int] = x.stride if kind(x) == "torch" else x.strides.__getitem__
    if 0 in x.shape:
        return list(range(x.ndim))
    long = [i for i in range(x.ndim) if x.shape[i] > 1]
    ordered = iter(sorted(long, key=lambda i: -strides(i)))
    return [next(ordered) if x.shape[i] > 1 else i for i in range(x.ndim)]
