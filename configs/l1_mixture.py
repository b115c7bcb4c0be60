"""L1 with synergy added to the teachers' learnt mixture, from which it starts.

    python launch/main.py --config=configs/l1_mixture.py:digits   # handwritten digits, about a minute on two cores
    python launch/main.py --config=configs/l1_mixture.py:own --config.dataset.path=FOLDER   # your own images
    python launch/main.py --config=configs/l1_mixture.py:small    # CIFAR-100 on a CPU, weights needed: README.md
    python launch/main.py --config=configs/l1_mixture.py          # CIFAR-100 at full scale

Differs from `l1_ib` in synergy_base.
"""

from configs import l1_ib


def get_config(profile: str = ""):
    """`configs/l1_ib.py` with the changes below."""
    config = l1_ib.get_config(profile)
    config.synergy_base = "mixture"
    return config
