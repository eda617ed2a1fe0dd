"""Flags, models and the training itself.

- Flags: `flags` declares them, with `argument_types`; `options` reads them and lists the runs that they ask for.
- Models: `checkpoints` builds, saves and loads them, by `model_config` and `weights`, which check what a file holds.
- Training: `recipe` and `stain` make its parts, `engine` trains for one epoch and predicts, `fit` trains for all.
- Safety: `state` saves what a run needs to go on after it was killed, `resume` checks that it may, `lock` keeps a
  second run out of its folder, `finite` refuses numbers that are not finite.
"""
