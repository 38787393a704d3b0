"""The trtvlm command line, and what a person runs."""
