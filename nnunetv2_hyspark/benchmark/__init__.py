"""Timing the block path against dense references, interleaved in one process."""
