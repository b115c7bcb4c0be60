"""L2: L1 plus the CCCP term.

    python launch/main.py --config=configs/l2_cccp.py:digits   # handwritten digits, about a minute on two cores
    python launch/main.py --config=configs/l2_cccp.py:own --config.dataset.path=FOLDER   # your own images
    python launch/main.py --config=configs/l2_cccp.py:small    # CIFAR-100 on a CPU, weights needed: README.md
    python launch/main.py --config=configs/l2_cccp.py          # CIFAR-100 at full scale

Differs from `l1_ib` in use_cccp; cccp_alpha is the default written out.
"""

from configs import l1_ib


def get_config(profile: str = ""):
    """`configs/l1_ib.py` with the changes below."""
    config = l1_ib.get_config(profile)
    config.use_cccp = True
    config.cccp_alpha = 0.25
    return config
