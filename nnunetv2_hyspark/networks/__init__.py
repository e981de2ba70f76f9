"""Encoders and decoders: one hybrid encoder for dense and sparse input, one decoder per purpose."""
