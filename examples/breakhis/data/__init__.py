"""The images.

`records` describes an image, `naming` and `idc` read two data sets, `images` opens any image file, `download` fetches
BreakHis, `tissue` and `synthetic` draw a data set where there is none, `splits` divides the images, `hashes` knows
files again by their content.
"""
