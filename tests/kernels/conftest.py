"""Ends a run with what the compiled kernels need of a multiprocessor."""

import triton


def pytest_terminal_summary(terminalreporter):
    reports = terminalreporter.getreports("passed")
    rows = [row for report in reports for name, row in report.user_properties if name == "resources"]
    if not rows:
        return
    terminalreporter.section(f"kernels, compiled by Triton {triton.__version__}")
    line = "{:<28}{:<22}{:<14}{:<10}{:<8}{:>10}{:>8}{:>8}".format
    terminalreporter.line(line("kernel", "shape", "layout", "dtype", "target", "registers", "spills", "shared"))
    for shape, layout, row in rows:
        terminalreporter.line(
            line(row.kernel, str(shape), layout, row.dtype, row.target, row.registers, row.spills, row.shared)
        )
