"""L1: the fusion network with the variational information bottleneck.

    python launch/main.py --config=configs/l1_ib.py:digits   # handwritten digits, about a minute on two cores
    python launch/main.py --config=configs/l1_ib.py:own --config.dataset.path=FOLDER   # your own images
    python launch/main.py --config=configs/l1_ib.py:small    # CIFAR-100 on a CPU, weights needed: README.md
    python launch/main.py --config=configs/l1_ib.py          # CIFAR-100 at full scale

Differs from `side_fusion` in use_ib.
"""

from configs import side_fusion


def get_config(profile: str = ""):
    """`configs/side_fusion.py` with the changes below."""
    config = side_fusion.get_config(profile)
    config.use_ib = True
    return config
