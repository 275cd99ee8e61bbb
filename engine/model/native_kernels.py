"""Kernels of our own for CPUs with AVX512-BF16, compiled once by the machine's own compiler and kept on disk.

Knows nothing of modules or models; where there is no compiler or the instructions are missing, there are no kernels.
Called by the loader and by int4/kernels.py, which have torch's kernels for every other machine.
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_HERE = Path(__file__).parent
SOURCES = tuple(_HERE / f"native_{name}.cpp" for name in ("kernels", "attention", "shims"))
HEADERS = tuple(_HERE / f"native_{name}.h" for name in ("vectors", "values", "blocks", "attention"))
COMPILERS = ("c++", "g++", "clang++")
_TORCH = Path(torch.__file__).parent
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", f"-I{_HERE}", f"-I{_TORCH / 'include'}")
LINKED = (f"-L{_TORCH / 'lib'}", "-ltorch_cpu")  # this process has it already
COMPILE_TIMEOUT_S = 120

BF16_ROW_MULTIPLE, BF16_COLUMN_MULTIPLE = 4, 32
"""Of bf16_multiply's weights: rows that are computed together, and columns in one register."""

PACKED_UNIT = 64
"""Rows of a weight that oneDNN packs side by side."""

_PREFIX = "AOTITorchError aoti_torch_cpu_"
SHIMS = {
    "packed_rows": "(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*, int64_t, AtenTensorHandle*)",
    "plain_rows": "(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*)",
    "int4_multiply": (
        "(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, int64_t, AtenTensorHandle*)"
    ),
    "attend_slots": (
        "(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*, int64_t, double, int64_t, double, "
        "AtenTensorHandle*)"
    ),
    "attend_positions": "(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, double, AtenTensorHandle*)",
}
"""Operators (model/operators.py) that code made by AOTInductor may call as functions of the library: C parameters."""


def declaration(name: str) -> str:
    """The C declaration of one of SHIMS."""
    return f"{_PREFIX}{name}{SHIMS[name]}"


class _AttentionCall(ctypes.Structure):
    """AttentionCall of native_attention.h."""

    _fields_ = [
        *((f"{tensor}_{part}", ctypes.c_int64) for tensor in "qkv" for part in ("data", "head_stride", "row_stride")),
        *((name, ctypes.c_int64) for name in ("sinks", "out", "is_bf16", "num_tokens", "num_heads", "num_kv_heads")),
        *((name, ctypes.c_int64) for name in ("key_dim", "value_dim", "layer", "window")),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


class _WholeCall(ctypes.Structure):
    """WholeCall of native_attention.h."""

    _fields_ = [
        *((f"{tensor}_{part}", ctypes.c_int64) for tensor in "qkv" for part in ("data", "head_stride", "row_stride")),
        *((f"{tensor}_batch", ctypes.c_int64) for tensor in "qkv"),
        *((name, ctypes.c_int64) for name in ("out", "is_bf16", "num_sequences", "num_positions", "num_heads")),
        *((name, ctypes.c_int64) for name in ("num_kv_heads", "key_dim", "value_dim", "num_threads")),
        ("scaling", ctypes.c_float),
    ]


class NativeKernels:
    """The compiled functions, as tensors see them.

    Args:
        path: the shared library.

    Raises:
        OSError: it cannot be loaded, or this CPU lacks the instructions.
    """

    def __init__(self, path: Path) -> None:
        # Its calls release the interpreter's lock. Global, for compiled code finds the functions that it calls here.
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        if not library.has_instructions():
            raise OSError("this CPU has no AVX512-BF16")
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        self._int4_multiply = library.int4_multiply
        self._int4_multiply.argtypes = [pointer] * 6 + [integer] * 5
        self._int4_multiply.restype = None
        self._bf16_multiply = library.bf16_multiply
        self._bf16_multiply.argtypes = [pointer] * 3 + [integer] * 4
        self._bf16_multiply.restype = None
        self._packed_multiply = library.packed_multiply
        self._packed_multiply.argtypes = [pointer] * 4 + [integer] * 5
        self._packed_multiply.restype = None
        self._attend_call = library.attend_call
        self._attend_call.argtypes = [pointer]
        self._attend_sources_call = library.attend_sources_call
        self._attend_sources_call.argtypes = [pointer] * 2
        self._attend_whole_call = library.attend_whole_call
        self._attend_whole_call.argtypes = [pointer]
        self._attend_whole_call.restype = None
        self._set_step = library.set_step
        self._set_step.argtypes = [pointer]
        self._set_step.restype = None
        self._set_num_threads = library.set_num_threads
        self._set_num_threads.argtypes = [integer]
        self._set_num_threads.restype = None

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

    def packed_multiply(self, x: Tensor, words: Tensor, bias: Tensor | None, num_outputs: int) -> Tensor:
        """Return x W^T + bias, bfloat16 [..., N].

        Args:
            x: bfloat16 [..., K], K even.
            words: bfloat16 [units, K / 2 and more, PACKED_UNIT, 2] as oneDNN packs [N, K], zeros beyond both.
            bias: bfloat16 [N] or None.
            num_outputs: N.
        """
        if not x.is_contiguous():
            x = x.contiguous()
        *sizes, num_columns = x.shape
        padded = 2 * words.shape[1]
        if x.dtype is not torch.bfloat16 or num_columns > padded or num_outputs > words.shape[0] * PACKED_UNIT:
            raise RuntimeError(f"expected bfloat16 of at most {padded} columns, got {x.dtype} {tuple(x.shape)}")
        out = x.new_empty(*sizes, num_outputs)
        self._packed_multiply(
            x.data_ptr(), words.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(),
            x.numel() // num_columns, num_outputs, num_columns, padded, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def attend_slots(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        layer: int,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Attention of a layer's tokens over the current step's slots, which gain their K and V: [1, T, H, Dv].

        Args:
            query, key, value: [1, H, T, D] as model/native_step.py's can_attend says, values of a head in one run.
            sinks: [H] or None.

        Raises:
            RuntimeError: there is no step, or it has no such layer, or more tokens.
        """
        _, num_heads, num_tokens, key_dim = query.shape
        value_dim = value.shape[3]
        out = query.new_empty((1, num_tokens, num_heads, value_dim))
        sinks = None if sinks is None else sinks.float()
        call = _AttentionCall(
            *_strided(query), *_strided(key), *_strided(value),
            0 if sinks is None else sinks.data_ptr(), out.data_ptr(), query.dtype is torch.bfloat16,
            num_tokens, num_heads, key.shape[1], key_dim, value_dim, layer, window or 0, scaling, softcap or 0.0,
        )  # fmt: skip
        if not self._attend_call(ctypes.byref(call)):
            raise RuntimeError(f"attention of {num_tokens} tokens in layer {layer} is not of the current step")
        return out

    def attend_sources(
        self, address: int, query: Tensor, num_kv_heads: int, value_dim: int, layer: int, scaling: float
    ) -> Tensor:
        """Attention of a layer's tokens over all of their sources' K and V: [1, T, H, Dv].

        Args:
            address: of the step (model/native_step.py) that says where the sources are.
            query: [1, H, T, Dk] as can_attend says, values of a head in one run.

        Raises:
            RuntimeError: the step has no such layer, or more tokens.
        """
        _, num_heads, num_tokens, key_dim = query.shape
        out = query.new_empty((1, num_tokens, num_heads, value_dim))
        call = _AttentionCall(
            *_strided(query), 0, 0, 0, 0, 0, 0, 0, out.data_ptr(),
            query.dtype is torch.bfloat16, num_tokens, num_heads, num_kv_heads, key_dim, value_dim, layer, 0,
            scaling, 0.0,
        )  # fmt: skip
        if not self._attend_sources_call(ctypes.byref(call), address):
            raise RuntimeError(f"attention of {num_tokens} tokens to sources in layer {layer} is not of this step")
        return out

    def attend_positions(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention of sequences over themselves, without a mask: [B, L, H, Dv].

        Args:
            query, key, value: [B, H, L, D] as model/native_step.py's can_attend says, values of a head in one run.
        """
        num_sequences, num_heads, num_positions, key_dim = query.shape
        value_dim = value.shape[3]
        out = query.new_empty((num_sequences, num_positions, num_heads, value_dim))
        if key.shape[2] != num_positions:
            raise RuntimeError(f"expected as many keys as queries, got {key.shape[2]} and {num_positions}")
        call = _WholeCall(
            *_strided(query), *_strided(key), *_strided(value),
            query.stride(0), key.stride(0), value.stride(0), out.data_ptr(), query.dtype is torch.bfloat16,
            num_sequences, num_positions, num_heads, key.shape[1], key_dim, value_dim, torch.get_num_threads(), scaling,
        )  # fmt: skip
        self._attend_whole_call(ctypes.byref(call))
        return out

    def follow_threads(self) -> None:
        """Have what compiled code calls use as many threads as torch does."""
        self._set_num_threads(torch.get_num_threads())

    @contextmanager
    def step(self, address: int) -> Iterator[None]:
        """Make a native step (model/native_step.py) this thread's current one while the block runs."""
        self.follow_threads()
        self._set_step(address)
        try:
            yield
        finally:
            self._set_step(None)


def _strided(tensor: Tensor) -> tuple[int, int, int]:
    """Strided of native_attention.h, of a tensor [B, H, T, D]."""
    _, head_stride, row_stride, stride = tensor.stride()
    if stride != 1:
        raise RuntimeError("expected heads whose values lie one after the other")
    return tensor.data_ptr(), head_stride, row_stride


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
        logger.info("no kernels of our own: this CPU has no AVX512-BF16")
        return None
    compiler = next((path for path in map(shutil.which, COMPILERS) if path), None)
    try:
        if directory is not None and _is_own(directory):
            return NativeKernels(_kept(directory, compiler))
        with tempfile.TemporaryDirectory() as temporary:
            return NativeKernels(_compile(compiler, Path(temporary) / "kernels.so"))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        logger.info("no kernels of our own: %s", detail.strip().splitlines()[0] if detail.strip() else error)
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
    words = f"{torch.__version__} {' '.join((*FLAGS, *LINKED))}".encode()
    content = b"".join(path.read_bytes() for path in (*SOURCES, *HEADERS))
    key = hashlib.sha256(content + words).hexdigest()[:16]
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
    command = [compiler, *FLAGS, *map(str, SOURCES), *LINKED, "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    return target
