"""Architectures, one file each, and the loading of weights into them."""
