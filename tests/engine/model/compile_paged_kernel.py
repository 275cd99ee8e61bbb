"""Compiles the paged kernel for a GPU that need not be there, and prints the fast memory that each form takes.

Run by test_paged_kernel.py in a process of its own, where Triton compiles instead of interpreting.
"""

from __future__ import annotations

import inspect

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from engine.model import paged_kernel
from engine.model.paged_kernel import Form

TYPES = {2: "bf16", 4: "fp32"}
IDS = ("tile_sequences", "tile_firsts", "query_starts", "context_lens", "block_tables")


def shared_bytes(form: Form, *, is_single: bool, has_extras: bool, capability: int) -> int:
    """Compile to machine code, as a launch with aligned tensors does; bytes of shared memory that a program takes."""
    kernel = paged_kernel._paged_attention
    constants = form.constants(
        form.num_rows(is_single=is_single), has_window=has_extras, has_softcap=has_extras, has_sinks=has_extras
    )
    signature, aligned = {}, {}
    for index, name in enumerate(inspect.signature(kernel.fn).parameters):
        if name in constants:
            signature[name] = "constexpr"
        elif name in IDS:
            signature[name] = "*i64"
        elif name in ("scaling", "softcap"):
            signature[name] = "fp32"
        else:
            is_tensor = name in ("query", "keys", "values", "out", "sinks")
            signature[name] = "*" + TYPES[form.itemsize] if is_tensor else "i32"
            if name not in ("table_stride", "window"):
                aligned[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=form.options)
    assert compiled.asm["cubin"]
    return int(compiled.metadata.shared)


if __name__ == "__main__":
    for group, key_dim, value_dim, itemsize in ((1, 128, 128, 2), (7, 64, 64, 2), (2, 256, 256, 2), (4, 256, 192, 4)):
        for is_single in (True, False):
            form = Form(group, key_dim, value_dim, itemsize)
            print(shared_bytes(form, is_single=is_single, has_extras=group > 1, capability=80), flush=True)
