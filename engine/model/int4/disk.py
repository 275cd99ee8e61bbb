"""Int4 weights on disk: one safetensors file for a checkpoint, a group size and a solver, whole or not there at all.

Knows nothing of kernels or modules: codes are kept as Int4Weight has them, since packed ones depend on the machine.
Called by model/quantize.py, layer by layer, so that no more than one layer is ever in memory twice.

    key = checkpoint_key(files, group_size)
    kept = KeptWeights.open(path, key, shapes)      None: not there, another's, or damaged
    writer = WeightWriter(path, key, shapes)        a temporary file until commit()
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import torch

from engine.model.int4.hqq import SOLVER_VERSION, Int4Weight

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_CHECKSUMS = "checksums"
_READ_BYTES = 2**20
_MAX_HEADER_BYTES = 2**26  # of a checkpoint with a hundred thousand tensors; a length beyond it is damage


def checkpoint_key(files: Iterable[str | Path], group_size: int) -> str:
    """Return what names the int4 weights of a checkpoint.

    A file of the hub's cache is named by its content; any other is told by its header, size and time.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256(f"{FORMAT_VERSION}/{SOLVER_VERSION}/{group_size}".encode())
    for name in sorted(map(str, files)):
        path = Path(name).resolve()
        status = path.stat()
        digest.update(f"/{Path(name).name}/{status.st_size}/".encode())
        if path.parent.name == "blobs":
            digest.update(path.name.encode())
        else:
            digest.update(f"{status.st_mtime_ns}/".encode() + _raw_header(path))
    return digest.hexdigest()


def _raw_header(path: Path) -> bytes:
    """Return a safetensors file's header as it stands: names, types, shapes and places."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(min(length, _MAX_HEADER_BYTES))


class _Layout:
    """Where everything is in a file.

    Args:
        shapes: [N, K] of each layer's weight, by name, in the order of the file.
        group_size: columns that share a scale.
        key: see checkpoint_key.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], group_size: int, key: str) -> None:
        self.shapes = dict(shapes)
        self.group_size = group_size
        entries: dict[str, Any] = {"__metadata__": {"format": "pt", "key": key}}
        starts: dict[str, int] = {}
        end = 0
        for name in shapes:
            starts[name] = end
            rows, columns = shapes[name]
            parts = (("codes", "U8", columns // 2), ("scales", "BF16", columns // group_size))
            for (part, dtype, width), size in zip((*parts, ("zeros", *parts[1][1:])), self.sizes(name), strict=True):
                entries[f"{name}.{part}"] = {"dtype": dtype, "shape": [rows, width], "data_offsets": [end, end + size]}
                end += size
        places = [end, end + 4 * len(shapes)]
        entries[_CHECKSUMS] = {"dtype": "U32", "shape": [len(shapes)], "data_offsets": places}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.starts = {name: len(self.header) + start for name, start in starts.items()}
        self.checksums_start = len(self.header) + end
        self.num_bytes = len(self.header) + places[1]

    def sizes(self, name: str) -> tuple[int, int, int]:
        """Return bytes of a layer's codes, scales and zeros."""
        rows, columns = self.shapes[name]
        of_groups = 2 * rows * (columns // self.group_size)
        return rows * columns // 2, of_groups, of_groups


class KeptWeights:
    """The weights of a file that was found whole; made by `open`."""

    def __init__(self, path: Path, file: BufferedReader, layout: _Layout) -> None:
        self._path = path
        self._file = file
        self._layout = layout
        # One for all layers: memory for each would be given back to the process, and not to the system.
        self._buffer = bytearray(max(sum(layout.sizes(name)) for name in layout.shapes))

    @classmethod
    def open(cls, path: Path, key: str, shapes: Mapping[str, torch.Size], group_size: int) -> KeptWeights | None:
        """Open a file if it holds just these weights, undamaged; another is removed, with a line in the log."""
        layout = _Layout(shapes, group_size, key)
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("int4 weights in %s cannot be read: %s", path, error)
            return None
        damage = _find_damage(file, layout)
        if damage is None:
            return cls(path, file, layout)
        file.close()
        logger.warning("int4 weights in %s are not used and made anew: %s", path, damage)
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def read(self, name: str) -> Int4Weight:
        """Return a layer's weight, on the CPU; good until the next is read.

        Raises:
            OSError: the file cannot be read any more.
        """
        rows = self._layout.shapes[name][0]
        sizes = self._layout.sizes(name)
        buffer = memoryview(self._buffer)[: sum(sizes)]
        self._file.seek(self._layout.starts[name])
        if self._file.readinto(buffer) != len(buffer):
            raise OSError(f"{self._path} became shorter while it was read")
        codes, scales, zeros = torch.split(torch.frombuffer(buffer, dtype=torch.uint8), list(sizes))
        return Int4Weight(
            codes.view(rows, -1), scales.view(torch.bfloat16).view(rows, -1), zeros.view(torch.bfloat16).view(rows, -1)
        )

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _find_damage(file: IO[bytes], layout: _Layout) -> str | None:
    """Read a file from end to end: None if it is what was written, else what is wrong."""
    try:
        if file.read(len(layout.header)) != layout.header:
            return "its header is another"
        size = file.seek(0, os.SEEK_END)
        if size != layout.num_bytes:
            return f"it has {size} bytes instead of {layout.num_bytes}"
        file.seek(len(layout.header))
        found = b"".join(_checksum(file, sum(layout.sizes(name))) for name in layout.shapes)
        if file.read() != found:
            return "its checksums do not match"
    except OSError as error:
        return str(error)
    return None


def _checksum(file: IO[bytes], num_bytes: int) -> bytes:
    """Return the CRC-32 of the next bytes of a file, in four bytes."""
    value = 0
    while num_bytes > 0 and (piece := file.read(min(num_bytes, _READ_BYTES))):
        value = zlib.crc32(piece, value)
        num_bytes -= len(piece)
    return value.to_bytes(4, "little")


class WeightWriter:
    """Writes a file layer by layer, in any order; a disk that is full costs the next start time, not this one its life.

    Args:
        path: where the file will be.
        key, shapes, group_size: as for KeptWeights.open.
    """

    def __init__(self, path: Path, key: str, shapes: Mapping[str, torch.Size], group_size: int) -> None:
        self._path = path
        self._layout = _Layout(shapes, group_size, key)
        self._checksums: dict[str, bytes] = {}
        self._file: IO[bytes] | None = None
        with self._giving_up():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem}-", delete=False)  # noqa: SIM115
            self._file.write(self._layout.header)

    def write(self, name: str, weight: Int4Weight) -> None:
        """Write a layer's weight."""
        if self._file is None:
            return
        checksum = 0
        with self._giving_up():
            self._file.seek(self._layout.starts[name])
            for tensor in (weight.codes, weight.scales, weight.zeros):
                octets = tensor.cpu().contiguous().view(torch.uint8).flatten().numpy().data
                checksum = zlib.crc32(octets, checksum)
                self._file.write(octets)
            self._checksums[name] = checksum.to_bytes(4, "little")

    def commit(self) -> None:
        """Put the file in its place, if every layer was written; drop it if not."""
        if self._file is None:
            return
        if self._checksums.keys() != self._layout.shapes.keys():
            self.abandon()
            return
        with self._giving_up():
            self._file.seek(self._layout.checksums_start)
            self._file.write(b"".join(self._checksums[name] for name in self._layout.shapes))
            self._file.flush()
            os.fsync(self._file.fileno())  # else the name may be on the disk before the bytes are
            self._file.close()
            Path(self._file.name).replace(self._path)
            self._file = None
            logger.info("int4 weights are kept in %s (%.0f MiB)", self._path, self._layout.num_bytes / 2**20)

    def abandon(self) -> None:
        """Remove what was written so far."""
        if self._file is not None:
            self._file.close()
            with contextlib.suppress(OSError):
                Path(self._file.name).unlink()
            self._file = None

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            logger.warning("int4 weights cannot be kept in %s, and will be made again: %s", self._path, error)
            self.abandon()
