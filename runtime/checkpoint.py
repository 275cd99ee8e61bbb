"""What a checkpoint's weights take where they are stored, from the headers of its safetensors alone.

Knows nothing of models or memory; no torch here.
Called by planning.py.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# The bound that the format's own library sets.
_MAX_HEADER_BYTES = 100_000_000
# Bits of a number, by safetensors' names; of those that end in another way, the digits are the bits.
_BITS = {"BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4,
         "F6_E2M3": 6, "F6_E3M2": 6}  # fmt: skip
_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


class NoWeights(Exception):
    """There are no safetensors, or they are broken: serving would refuse them too."""


class HeadersOutOfReach(Exception):
    """The headers could not be read from the hub; nothing is known of the weights."""


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """A checkpoint's tensors.

    Args:
        bytes_by_dtype: as torch writes dtypes.
        num_files: that hold them.
        num_tensors: in all.
    """

    bytes_by_dtype: Mapping[str, int]
    num_files: int
    num_tensors: int

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(self.bytes_by_dtype.values())

    @property
    def main_dtype(self) -> str | None:
        """The floating-point dtype that most bytes are in; None without any."""
        floats = {name: size for name, size in self.bytes_by_dtype.items() if name in _NAMES.values()}
        return max(floats, key=floats.__getitem__) if floats else None


def read_stored_weights(source: str, revision: str | None) -> StoredWeights:
    """The weights of a local directory, of the hub's cache on this machine, or of the hub itself.

    Args:
        source: directory or hub id.
        revision: of the hub; None for the default.
    Raises:
        NoWeights: there are none in safetensors.
        HeadersOutOfReach: they are on the hub, which does not answer.
    """
    directory = Path(source) if Path(source).is_dir() else _cached(source, revision)
    return _of_hub(source, revision) if directory is None else _of_directory(directory)


def _of_directory(directory: Path) -> StoredWeights:
    if (directory / SINGLE_FILE).is_file():
        names = [SINGLE_FILE]
    elif (directory / INDEX_FILE).is_file():
        names = sorted(set(_read_index(directory / INDEX_FILE).values()))
    else:
        raise NoWeights(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}")
    return _count((_read_header(directory / name) for name in names), len(names))


def _read_index(path: Path) -> Mapping[str, str]:
    try:
        files: Mapping[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(name, str) for name in files.values()):
            raise TypeError("a file's name is no text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NoWeights(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    return files


def _read_header(path: Path) -> list[tuple[str, int]]:
    """(dtype, numbers) of each tensor of one file."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        return [
            (str(t["dtype"]), prod(int(n) for n in t["shape"])) for name, t in header.items() if name != "__metadata__"
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise NoWeights(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _cached(source: str, revision: str | None) -> Path | None:
    """The directory of a snapshot whose weights are all in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    def look_up(name: str) -> Path | None:
        found = try_to_load_from_cache(source, name, revision=revision)
        return Path(found) if isinstance(found, str) else None

    single = look_up(SINGLE_FILE)
    if single is not None:
        return single.parent
    index = look_up(INDEX_FILE)
    if index is None or not all(look_up(name) for name in set(_read_index(index).values())):
        return None
    return index.parent


def _of_hub(source: str, revision: str | None) -> StoredWeights:
    """Reads the beginning of each file over the network."""
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    try:
        files = get_safetensors_metadata(source, revision=revision).files_metadata.values()
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise NoWeights(_one_line(error)) from error
    except Exception as error:  # of whichever HTTP library the hub's client uses, and its own
        raise HeadersOutOfReach(f"{type(error).__name__}: {_one_line(error)}") from error
    tensors = ([(t.dtype, t.parameter_count) for t in file.tensors.values()] for file in files)
    return _count(tensors, len(files))


def _count(files: Iterable[Sequence[tuple[str, int]]], num_files: int) -> StoredWeights:
    sizes: Counter[str] = Counter()
    num_tensors = 0
    for tensors in files:
        for dtype, number in tensors:
            sizes[_NAMES.get(dtype, dtype)] += number * _bits(dtype) // 8
            num_tensors += 1
    return StoredWeights(dict(sizes), num_files, num_tensors)


def _bits(dtype: str) -> int:
    digits = dtype.lstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    try:
        return _BITS.get(dtype) or int(digits)
    except ValueError as error:
        raise NoWeights(f"a tensor's dtype is {dtype!r}, which this program does not know") from error


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
