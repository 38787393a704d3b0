"""The CUDA kernels on a CPU: the very sources, compiled for the host, threads as fibers. For tests, and for finding races."""
