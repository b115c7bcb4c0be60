"""Ranges that several keys share: wide enough for any experiment, closed where float32 overflows or nothing moves."""

WEIGHT = {"at_least": 0, "at_most": 1e6}  # of a term of a loss
TEMPERATURE = {"at_least": 0.01, "at_most": 1000}
RATE = {"at_least": 1e-12, "at_most": 100}
DECAY = {"at_least": 0, "at_most": 100}
MIXING = {"at_least": 0, "at_most": 1000}  # the alpha of Beta(alpha, alpha)
MEAN = {"at_least": 0, "at_most": 1}  # of pixels in [0, 1]
STD = {"at_least": 0.001, "at_most": 10}  # down to one step of 8 bits, and less
