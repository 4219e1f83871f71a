"""Hard operations. `reference` is the truth; the other files are fast paths, each compared with it in the tests.

Which path runs is decided inside the function of that name, by shape, dtype and device, and nowhere else. The kernels
that read a paged cache on a GPU (`gpu`) are the exception: `gpu.kernels` decides, once for an engine.
"""
