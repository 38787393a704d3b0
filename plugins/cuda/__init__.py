"""CUDA C++ kernels: compiled at run time for the device's own architecture, cached on disk, launched on torch's stream."""
