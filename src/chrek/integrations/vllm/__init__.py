"""vLLM under checkpoints, without changing vLLM.

- `chrek.integrations.vllm.plugin`: an entry point of ``vllm.general_plugins``; vLLM loads it in every
  process. It makes vLLM's sleep mode stream the weights with the engine of `chrek.workload.pool`.
- ``python -m chrek.integrations.vllm serve MODEL ...``: `vllm serve` that takes part in a checkpoint:
  warm-up, sleep, ready, wake-up.

Written for vLLM 0.25.1; newer versions are looked at for what they lack, not by their number.
"""
