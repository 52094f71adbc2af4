"""Serve a fine-tuned FLUX.1 model exactly: documented inputs in, image files out."""

__version__ = "0.1.0"
