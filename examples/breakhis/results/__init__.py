"""Scores, tables and figures of finished runs.

`metrics` computes scores; `runs` reads the files of a run; `report`, `figures` and `explain` show one run; `study`,
`intervals` and `paper` compare many runs.
"""
