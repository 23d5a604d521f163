"""``make gpu-check``: verify and time the GPU kernels on any machine with a CUDA GPU.

Needs PyTorch and Triton, and for the CUDA C++ kernels a bundle (``make gpu-bundle``) or nvcc with
CMake; no vLLM and no network. ``run.py`` starts one process per candidate, step and format
(``step.py``); each case is a line in ``cases.jsonl`` as soon as it ends (``evidence.py``), so that
whatever breaks, what was found before is kept. Everything but the sanitizers runs on a CPU too,
with the reference as the candidate, which is how the tests run it.
"""
