"""The images.

`search` finds files, `images` opens any image file, `records` describes an image, `naming` and `idc` read two data
sets, `download` fetches BreakHis, `tissue`, `field` and `synthetic` draw a data set where there is none, `splits`
divides the images, `hashes` knows them again, `metered` limits what is read of a file.
"""
