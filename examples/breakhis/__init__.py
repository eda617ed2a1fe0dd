"""Parts of the BreakHis example, one idea each.

Data: `records` says what is known of an image, `naming` and `idc` read two data sets, `images` opens any file,
`download` fetches the archive, `tissue` and `synthetic` draw images where there are none, `splits` keeps patients
apart. Training: `options` reads the flags, `checkpoints` builds, saves and loads models, `recipe` and `stain` say how
they are trained, `engine` trains an epoch and predicts, `training` goes through all epochs, `state` keeps what a killed
run needs. Results: `metrics` scores, `report`, `figures` and `explain` show one run, `study`, `intervals` and `paper`
compare many.
"""
