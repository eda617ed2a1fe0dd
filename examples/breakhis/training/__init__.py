"""Flags, models and the training itself.

`options` reads the flags, `checkpoints` builds, saves and loads models, `recipe` and `stain` make the parts of the
training, `engine` trains for one epoch and predicts, `fit` trains for all epochs, `state` saves what a run needs to go
on after it was killed.
"""
