"""Learning from images without labels: objectives on encoders, and what trains them."""
