"""A student distilled from two teachers, from Python: python docs/distil.py, where asib_jax is installed

The arrays are scikit-learn's handwritten digits; any others of these shapes do as well.
"""

import numpy as np
from sklearn.datasets import load_digits

import asib_jax

digits = load_digits()
images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # uint8 [N,H,W,channels]
run = asib_jax.distil(
    "l2_cccp:digits",  # a shipped configuration, whose keys count where nothing else is said
    data={
        "x_train": images[:1200],
        "y_train": digits.target[:1200],
        "x_test": images[1200:],
        "y_test": digits.target[1200:],
    },
    student="resnet8",
    teachers=["resnet14", {"name": "resnet8", "train_epochs": 12}],
    tau_schedule=(4.0,) * 2,
)
print(f"test accuracy of the best student: {run.metrics['final/test_acc_best']:.4f}; all of it is in {run.folder}")
