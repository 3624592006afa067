"""Architectures: one readable file each, with Hugging Face's names for options and weights."""
