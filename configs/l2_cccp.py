"""L2: L1 plus the CCCP term.

    python launch/main.py --config=configs/l2_cccp.py          # CIFAR-100 at full scale
    python launch/main.py --config=configs/l2_cccp.py:digits   # on a laptop

Differs from `l1_ib` in use_cccp (and cccp_alpha, which is .25 already).
"""
from configs import l1_ib


def get_config(profile: str = ""):
    """`configs/l1_ib.py` with the changes below."""
    config = l1_ib.get_config(profile)
    config.use_cccp = True
    config.cccp_alpha = 0.25
    return config
