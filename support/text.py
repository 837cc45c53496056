"""Printing: text that cannot control the terminal, and tables."""
import statistics


def printable(text: str, keep: str = "") -> str:
    """`text` with control characters escaped, except those in `keep`, so that a file name or a
    sentence cannot control the terminal."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode()
                   for c in text)


def aligned(heads: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A plain-text table: the first `left` columns are left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(heads, *rows)]
    lines = []
    for row in (heads, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row[:left], widths)]
        cells += [cell.rjust(width) for cell, width in zip(row[left:], widths[left:])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """The same as a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows))


def mean_and_deviation(values: list[float], digits: int = 1, sign: str = "±") -> str:
    """Mean and sample standard deviation, as "65.0 ± 7.1"; of a single value, the value."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} {sign} {statistics.stdev(values):.{digits}f}"


def split_name(split: str, metrics: dict) -> str:
    """The name of a split in a table, which marks results on what was trained on."""
    return f"{split} (trained on)" if metrics.get("trained on") else split


def over_runs(runs: list[dict[str, dict]]) -> str:
    """Mean and standard deviation of several runs' results as text, a line for each split."""
    splits = [split for split in runs[0] if all(split in run for run in runs)]
    names = [name for name, value in runs[0][splits[0]].items() if isinstance(value, float)]
    rows = []
    for split in splits:
        cells = [mean_and_deviation([run[split][name] for run in runs], sign="+-")
                 for name in names]
        rows.append([split_name(split, runs[0][split]), *cells])
    return aligned(["", *(name.replace("IoU=", "") for name in names)], rows)
