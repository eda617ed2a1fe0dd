"""Triton kernels and their launchers; imported by the operators when they run."""
