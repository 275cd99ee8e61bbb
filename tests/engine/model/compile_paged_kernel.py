"""Compiles the paged kernel for a GPU that need not be there, and prints the fast memory that each form takes.

Run by test_paged_kernel.py in a process of its own, where Triton compiles instead of interpreting.
"""

from __future__ import annotations

import inspect
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from engine.model import paged_kernel
from engine.model.paged_form import Form

TYPES = {2: "bf16", 4: "fp32"}
IDS = ("tile_sequences", "tile_firsts", "query_starts", "context_lens", "block_tables")
UNALIGNED = (*IDS, "sinks", "stats", "counters", "table_stride", "window")  # as the kernel declares them
FORMS = (Form(8, 1, 128, 128, 2), Form(2, 7, 64, 64, 2), Form(4, 2, 256, 256, 2), Form(2, 4, 256, 192, 4))
WAYS = ((True, False), (True, True), (False, False))  # is_single, is_split


def compile_for(form: Form, *, is_single: bool, is_split: bool, has_extras: bool, capability: int) -> Any:
    """Compile to machine code, as a launch with aligned tensors does."""
    kernel = paged_kernel._paged_attention
    constants = form.constants(
        is_single=is_single, is_split=is_split, has_window=has_extras, has_softcap=has_extras, has_sinks=has_extras
    )
    signature, aligned = {}, {}
    scratch = {"stats": "*fp32", "sums": "*fp32", "counters": "*i32"} if is_split else {}
    for index, name in enumerate(inspect.signature(kernel.fn).parameters):
        if name in constants:
            signature[name] = "constexpr"
        elif name in IDS:
            signature[name] = "*i64"
        elif name in ("scaling", "softcap"):
            signature[name] = "fp32"
        else:
            is_tensor = name in ("query", "keys", "values", "out", "sinks", "stats", "sums", "counters")
            signature[name] = scratch.get(name, "*" + TYPES[form.itemsize]) if is_tensor else "i32"
            if name not in UNALIGNED:
                aligned[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=form.options(is_single=is_single))
    assert compiled.asm["cubin"]
    return compiled


if __name__ == "__main__":
    for capability, forms, ways in ((80, FORMS, WAYS), (90, FORMS[:2], WAYS[1:])):
        for form in forms:
            for is_single, is_split in ways:
                made = compile_for(
                    form, is_single=is_single, is_split=is_split, has_extras=form.group > 1, capability=capability
                )
                print(made.metadata.shared, flush=True)
