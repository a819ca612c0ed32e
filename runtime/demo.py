"""`outgrow demo`: a byte-level GPT learns the source of Python's standard library on sharded workers.

Owns what is trained and what is told at the end. The model and text are `demo_model.py`'s.
"""

import os
import subprocess
import sys
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch.optim.lr_scheduler import LambdaLR

from ..memory.budget import Memory, format_bytes
from ..memory.process import read_process_memory
from .api import Runtime
from .demo_model import ByteGPT, StdlibText, byte_loss, generate, warm_then_cool
from .result import Result

__all__ = ["run_demo"]

_CONTEXT = 128  # bytes
_BATCH_SIZE = 16
_BUDGET = "2GiB"
_PROMPT = "    def __init__(self"
_PLAIN_STEPS = 3


def run_demo(steps: int, workers: int, storage_path: str | None = None) -> Result:
    """Train, then print losses, speed, memory against a plain process, and text from the trained model."""
    console = Console()
    console.print(
        f"A byte-level GPT learns the source of Python's standard library on {workers or 'no'} Ray "
        f"worker{'' if workers == 1 else 's'}: {steps} steps, batches of {_BATCH_SIZE} x {_CONTEXT} bytes"
        + (", parameters, gradients and optimizer states sharded (zero=3)." if workers > 1 else ".")
    )
    runtime = Runtime(workers=workers, memory=Memory(host=_BUDGET), storage_path=storage_path)
    result = runtime.train(
        partial(ByteGPT, context=_CONTEXT),
        partial(StdlibText, _CONTEXT),
        loss=byte_loss,
        optimizer=partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.95)),
        lr_scheduler=partial(LambdaLR, lr_lambda=partial(warm_then_cool, num_steps=steps)),
        batch_size=_BATCH_SIZE,
        shuffle=True,
        steps=steps,
        clip_grad_norm=1.0,
        zero=3 if workers > 1 else None,
    )
    model = ByteGPT(context=_CONTEXT)
    model.load_state_dict(result.state_dict())
    console.print(_table(result, model, _measure_plain()))
    text = generate(model, _PROMPT, 240)
    console.print(Panel(Text(text), title="the trained model goes on writing Python", title_align="left"))
    console.print(f"run folder: {result.path}", soft_wrap=True, markup=False, highlight=False)
    return result


def _table(result: Result, model: ByteGPT, plain: tuple[int, int]) -> Table:
    summary, rows = result.summary, result.metrics
    num_last = max(1, len(rows) // 20)
    last_loss = sum(row["loss"] for row in rows[-num_last:]) / num_last
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    table = Table(title="outgrow demo", title_justify="left", show_header=False)
    table.add_row("model", f"{num_parameters / 1e6:.2f} million parameters, {len(model.blocks)} blocks")
    table.add_row("loss at the start", f"{rows[0]['loss']:.3f} nats per byte")
    table.add_row(
        "loss at the end", f"[bold green]{last_loss:.3f}[/] nats per byte (mean of the last {num_last} steps)"
    )
    table.add_row("speed", f"{summary['tokens_per_s']:,.0f} tokens/s (median)")
    table.add_section()
    for rank, slots in summary["state_bytes"].items():
        detail = ", ".join(f"{slot} {format_bytes(held)}" for slot, held in slots.items() if held)
        table.add_row(f"model state, worker {rank}", f"[bold]{format_bytes(sum(slots.values()))}[/] at most ({detail})")
    plain_state_bytes = 16 * num_parameters  # float32: weights, gradients and AdamW's two averages
    table.add_row("model state, one plain process", f"[bold]{format_bytes(plain_state_bytes)}[/]")
    table.add_section()
    for rank, tiers in summary["peak_bytes"].items():
        base_bytes = summary["base_bytes"][rank]
        text = f"{format_bytes(tiers['host'])} of the {_BUDGET} budget; {_beyond(tiers['host'], base_bytes)}"
        table.add_row(f"whole process, worker {rank}", text)
    plain_base_bytes, plain_bytes = plain
    table.add_row(
        "whole process, plain PyTorch", f"{format_bytes(plain_bytes)}; {_beyond(plain_bytes, plain_base_bytes)}"
    )
    return table


def _beyond(peak_bytes: int, base_bytes: int) -> str:
    return f"[bold]{format_bytes(peak_bytes - base_bytes)}[/] more than before data and model"


def _measure_plain() -> tuple[int, int]:
    """Resident bytes of a process that trains the same model on the same batches with plain PyTorch: before data and
    model, and at its peak."""
    environment: dict[str, Any] = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"from {__name__} import train_plainly; train_plainly()"]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    base_bytes, peak_bytes = answer.stdout.split()[-2:]
    return int(base_bytes), int(peak_bytes)


def train_plainly() -> None:
    """A few steps of plain PyTorch; writes the process's resident bytes before and at the peak to stdout."""
    base_bytes = read_process_memory().resident_bytes
    data, model = StdlibText(_CONTEXT), ByteGPT(context=_CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for step in range(_PLAIN_STEPS):
        samples = [data[step * _BATCH_SIZE + row] for row in range(_BATCH_SIZE)]
        optimizer.zero_grad()
        byte_loss(model(torch.stack([x for x, _ in samples])), torch.stack([y for _, y in samples])).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    sys.stdout.write(f"{base_bytes} {read_process_memory().peak_bytes}\n")
