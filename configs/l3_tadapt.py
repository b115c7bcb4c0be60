"""L3: L2 with the teachers' adapters trained in the A-Step.

    python launch/main.py --config=configs/l3_tadapt.py:digits   # handwritten digits, about a minute on two cores
    python launch/main.py --config=configs/l3_tadapt.py:own --config.dataset.path=FOLDER   # your own images
    python launch/main.py --config=configs/l3_tadapt.py:small    # CIFAR-100 on a CPU, weights needed: README.md
    python launch/main.py --config=configs/l3_tadapt.py          # CIFAR-100 at full scale

Differs from `l2_cccp` in train_distill_adapter_only.
"""

from configs import l2_cccp


def get_config(profile: str = ""):
    """`configs/l2_cccp.py` with the changes below."""
    config = l2_cccp.get_config(profile)
    config.train_distill_adapter_only = True
    return config
