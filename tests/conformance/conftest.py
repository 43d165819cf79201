"""Marks that transformers' tests carry."""

from __future__ import annotations

import pytest

MARKS = (
    "flash_attn_test flash_attn_3_test flash_attn_4_test generate torch_compile_test torch_export_test "
    "onnx_export_test executorch_export_test accelerate_tests slow order is_pipeline_test is_training_test "
    "is_tensor_parallel_test is_expert_parallel_test is_fsdp_test is_agent_test is_staging_test"
)


def pytest_configure(config: pytest.Config) -> None:
    for name in MARKS.split():
        config.addinivalue_line("markers", f"{name}: a mark of transformers' own")
