"""Printing: text that cannot control the terminal, and tables."""
import statistics


def printable(text: str, keep: str = "") -> str:
    """`text` with control characters escaped, except those in `keep`, so that a file name or a
    sentence cannot control the terminal."""
    for c in set(text):
        if not c.isprintable() and c not in keep:
            text = text.replace(c, c.encode("unicode_escape").decode())     # ESC becomes \x1b
    return text


def aligned(heads: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A plain-text table: the first `left` columns are left-aligned, the others right-aligned."""
    # column by column, since a column's width depends on all rows
    table = [heads] + rows
    lines = [""] * len(table)
    for k in range(len(heads)):
        width = max(len(row[k]) for row in table)
        for i, row in enumerate(table):
            if k < left:
                lines[i] += row[k].ljust(width) + "  "
            else:
                lines[i] += row[k].rjust(width) + "  "          # decimal points below each other
    return "\n".join(line.rstrip() for line in lines)


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """The same as a Markdown table."""
    table = [heads, ["---"] * len(heads)] + rows
    return "\n".join("| " + " | ".join(row) + " |" for row in table)


def mean_and_deviation(values: list[float], sign: str = "±") -> str:
    """Mean and sample standard deviation, as "65.0 ± 7.1"; of a single value, the value."""
    text = f"{statistics.fmean(values):.1f}"
    if len(values) > 1:                         # one value has no standard deviation
        text += f" {sign} {statistics.stdev(values):.1f}"
    return text


def split_name(split: str, metrics: dict) -> str:
    """The name of a split in a table, which marks results on what was trained on."""
    if metrics.get("trained on"):
        return f"{split} (trained on)"
    return split


def over_runs(runs: list[dict[str, dict]]) -> str:
    """Mean and standard deviation of several runs' results as text, a line for each split."""
    first = runs[0]
    # runs on different datasets may share some splits only
    splits = [split for split in first if all(split in run for run in runs)]
    if not splits:
        return "no split was evaluated in all of these runs"
    # the metrics are the floats; the other values are counts, marks and details
    names = [name for name, value in first[splits[0]].items() if isinstance(value, float)
             and all(name in run[splits[0]] for run in runs)]
    rows = []
    for split in splits:
        row = [split_name(split, first[split])]
        for name in names:
            values = [run[split][name] for run in runs]
            row.append(mean_and_deviation(values, sign="+-"))   # ASCII, for every terminal
        rows.append(row)
    return aligned([""] + [name.replace("IoU=", "") for name in names], rows)
