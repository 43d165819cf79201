"""What vLLM is told of graphs, and what its batches say of pages, without a GPU; and the commands of the documentation.

That nothing in a step waits for the device: tests/models/serving/test_pages.py.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: docs/serving.md says how")

from test_vllm import ANCHORS, saved  # noqa: E402  its settings come before vLLM is imported

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    from vllm.config import CUDAGraphMode
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
    from vllm.v1.kv_cache_interface import MambaSpec

    import lizard_vllm
    from lizard_vllm.backend import LizardMetadataBuilder

    lizard_vllm.register()
    folder = tmp_path_factory.mktemp("model")
    saved(folder, num_hidden_layers=1, attention=ANCHORS)
    config = EngineArgs(model=str(folder), dtype="float32", max_model_len=256, max_num_seqs=8).create_engine_config()
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE  # as on a GPU
    kind = MambaAttentionBackendEnum.LIZARD
    spec = MambaSpec(block_size=256, shapes=((64,),), dtypes=(torch.uint8,), mamba_type=kind)
    return LizardMetadataBuilder(spec, ["layer"], config, torch.device("cpu"))


def batch(pages: list[int], new: list[int], ends: list[int], reading: list[bool]):
    """As a runner hands it out: requests in pages, their new tokens and their lengths with them."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts, ends = torch.tensor([0, *new]).cumsum(0).int(), torch.tensor(ends, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=ends, seq_lens_cpu_upper_bound=ends,
        num_reqs=len(pages), num_actual_tokens=int(starts[-1]), max_query_len=max(new), max_seq_len=int(ends.max()),
        block_table_tensor=torch.tensor(pages, dtype=torch.int32)[:, None], is_prefilling=torch.tensor(reading),
        slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.int64),
    )  # fmt: skip


def test_steps_of_decodes_are_captured_whole_and_all_graphs_are_cut_at_the_operator(builder):
    from vllm.config import CompilationConfig
    from vllm.v1.attention.backend import AttentionCGSupport

    import lizard_vllm.layer  # noqa: F401

    support = type(builder).get_cudagraph_support(builder.vllm_config, builder.kv_cache_spec)
    assert support is AttentionCGSupport.UNIFORM_BATCH  # of one token each: drafts are refused
    assert "vllm::lizard_attention" in CompilationConfig._attention_ops


def test_captures_without_a_compiler_stop_at_the_operator_too():
    """Else a mixed batch would be replayed with the pages of the batch that was captured. Decided at import."""
    code = "from lizard_vllm.layer import _attend; print(_attend.__wrapped__.__module__)"
    settings = os.environ | {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True)
    assert done.stdout.split() == ["lizard_vllm.layer"], done.stderr


def test_a_captured_step_finds_the_next_ones_pages_where_its_own_were(builder):
    captured = builder.build_for_cudagraph_capture(batch([3, 4, 5, 6], [1] * 4, [1] * 4, [False] * 4))
    assert captured.far  # one graph of a step must do before and past the limit
    slots = captured.state_indices_tensor_d
    replayed = builder.build(0, batch([7, 2, 0, 0], [1] * 4, [40, 30, 0, 0], [False] * 4))
    assert replayed.state_indices_tensor_d.data_ptr() == slots.data_ptr()
    assert captured.steps({}).decode_slots.tolist() == [7, 2, -1, -1]  # the last two are graph padding


def test_a_batch_says_where_its_prefills_are_without_a_read_of_the_device(builder):
    made = builder.build(0, batch([7, 2, 5], [1, 9, 3], [40, 9, 51], [False, True, True]))
    steps = made.steps({})
    assert steps.decode_slots.tolist() == [7] and steps.prefill_slots.tolist() == [2, 5]
    assert (steps.prefill_begins, steps.prefill_lengths, steps.far) == ([0, 48], [9, 3], True)
    assert steps.prefill_starts.tolist() == [0, 9, 12] and steps.has_state.tolist() == [False, True]
    assert not builder.build(0, batch([7, 2], [1, 9], [48, 9], [False, True])).far  # the limit is 48


def test_vllm_takes_the_commands_of_the_documentation():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    lines = PAGE.read_text().replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("    vllm serve")]
    assert len(commands) > 10
    parser = make_arg_parser(FlexibleArgumentParser())
    for command in commands:
        arguments = parser.parse_args(command)
        validate_parsed_serve_args(arguments)
        assert arguments.model_tag == "my-lizard"
