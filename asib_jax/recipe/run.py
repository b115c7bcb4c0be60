"""The keys of a run itself: seed and folder, lengths, devices, what it writes, how it goes on; who knows what."""

import dataclasses

from asib_jax.recipe.conditions import STUDENT, TEACHERS
from asib_jax.recipe.groups import SpecialistsRecipe
from asib_jax.recipe.keys import When, key


@dataclasses.dataclass(frozen=True)
class RunRecipe:
    # fmt: off
    seed: int = key(0, "the one source of all randomness", at_least=0)
    results_dir: str = key("results", "one folder a run, plus `summary.csv`, `teachers` and `latest`", free=True)
    exp_id: str = key("", "the run's folder there; empty: config, profile, seed, what was set and time; one that "
                      "exists is an error",
                      free=True)
    student_epochs_per_stage: tuple[int, ...] = key((20, 20), "B-epochs of each stage", at_least=1, when=STUDENT)
    num_stages: int = key(0, "0, or as many as `student_epochs_per_stage` has entries", at_least=0, when=STUDENT)
    teacher_adapt_epochs: int = key(
        12, "A-epochs of each stage; 0: no A-Step and no fusion network", at_least=0, when=STUDENT & When(
            "fusion", lambda recipe: recipe.uses_fusion or not recipe.teacher_adapt_epochs))
    restore_best: bool = key(True, "each stage ends at the student that was best on validation so far", when=STUDENT)
    train_control: bool = key(False, "also train the same student without teachers for as many B-epochs: what "
                              "distillation is worth", when=STUDENT & TEACHERS)
    num_devices: int = key(0, "of each host; 0: all; changes speed, not results", at_least=0, free=True)
    steps_per_call: int = key(0, "training steps of one compiled call, at most; 0: 32, or 1 where a CPU trains "
                              "convolutions", at_least=0, free=True)
    device_data_gb: float = key(8.0, "GiB on each device for training images and stored outputs; images that do not "
                                "fit wait on the host, outputs that do not fit are computed at every step", at_least=0,
                                free=True)
    use_amp: bool = key(True, "networks compute in `amp_dtype`; parameters, statistics and losses stay float32")
    amp_dtype: str = key("bfloat16", "type that networks compute in; float16 scales its loss dynamically",
                         choices=("bfloat16", "float16", "float32"),
                         when=When("`use_amp`", lambda recipe: recipe.use_amp))
    tensorboard: bool = key(True, "curves in the run's folder", free=True)
    pictures: bool = key(True, "a finished run's curves, confusions and mistakes as pictures in its folder", free=True)
    wandb: str = key("", "a Weights & Biases project; empty: off", free=True)
    compilation_cache: str = key("~/.cache/asib_jax/xla", "a folder that keeps compiled programs between runs; empty: "
                                 "off; where the environment has `JAX_COMPILATION_CACHE_DIR`, that counts", free=True)
    resume: str = key("", "`latest` or a run's folder: go on with that run instead of beginning one (reliability.md)",
                      free=True)
    checkpoint_minutes: float = key(10.0, "between the snapshots that a run goes on from; 0: none by time", at_least=0,
                                    free=True)
    checkpoint_steps: int = key(0, "the same in training steps of a phase; 0: none by steps", at_least=0, free=True)
    max_nonfinite_steps: int = key(20, "so many steps in a row without finite gradients, which change nothing, end the "
                                   "run", at_least=1, free=True)
    deterministic: bool = key(False, "the same bits from every run on this machine; on CPUs they are so anyway",
                              free=True)
    platform: str = key("", "refuse to run on anything else; empty: run on what there is",
                        choices=("", "gpu", "cpu"), free=True)
    profile_steps: tuple[int, ...] = key((), "(first, last): a jax profiler trace of the calls that do those B-steps",
                                         at_least=0, lengths=(0, 2), when=STUDENT, free=True)
    specialists: SpecialistsRecipe = key(SpecialistsRecipe(), "teachers that know some classes each", when=TEACHERS)
    # fmt: on
