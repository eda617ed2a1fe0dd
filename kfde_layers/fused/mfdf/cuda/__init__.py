"""MFDF on CUDA, in Triton: the mean of a depthwise convolution, and a convolution by merged kernels.

The mean needs no convolution: each element is weighted by the sum of the taps that reach it, its coverage. Elements
that the same taps reach are in the same border class; the map's interior is one class. A small table holds the coverage
of each class.

If the taps are s px apart, the map falls into s x s lattices, on each of which they are adjacent. A lane holds the
merged taps of its channel in registers and walks down a strip of columns of a lattice. It reads each row once and adds
it to all rows of the result that it reaches; these stay in registers until they are complete. The gradient of the taps
is found in the same way, with the taps' sums and some rows of the other map in registers.

Arithmetic is in float32, and no sum depends on the order in which programs run.
"""
