"""ChReK saves a warmed-up application once and starts later ones from that state.

The parts and the layers they stand in are described in ``docs/architecture.md``.
"""

__version__ = "0.1.0"
