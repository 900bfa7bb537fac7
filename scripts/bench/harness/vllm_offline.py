"""vLLM on the same cases, in vLLM's own Python: python -m harness.vllm_offline FOLDER JSON.

The JSON names the cases, the rounds and so on (`Task`); what was measured is the last line of stdout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vllm

from harness import answers
from harness.offline_rounds import Task, measure
from harness.workload import Request


def main() -> None:
    folder, task = Path(sys.argv[1]), Task.from_json(sys.argv[2])
    options: dict[str, Any] = {"tensor_parallel_size": task.tensor_parallel_size}
    llm = vllm.LLM(
        model=str(folder),
        gpu_memory_utilization=0.9,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **options,
    )

    def generate(requests: Sequence[Request]) -> list[list[int]]:
        prompts = [{"prompt_token_ids": request.prompt} for request in requests]
        params = [
            vllm.SamplingParams(
                temperature=0.0, max_tokens=request.max_tokens, ignore_eos=True, detokenize=False
            )
            for request in requests
        ]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    found = measure("vLLM", generate, answers.find(folder), task, settle=lambda: None)
    print(json.dumps({"version": vllm.__version__, "seconds": found}))


if __name__ == "__main__":
    main()
