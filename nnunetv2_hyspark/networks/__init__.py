"""Encoders and decoders: one hybrid encoder for dense and sparse input, a decoder that segments and reconstructs, and
the paper's, which reconstructs alone."""
