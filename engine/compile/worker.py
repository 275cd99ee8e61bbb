"""A process of its own that compiles decode steps, so that serving never waits for a compiler.

Knows nothing of the server: a Job on standard input, one line of JSON on standard output for each graph.
Started by compile/compiler.py; ends with it, because standard input does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.compile.skeleton import Skeleton


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be compiled.

    Args:
        skeleton: of the step.
        sizes: numbers of rows, in the order in which they are wanted.
        directory: where packages go.
        scratch: a directory that whoever started this process removes.
        num_threads: that compiled code uses on a CPU.
        is_autotuned: whether kernels are chosen by measuring.
        niceness: how far the process steps back behind others.
    """

    skeleton: Skeleton
    sizes: tuple[int, ...]
    directory: Path
    scratch: Path
    num_threads: int
    is_autotuned: bool
    niceness: int


def package_path(directory: Path, size: int, content: bytes) -> Path:
    """A package is named after its content: one that was cut short or changed does not bear its name."""
    return directory / f"{size}-{hashlib.sha256(content).hexdigest()[:32]}.pt2"


def main() -> None:
    """Compile what standard input asks for."""
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers print what they like
    job: Job = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(job.niceness)
    tempfile.tempdir = str(job.scratch)  # inductor's own cache too: nothing broken is ever found there
    with contextlib.suppress(ImportError, AttributeError):  # inductor's own: where it has moved, the operator serves
        _call_packed_linears_directly()
    for size in job.sizes:
        started = time.monotonic()
        try:
            path = _compile(job, size)
            line = {"size": size, "path": str(path), "seconds": time.monotonic() - started}
        except Exception as error:  # any model, any compiler: whatever it is, the server goes on without
            text = " ".join(str(error).split())[:300]
            line = {"size": size, "error": f"{type(error).__name__}: {text}"}
        print(json.dumps(line), file=report, flush=True)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def _call_packed_linears_directly() -> None:
    """Have generated code call oneDNN's linear itself, without the way through Python: seven times in each layer."""
    import torch
    from torch._inductor import mkldnn_ir
    from torch._inductor.ir import TensorBox
    from torch._inductor.lowering import register_lowering

    from engine.model.operators import NAMESPACE

    create: Any = mkldnn_ir.LinearUnary.create

    def lower(x: Any, packed: Any, bias: Any) -> Any:
        # inductor's own lowering is for weights that it has packed itself.
        return TensorBox.create(create(x, packed, bias, "none", [], ""))

    operator = getattr(torch.ops, NAMESPACE).packed_linear.default
    register_lowering(operator, type_promotion_kind=None)(lower)


def _shims() -> dict[Any, list[str]]:
    """The operators that generated code calls as functions: the serving process has the library that holds them."""
    import torch

    from engine.model import operators
    from engine.model.native_kernels import declaration

    namespace = getattr(torch.ops, operators.NAMESPACE)
    return {getattr(namespace, name).default: [declaration(name)] for name in operators.NATIVE}


def _compile(job: Job, size: int) -> Path:
    """The package of one graph, complete or not there."""
    import torch

    from engine.compile.tracing import trace

    torch.set_num_threads(job.num_threads)
    program = trace(job.skeleton, size)
    options: dict[str, Any] = {
        "max_autotune": job.is_autotuned,
        "compile_threads": 1,
        # What the processor says it has need not be tried with six compilations.
        "cpp.vec_isa_ok": True,
        "aot_inductor.compile_wrapper_opt_level": "O1",
        # Worth its time only if many files include them.
        "aot_inductor.precompile_headers": len(job.sizes) > 2,
    }
    if job.skeleton.is_native and hasattr(torch._inductor.config.aot_inductor, "custom_ops_to_c_shims"):
        options["aot_inductor.custom_ops_to_c_shims"] = _shims()
    made = Path(job.scratch) / f"{size}.pt2"
    torch._inductor.aoti_compile_and_package(program, package_path=str(made), inductor_configs=options)
    content = made.read_bytes()
    path = package_path(job.directory, size, content)
    part = path.with_suffix(".part")
    part.write_bytes(content)
    part.replace(path)
    return path


if __name__ == "__main__":
    # As the module that others know, not as __main__: a Job is read by that name.
    from engine.compile.worker import main as run

    run()
