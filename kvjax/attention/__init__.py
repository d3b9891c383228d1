"""Attention variants, one file a family, on the protocol of `base`."""
