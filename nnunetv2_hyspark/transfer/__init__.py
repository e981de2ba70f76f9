"""Checkpoints in and out: ours, nnU-Net's and the official release's, with a report of what was loaded."""
