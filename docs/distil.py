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
wrong = run.predict(images[1200:]).argmax(axis=1) != digits.target[1200:]
print(f"the best student is wrong on {wrong.sum()} of {len(wrong)} test images")
print(f"its accuracy there: {run.metrics['final/test_acc_best']:.4f}; all of the run is in {run.folder}")
