"""Kernels of our own for CPUs with AVX512-BF16, compiled once by the machine's own compiler and kept on disk.

Knows nothing of modules or models; where there is no compiler or the instructions are missing, there are no kernels.
Called by model/int4_kernels.py, which has torch's kernels for every other machine.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp")
COMPILE_TIMEOUT_S = 120

BF16_ROW_MULTIPLE, BF16_COLUMN_MULTIPLE = 4, 32
"""Of bf16_multiply's weights: rows that are computed together, and columns in one register."""


class NativeKernels:
    """The compiled functions, as tensors see them.

    Args:
        path: the shared library.

    Raises:
        OSError: it cannot be loaded, or this CPU lacks the instructions.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))  # its calls release the interpreter's lock
        if not library.has_instructions():
            raise OSError("this CPU has no AVX512-BF16")
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        self._int4_multiply = library.int4_multiply
        self._int4_multiply.argtypes = [pointer] * 6 + [integer] * 5
        self._int4_multiply.restype = None
        self._bf16_multiply = library.bf16_multiply
        self._bf16_multiply.argtypes = [pointer] * 3 + [integer] * 4
        self._bf16_multiply.restype = None

    def int4_multiply(self, x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, num_outputs: int) -> Tensor:
        """Return x W^T, bfloat16 [M, N].

        Args:
            x: bfloat16 [M, K], contiguous.
            words: int16 [N * K / 4], as model/int4_kernels.py packs them.
            scales: bfloat16 [N * K / group_size], likewise.
            zeros: like scales.
            num_outputs: N.
        """
        num_rows, num_columns = x.shape
        _check(x, num_columns, words.numel() * 4 // num_outputs)
        num_groups = scales.numel() // num_outputs
        out = x.new_empty(num_rows, num_outputs)
        sums = torch.empty(num_rows, num_groups)
        self._int4_multiply(
            x.data_ptr(), words.data_ptr(), scales.data_ptr(), zeros.data_ptr(), sums.data_ptr(), out.data_ptr(),
            num_rows, num_outputs, num_columns, num_columns // num_groups, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def bf16_multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x W^T, bfloat16 [M, N], of x bfloat16 [M, K] and a weight bfloat16 [N, K], both contiguous."""
        num_rows, num_columns = x.shape
        _check(x, num_columns, weight.shape[1])
        out = x.new_empty(num_rows, weight.shape[0])
        self._bf16_multiply(
            x.data_ptr(), weight.data_ptr(), out.data_ptr(),
            num_rows, weight.shape[0], num_columns, torch.get_num_threads(),
        )  # fmt: skip
        return out


def _check(x: Tensor, num_columns: int, expected: int) -> None:
    """Refuse what would read beyond a tensor's end: there is nobody behind a pointer to do it."""
    if x.dtype != torch.bfloat16 or num_columns != expected or not x.is_contiguous() or x.device.type != "cpu":
        raise RuntimeError(f"expected contiguous bfloat16 [M, {expected}] on the CPU, got {x.dtype} {tuple(x.shape)}")


def load_native(directory: Path | None) -> NativeKernels | None:
    """Compile the kernels, or take them from `directory`, where they were compiled before.

    Args:
        directory: where they are kept, if it is this user's alone, for what is in it is run; None for nowhere.

    Returns:
        The kernels; None, and why in the log, where they cannot be had.
    """
    if not _has_instructions():
        logger.info("no int4 kernels of our own: this CPU has no AVX512-BF16")
        return None
    compiler = next((path for path in map(shutil.which, COMPILERS) if path), None)
    try:
        if directory is not None and _is_own(directory):
            return NativeKernels(_kept(directory, compiler))
        with tempfile.TemporaryDirectory() as temporary:
            return NativeKernels(_compile(compiler, Path(temporary) / "kernels.so"))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        logger.info("no int4 kernels of our own: %s", detail.strip().splitlines()[0] if detail.strip() else error)
        return None


def _has_instructions() -> bool:
    """Whether it is worth compiling; the library itself has the last word."""
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return sys.platform == "linux" and (probe is None or bool(probe()))


def _is_own(directory: Path) -> bool:
    """Make the directory if it is not there; whether nobody else can put a library into it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    is_own = status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not is_own:
        logger.warning("%s can be written to by others: kernels are compiled for this process alone", directory)
    return is_own


def _kept(directory: Path, compiler: str | None) -> Path:
    """Return the library in `directory`, compiled anew where it is missing or not what was once written."""
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    for path in directory.glob(f"kernels-{key}-*.so"):
        # A damaged library would take the process with it: its name says what its bytes must be.
        if hashlib.sha256(path.read_bytes()).hexdigest()[:16] == path.stem.rpartition("-")[2]:
            return path
        logger.warning("%s is damaged: compiling it anew", path)
        path.unlink()
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        made = _compile(compiler, Path(temporary) / "kernels.so")
        target = directory / f"kernels-{key}-{hashlib.sha256(made.read_bytes()).hexdigest()[:16]}.so"
        made.replace(target)
    return target


def _compile(compiler: str | None, target: Path) -> Path:
    """Compile into `target`, and return it.

    Raises:
        OSError: there is no compiler.
        subprocess.SubprocessError: it failed, or took too long.
    """
    if compiler is None:
        raise OSError("no C++ compiler found")
    logger.info("compiling kernels for this CPU with %s", compiler)
    command = [compiler, *FLAGS, str(SOURCE), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    return target
