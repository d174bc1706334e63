"""One engine of vLLM in a process of its own: `python vllm_worker.py job.json result.json`.

job: {folder, options of LLM, prompts: [[token]], tokens, forced: [token]}. result: {tokens: greedy tokens of every
prompt, logprobs: [{token: log probability}] at every position of `forced`, engine: how it ran}.

FDK_TEST_VLLM holds options of LLM, as JSON, that a machine needs for every engine.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# Engines of several tests run at the same time; each would bind its threads to the first cores.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
# The attention of vLLM in Triton would round float32 to TF32 in its products.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")


def described(config) -> dict:
    """What of vLLM's configuration, as the engine has settled it, says how products were called."""
    compilation = config.compilation_config
    return {
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "processes": config.parallel_config.tensor_parallel_size,
        "compilation": compilation.mode.name.lower(),
        "cuda_graphs": compilation.cudagraph_mode.name.lower(),
        "captured_sizes": compilation.cudagraph_capture_sizes or [],
    }


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    options = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 8, "max_logprobs": 20}
    options |= json.loads(os.environ.get("FDK_TEST_VLLM", "{}")) | job["options"]
    if options.get("tensor_parallel_size", 1) == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams, __version__

    llm = LLM(model=job["folder"], skip_tokenizer_init=True, **options)
    greedy = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False)
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], greedy, use_tqdm=False)
    forced = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=20, ignore_eos=True, detokenize=False)
    scored = llm.generate([{"prompt_token_ids": job["forced"]}], forced, use_tqdm=False)[0]
    result = {
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        "logprobs": [{token: value.logprob for token, value in at.items()} for at in scored.prompt_logprobs[1:]],
        "engine": {"vllm": __version__} | described(llm.llm_engine.vllm_config),
    }
    Path(sys.argv[2]).write_text(json.dumps(result))
    llm.llm_engine.engine_core.shutdown()
    # vLLM leaves daemon threads behind. Python, when it ends, unwinds such a thread at its next step, and where that is
    # under a C++ frame which lets nothing through, the process is aborted after all its work is done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
