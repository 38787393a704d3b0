"""What a prompt needs between its INT4 products: sums and norms, routing, the append to the caches, attention."""
