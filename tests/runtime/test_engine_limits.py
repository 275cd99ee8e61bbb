"""What options and a model say of the engine's limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from config import Settings, StartupError
from engine.config import CompileConfig
from runtime.engine_limits import compile_config


def test_options_of_compiling_reach_the_engine(tmp_path: Path) -> None:
    settings = Settings(torch_compile=True, cache_dir=str(tmp_path))
    assert compile_config(settings, "cpu") == CompileConfig(tmp_path / "compiled")
    tuned = Settings(torch_compile=True, torch_compile_mode="max-autotune", cache_dir=str(tmp_path))
    assert compile_config(tuned, "cpu").is_autotuned
    assert not compile_config(settings, "cuda").is_autotuned  # its mode is the default, not asked for
    with pytest.raises(StartupError, match="--torch-compile True: should be with --accelerator-type cpu or cuda"):
        compile_config(settings, "mps")


@pytest.mark.parametrize(
    ("mode", "is_autotuned", "has_graphs"),
    [
        ("default", False, False),
        ("reduce-overhead", False, True),
        ("max-autotune", True, True),
        ("max-autotune-no-cudagraphs", True, False),
    ],
)
def test_graphs_are_captured_on_cuda_where_the_mode_means_them(
    mode: str, is_autotuned: bool, has_graphs: bool, tmp_path: Path
) -> None:
    settings = Settings(torch_compile=True, torch_compile_mode=mode, cache_dir=str(tmp_path))
    on_cuda, on_cpu = (compile_config(settings, device) for device in ("cuda", "cpu"))
    assert (on_cuda.is_autotuned, on_cuda.has_graphs) == (is_autotuned, has_graphs)
    assert (on_cpu.is_autotuned, on_cpu.has_graphs) == (is_autotuned, False)
