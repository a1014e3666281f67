"""The two sequences, capture and restore, and what they decide.

`capture` and `restore` read like the order of their steps; each step is one call of a mechanism below
(`chrek.criu`, `chrek.memory`, `chrek.rootfs`) or of a neighbour here that decides something:
`preflight` refuses what cannot be captured, `compatibility` what cannot be restored.
"""
