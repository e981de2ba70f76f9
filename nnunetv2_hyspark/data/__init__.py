"""From unlabelled scans to an nnU-Net data set, and the data that pre-training reads."""
