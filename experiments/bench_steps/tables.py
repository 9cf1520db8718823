"""Shows the numbers of `bench_steps` on a terminal: a line for each new number, tables at the
end."""

from collections.abc import Callable, Sequence
from typing import Any

from experiments.bench_steps.ceilings import Ceilings
from experiments.common.tables import number, percent, table

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]


def _scaled(key: str, scale: float, digits: int) -> Callable[[Row], str]:
    """Make a function for a cell: the number under `key` times `scale`, or a dash without one."""

    def cell(row: Row) -> str:
        value = row.get(key)
        return number(None if value is None else value * scale, digits)

    return cell


def _share(row: Row) -> str:
    """Format the share of the ceiling: the inverse of the ratio to the floor."""
    return percent(row["ratio"] and 1 / row["ratio"])


_STEP: tuple[Column, ...] = (
    ("host, ms", _scaled("dispatch_ms", 1, 2)),
    ("compile, s", _scaled("compile_s", 1, 1)),
    ("temporary, MB", _scaled("temporary_bytes", 1e-6, 0)),
)
COLUMNS: dict[str, tuple[Column, ...]] = {
    "kernels": (
        ("kernel alone", lambda row: f"{row['kernel']} {row['case']}"),
        ("us", _scaled("us", 1, 1)),
        ("TB/s", lambda row: number(row["rate"] / 1e12 if row["unit"] == "B" else None, 2)),
        ("TFLOP/s", lambda row: number(row["rate"] / 1e12 if row["unit"] == "FLOP" else None, 0)),
        ("of copy or product", _share),
    ),
    "decode": (
        ("decode", lambda row: row["case"]),
        ("ms a tick", _scaled("ms", 1, 2)),
        ("floor", _scaled("floor_ms", 1, 2)),
        ("ratio", _scaled("ratio", 1, 2)),
        ("vLLM", _scaled("vllm_ms", 1, 2)),
        *_STEP,
    ),
    "prefill": (
        ("prefill", lambda row: row["case"]),
        ("ms a step", _scaled("ms", 1, 1)),
        ("floor", _scaled("floor_ms", 1, 1)),
        ("ratio", _scaled("ratio", 1, 2)),
        ("tokens/s", _scaled("tokens_per_s", 1, 0)),
        ("vLLM", _scaled("vllm_tokens_per_s", 1, 0)),
        ("TFLOP/s", _scaled("flops_per_s", 1e-12, 0)),
        ("of sustained", _share),
        *_STEP,
    ),
    "mixed": (
        ("mixed", lambda row: row["case"]),
        ("ms a step", _scaled("ms", 1, 2)),
        ("floor", _scaled("floor_ms", 1, 2)),
        ("ratio", _scaled("ratio", 1, 2)),
        ("products", _scaled("products_ms", 1, 2)),
        ("KV", _scaled("kv_ms", 1, 2)),
        ("of both", _scaled("of_parts", 1, 2)),
        ("in two steps", _scaled("two_ms", 1, 2)),
        ("of those", _scaled("of_two", 1, 2)),
        *_STEP,
    ),
}
"""For each section, its columns: a name, and a function for the cells."""


def line(section: str, row: Row) -> str:
    """Format one row as a line."""
    (_, first), *others = COLUMNS[section]
    cells = [f"{name} {cell(row)}" for name, cell in others]
    return f"{section} {first(row)}: " + "; ".join(text for text in cells if text[-2:] != " -")


def show(whole: dict[str, Any]) -> str:
    """Make a table for each section that has rows."""
    parts: list[str] = []
    for section, columns in COLUMNS.items():
        if rows := whole[section]:
            cells: list[Sequence[str]] = [[cell(row) for _, cell in columns] for row in rows]
            parts.append(table([name for name, _ in columns], cells))
    return "\n\n".join(parts)


def show_ceilings(found: Ceilings) -> str:
    """Format the ceilings as a line."""
    return (
        f"ceilings: copy {found.copy / 1e12:.2f} TB/s, read {found.read / 1e12:.2f} TB/s, "
        f"product {found.matmul / 1e12:.0f} TFLOP/s, sustained "
        f"{found.matmul_sustained / 1e12:.0f}, dispatch {found.dispatch_us:.0f} us"
    )
