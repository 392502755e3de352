"""The kernels in machine code, by Numba.

kernels       the set: the functions of `reference`, with the same bits
channels      what follows from the sums, a channel at a time
forward       exact moments            backward     exact sums of gradients
elementwise   y and dx                 probes       how far the data reach
simd          vectors of eight, which no compiler's mood can take away
"""
