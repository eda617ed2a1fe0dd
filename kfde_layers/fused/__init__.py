"""The fused implementations, one folder per family of operations, built to the same plan.

`auto.py` says when "auto" takes the fused implementation, `operator.py` registers the operators and their gradients,
`cpu.py` computes them on CPU, and `cuda/` on CUDA. Triton is imported when a kernel first runs.
"""
