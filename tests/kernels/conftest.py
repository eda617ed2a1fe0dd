"""Ends a run with what the compiled kernels need of a multiprocessor."""

from collections import defaultdict
from importlib.metadata import version


def pytest_terminal_summary(terminalreporter):
    reports = terminalreporter.getreports("passed")
    rows = [row for report in reports for name, row in report.user_properties if name == "resources"]
    if not rows:
        return
    terminalreporter.section(f"registers per thread, as compiled by Triton {version('triton')} over all shapes tested")
    registers, worst = defaultdict(lambda: defaultdict(set)), defaultdict(lambda: (0, 0))
    for row in rows:
        registers[row.kernel][row.target].add(row.registers)
        worst[row.kernel] = tuple(map(max, worst[row.kernel], (row.spills, row.shared)))
    targets = sorted({row.target for row in rows}, key=lambda target: int(target.removeprefix("sm_")))
    line = ("{:<30}" + "{:>12}" * len(targets) + "{:>10}{:>16}").format
    terminalreporter.line(line("kernel", *targets, "spills", "shared, bytes"))
    for kernel, found in registers.items():
        ranges = [f"{min(found[target])} - {max(found[target])}" for target in targets]
        terminalreporter.line(line(kernel, *ranges, *worst[kernel]))
