"""The fused implementation of MFDF: one convolution by merged kernels instead of a convolution for each branch."""
