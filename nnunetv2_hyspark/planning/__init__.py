"""Planning: topology, patch and batch sizes for a network and a GPU, and plans that match a checkpoint."""
