"""``make gpu-check``: build, verify and time the GPU kernels on any machine with a CUDA GPU.

Needs PyTorch and Triton, and nvcc with CMake for the CUDA C++ kernels; no vLLM and no network.
Everything but the timing runs on any device that a :class:`candidates.Candidate` serves, so the
tests run it on a CPU with the reference standing in for the kernels.
"""
