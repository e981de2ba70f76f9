"""Pretext tasks: one file each with its mask, its forward pass and its loss; nothing here knows nnU-Net."""
