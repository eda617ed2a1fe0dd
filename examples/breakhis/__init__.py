"""Parts of the BreakHis example, one idea each.

`data` reads the images, `tissue` and `synthetic` draw some where there are none, `splits` keeps patients apart,
`checkpoints` builds, saves and loads models, `engine` trains and predicts, `metrics` scores,
`figures` and `report` write.
"""
