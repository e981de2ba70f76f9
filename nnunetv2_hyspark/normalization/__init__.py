"""nnU-Net normalization schemes of HySparK, found by name through the start-up hook, also by preprocessing workers."""
