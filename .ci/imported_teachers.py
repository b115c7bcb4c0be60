"""Correct predictions of two imported teachers on the first 2,000 CIFAR-100 test images, against exact counts.

    python .ci/imported_teachers.py cifar100.npz WEIGHTS_FOLDER

The counts were found with PyTorch once, from the same files; on all 10,000 images the teachers score 72.63 and 71.63 %.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax

from asib_jax import models
from asib_jax.data import sources
from asib_jax.engine.evaluate import Evaluator
from asib_jax.engine.feed import Feed
from asib_jax.models.ensemble import Networks, Variables, init_network
from asib_jax.weights.reading import read_weights

EXPECTED = {"resnet56": 1473, "resnet44": 1472}
MEAN, STD = (0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)


def main(data: str, weights: str) -> None:
    test = sources.load("cifar100", path=data).test.take(slice(2000))
    nets, params, stats = [], {}, {}
    for k, name in enumerate(EXPECTED, 1):
        model = models.create_teacher_by_name(name, 100, small_input=True, mean=MEAN, std=STD)
        variables, _ = read_weights(
            f"{weights}/cifar100_{name}.safetensors",
            "weights",
            model,
            init_network(model, 0, name, test.image.shape[1:]),
            sha256="",
        )
        nets.append(model)
        params[f"teacher{k}"], stats[f"teacher{k}"] = variables["params"], variables["batch_stats"]
    evaluator = Evaluator(Networks(nets[0], tuple(nets)), test, Feed(tuple(jax.devices()[:1]), room_gb=1.0), "test")
    evaluator.read_teachers(Variables(params, stats))
    counts = evaluator.teacher_counts
    for k, (name, expected) in enumerate(EXPECTED.items(), 1):
        print(f"{name}: {counts[f'teacher{k}']} of 2000 correct, expected {expected}")
    if [counts["teacher1"], counts["teacher2"]] != list(EXPECTED.values()):
        sys.exit("the imported teachers do not predict what they should")


if __name__ == "__main__":
    main(*sys.argv[1:])
