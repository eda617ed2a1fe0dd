"""Parts of the BreakHis example, in four rooms.

- `data`: the images, and their division into training, validation and test.
- `results`: scores, tables and figures of finished runs.
- `training`: flags, models and the training itself.
- `baselines`: other authors' systems as timm models.

`files` writes files safely, `mappings` reads JSON and YAML, and `names` makes names safe to show; every room uses them.
`commands` is the one door of all scripts: it turns errors and signals into one line and an exit code. `runner` does the
runs of `train_breakhis.py`, and imports every room; `chosen` finds and divides their images. `data` and `baselines`
import no other room, `results` imports `data`, and `training` imports `data`, `baselines` and one module of `results`,
the `metrics` by which it chooses the checkpoint. The scripts one folder up import everything.
"""
