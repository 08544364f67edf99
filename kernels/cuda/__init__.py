"""The kernels on a CUDA device, for CuPy arrays: same meaning as their namesakes in kernels/. Imports nothing."""
