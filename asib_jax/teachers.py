"""Ready teachers: imported from a file, or trained here on the training split without validation."""
import functools
import logging
import time

import jax

from asib_jax import build, parallel, pretrained, state, steps, streams
from asib_jax.data.batches import training_batches
from asib_jax.loop import run_epoch
from asib_jax.models.ensemble import Networks, Variables
from asib_jax.models.kd_model import KDModel
from asib_jax.recipe import Recipe, TeacherRecipe
from asib_jax.reporting import Reporter
from asib_jax.run import learning_rate
from asib_jax.steps import BTerms

logger = logging.getLogger("asib_jax")


def ready(recipe: Recipe, nets: Networks, data: build.Data, devices: list[jax.Device], reporter: Reporter) -> Variables:
    """Variables of every teacher, by name. Adapters start at random, keyed by the run's seed.

    Where a teacher comes from: `weights`, a file, or `train_epochs` of supervised training here.
    """
    roster = list(zip(nets.teacher_names, nets.teachers, recipe.teachers))
    ready = {}
    for name, model, options in roster:
        ready[name] = build.init_network(model, recipe.seed, name, data.image_shape)
        if options.weights:
            ready[name] = pretrained.import_weights(pretrained.load_weights(options.weights), ready[name])
            logger.info("%s: %s from %s", name, options.name, options.weights)
    for name, model, options in roster:  # after every file has been read: their errors come early
        if not options.weights:
            ready[name] = train(recipe, options, model, name, ready[name], data, devices, reporter)
    return Variables({name: variables["params"] for name, variables in ready.items()},
                     {name: variables["batch_stats"] for name, variables in ready.items()})


def train(recipe: Recipe, options: TeacherRecipe, model: KDModel, name: str, variables: dict, data: build.Data,
          devices: list[jax.Device], reporter: Reporter) -> dict:
    """Supervised training of one network with AdamW under the run's schedule; the last epoch counts."""
    axis = parallel.axis_name(devices)
    split, batch_size = data.teacher_train, recipe.dataset.batch_size
    tx = state.make_optimizer("adamw", weight_decay=options.train_weight_decay, grad_clip_norm=recipe.grad_clip_norm)
    loss = functools.partial(steps.b_loss, nets=Networks(model), terms=BTerms(recipe.dataset.data_aug), axis_name=axis)
    step = steps.make_train_step(loss, tx, axis_name=axis)
    step = parallel.compile_step(step, devices, arguments=4, donate_first=True)
    whole = Variables({"student": variables["params"]}, {"student": variables["batch_stats"]})
    adapters = {child: child != "distill_adapter" for child in variables["params"]}  # no label reaches the adapter
    current, frozen = state.begin(whole, {"student": adapters}, ("student",), tx)
    current, frozen = parallel.replicate((current, frozen), devices)
    epochs, steps_per_epoch = options.train_epochs, len(split.label) // batch_size
    rate = learning_rate(recipe, base=options.train_lr, steps_per_epoch=steps_per_epoch, epochs=epochs)
    start, done = time.perf_counter(), 0
    for epoch in range(epochs):
        key = streams.key(recipe.seed, f"augment/{name}", epoch)
        order = streams.rng(recipe.seed, f"order/{name}", epoch)
        controls = {"augment_key": key, "mix_key": key}
        with reporter.epoch_bar(steps_per_epoch * batch_size, f"{name} {epoch + 1}/{epochs}") as bar:
            current, metrics, count = run_epoch(
                step, current, frozen, training_batches(split, batch_size, order), controls=controls,
                learning_rate=rate, first_step=done, devices=devices, on_images=bar.update)
        done += count
        logger.info("%s epoch %d/%d: loss %.4f, training accuracy %.2f %%", name, epoch + 1, epochs,
                    metrics["loss"], 100 * metrics["acc"])
    logger.info("%s: %s trained on %d images in %.0f s", name, options.name, len(split.label),
                time.perf_counter() - start)
    return state.join(current, frozen).of("student")
