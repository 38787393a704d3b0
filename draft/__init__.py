"""Train, align, evaluate and package the draft model."""
