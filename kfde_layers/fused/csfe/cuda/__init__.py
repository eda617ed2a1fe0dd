"""CFE, SFE and CSFE on CUDA, in Triton: two passes over the map, and a small kernel between them.

The first pass finds the moments of each channel, the small kernel turns them into coefficients, and the second pass
applies the gates. One program of the second handles channel block c and its partner block c + C/2, because CFE
exchanges them: every element is read once and written once. The backward pass has the same steps, and computes the
gates again instead of reading stored ones. Small maps take one launch for all steps (small.py). Arithmetic is in
float32, and no sum depends on the order in which programs run.
"""
