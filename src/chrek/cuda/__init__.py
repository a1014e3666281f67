"""GPU state through NVIDIA's driver: binding, sequence, map of GPUs, what has to be refused.

- `chrek.cuda.driver`: the checkpoint calls of ``libcuda.so.1``; `chrek.cuda.abi` their layouts.
- `chrek.cuda.sequence`: lock, checkpoint, restore, unlock for a tree, undone from every state.
- `chrek.cuda.gpumap`: which GPU takes the place of which.
- `chrek.cuda.handover`: taking the files of pools into a checkpoint.
- `chrek.cuda.inventory`: the GPUs of this machine and what processes have on them.
- `chrek.cuda.detect`: what the driver would save and never bring back, from `chrek.cuda.evidence`.
"""
