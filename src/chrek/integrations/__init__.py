"""Adapters for programs of other people: each runs inside that program and imports `chrek.workload` only."""
