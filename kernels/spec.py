"""What kernels, C++ and reference have in common: sizes, the columns of tables and coefficients, random numbers."""

from __future__ import annotations

# Elements of a Triton program: four a thread, 16-byte accesses of fp32 and 8-byte ones of 16-bit types.
BLOCK = 1024
# Elements of one partial sum. It belongs to one segment, so sums depend neither on a device nor on other segments.
CHUNK = 16 * BLOCK
# In a lane every segment begins on a multiple of so many elements: vector loads, and a mask's words of 32 bits.
ALIGN = 32

# Elements that share a scale where moments have 8 bits.
GROUP = 32
# Where the largest of them is smaller, all are zero.
SMALLEST = 2.0**-90
# What codes count: 127ths of the square root of first moments, 255ths of the fourth root of second ones.
SIGNED_LEVELS, UNSIGNED_LEVELS = 127**2, 255**4

# Columns of a segment table, int64 [segments, len(TABLE)]; see `segments.Segments`.
#   offset, length: of the segment in the lanes; a length of 0 means that it takes no part in this launch
#   block, chunk: the number of its first block and of its first chunk among those of all segments
#   weight, grad, clean, other: where its tensors are: addresses for C++, elements from an anchor for Triton
#   aligned: whether these four, if there, lie on multiples of 16 bytes
TABLE = ("offset", "length", "block", "chunk", "weight", "grad", "clean", "other", "aligned")

# Columns of the coefficients of `perturb`, one row a segment, in the compute type.
#   scale: what the gradient is multiplied with
#   chance: the probability with which a coordinate moves, minus 1/2, a multiple of 2**-15; read if drawn at random
PERTURB = ("scale", "chance")

# What a perturbation goes along: the gradient, or what is made of it and a lane with an average; see `directions`.
#   less_average: the gradient less a multiple of its average
#   over_root: the gradient over the root of the average of its squares
ALONG = ("gradient", "less_average", "over_root")
# Columns of the coefficients of such a direction, one row a segment, in the compute type.
#   rate: how fast the average follows
#   factor: what the average is multiplied with, or what is added to the root
DIRECTION = ("rate", "factor")

# Columns of the coefficients of `descend`: those of every rule, then the rule's own.
#   factor: of the gradient: unscaling, clipping, sign; NaN skips the update
#   other: of the second gradient
#   rate: of the average of the weights; NaN leaves it as it is
#   decay: of the difference to the anchor, or to zero
_OF_ALL = ("factor", "other", "rate", "decay")
DESCEND = {
    "adamw": (*_OF_ALL, "new1", "beta2", "new2", "step_size", "inv_sqrt_bias2", "eps"),
    "sgd": (*_OF_ALL, "momentum", "new", "of_grad", "of_buffer", "lr"),
    "lion": (*_OF_ALL, "beta1", "new1", "new2", "lr"),
}
# Columns of the numbers that these coefficients are made of, fp64, one row a group. Of `perturb`:
#   rho: how long eps is to be; negative to go downhill
#   chance: the coefficient
CLIMB = ("rho", "chance")
# Of `descend`, those of every rule, then the rule's own:
#   lr, rate: learning rate, and rate of decay
#   sign: -1 to maximize, else 1
#   alpha: how much the second gradients count
#   max_norm: what the norm of the gradients is clipped to, inf to leave them as they are
#   average: how fast the average follows the weights
#   balance: how fast the segment of a pair that has the larger norm grows, and the other one decays; may be negative
_OF_GROUP = ("lr", "rate", "sign", "alpha", "max_norm", "average", "balance")
NUMBERS = {
    "adamw": (*_OF_GROUP, "beta1", "beta2", "eps"),
    "sgd": (*_OF_GROUP, "momentum", "new", "of_grad", "of_buffer"),
    "lion": (*_OF_GROUP, "beta1", "beta2"),
}
# What the second gradients of an update are for: there are none; GSAM's direction is made of both; the part of the
# gradients that is orthogonal to them is kept; and they are such a part, which is added (LookSAM).
COMBINED = ("alone", "decomposed", "kept", "reused")
# Columns of what is known of each segment, int64, one row a segment.
#   group: its row of numbers
#   salt: makes its random numbers, in [0, 2**32)
#   start: how many elements of its parameter come before it, in other shards
MEMBER = ("group", "salt", "start")

# The lanes of a rule's state; the last one may be missing (amsgrad off, no momentum).
STATE = {
    "adamw": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "sgd": ("momentum_buffer",),
    "lion": ("exp_avg",),
}

# The lanes that can be kept in codes of 8 bits, and whether these have a sign; each has a lane of scales beside it.
CODED = {"exp_avg": True, "exp_avg_sq": False, "max_exp_avg_sq": False, "momentum_buffer": True}

# The counter-based generator: bits(i) = mix(i * WEYL + key), mix(x) = (x ^ x >> 15) * MIX, all mod 2**32.
# WEYL is 2**32 over the golden ratio, so that neighbours start far apart; MIX is of the lowbias32 family.
WEYL = 0x9E3779B1
MIX = 0x2C1B3C6D
# A key is a hash of a count of updates times STEP, a parameter's number times SALT, and what the pass is for; each of
# MIXES is the factor of a round.
STEP = 0x85EBCA6B
SALT = 0xC2B2AE35
MIXES = (0x7FEB352D, 0x846CA68B)
# Nearly Gaussian numbers are cubic polynomials, NOISE_LINEAR t + NOISE_CUBIC t**3, of t, the sum of the four bytes of
# 32 random bits minus NOISE_CENTRE; `reference.normals` says how near. The bits have a second round: with one, numbers
# that are 98,688 apart would have a correlation of 0.2.
NOISE_CENTRE = 510
# fp32 numbers for which, to six digits, the variance is 1 and the fourth moment 3.
NOISE_LINEAR, NOISE_CUBIC = 0.006421040743589401, 5.773954203647236e-09
# From this magnitude on a number is rounded to nearest, where stochastic rounding might overflow.
LARGE = 2.0**100
