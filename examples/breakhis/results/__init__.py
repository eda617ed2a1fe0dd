"""Scores, tables and figures of finished runs.

`metrics` computes scores; `report`, `figures` and `explain` show one run; `study`, `intervals` and `paper` compare
many runs. `runs` and `explained_runs` read the files of runs, `outputs` says where results may be written.
"""
