"""Steps of a large model on one GPU whose memory is capped: what the planner predicts, and whether the loss falls.

    python bench/gpu_memory.py --model 7b --rank 256 --cap 17GiB --gradients factored --updates layerwise
    python bench/gpu_memory.py --model 7b --rank 256 --cap 10GiB --gradients factored --updates layerwise \\
        --weights int8 --basis-format int8
    python bench/gpu_memory.py --model 13b --rank 256 --cap 18GiB --gradients factored --updates layerwise \\
        --weights int8 --basis-format int8
    python bench/gpu_memory.py --model 7b --optimizer adamw8bit          # the rival's tokens per second
    python bench/gpu_memory.py --model tiny --device cpu --steps 4       # a rehearsal, without a cap

The model is built and quantized on the host, with random weights, and moved under the cap. Each step takes 256 tokens
of real text (bytes of the Python standard library). Peaks are the CUDA allocator's; on a CPU, of live tensors. The
first three steps are left out of the speed. With ``--out FILE`` the result is added to those in that file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import torch
from report import write_json

from galore_kernels.plan import plan
from galore_kernels.plan.fit import parse_bytes
from galore_kernels.plan.live import LiveBytes
from galore_kernels.pretrain.config import Config
from galore_kernels.pretrain.corpus import load_corpus
from galore_kernels.pretrain.optimizers import build_optimizer
from galore_kernels.pretrain.train import build_model

VOCABULARY = 32000
UNTIMED = 3


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Builds, trains, and returns what was predicted and measured."""
    device = torch.device(given.device)
    own = {key: getattr(given, key) for key in ("rank", "gradients", "updates", "basis_format", "optimizer", "steps")}
    config = Config.resolve(
        {
            **own,
            "preset": given.model,
            "weights": "int8" if given.weights == "int8" else "float",
            "dtype": "float32" if given.weights == "fp32" else "bfloat16",
            "batch": 1,
            "accumulate": 1,
            "sequence": given.tokens,
            "warmup": min(10, given.steps),
        }
    )
    if given.cap is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(parse_bytes(given.cap) / total, device)
    model = build_model(config, VOCABULARY).train()
    optimizer = build_optimizer(model, config)
    model.to(device)
    with tempfile.TemporaryDirectory() as cache:
        corpus = load_corpus(Config.resolve({"sequence": given.tokens}), Path(cache))
    live = LiveBytes() if device.type == "cpu" else contextlib.nullcontext()
    losses, seconds = [], []
    with live:
        if isinstance(live, LiveBytes):
            live.add([*model.parameters(), *model.buffers()], "model")
        for step in range(given.steps):
            for group in optimizer.param_groups:
                group["lr"] = config.lr_at(step)
            rows = corpus.training_rows(step, 1, 0).to(device)
            begin = time.perf_counter()
            loss = model(input_ids=rows, labels=rows).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss))  # waits for the device
            seconds.append(time.perf_counter() - begin)
    measured = live.peak if isinstance(live, LiveBytes) else torch.cuda.max_memory_allocated(device)
    ends = max(1, min(10, given.steps // 4))
    return {
        "config": config.to_dict(),
        "machine": machine.describe(device, torch.get_num_threads(), 0),
        "cap_bytes": None if given.cap is None else parse_bytes(given.cap),
        "measured_peak_bytes": measured,
        "reserved_bytes": None if device.type == "cpu" else torch.cuda.max_memory_reserved(device),
        "predicted_peak_bytes": predicted(given),
        "tokens_per_second": given.tokens / statistics.median(seconds[UNTIMED:] or seconds),
        "loss_first": statistics.mean(losses[:ends]),
        "loss_last": statistics.mean(losses[-ends:]),
        "losses": losses,
    }


def predicted(given: argparse.Namespace) -> int:
    """The planner's peak of the same step."""
    keys = ("rank", "gradients", "updates", "basis_format", "weights", "tokens", "device")
    options = {key: getattr(given, key) for key in keys}
    return plan(given.model, given.optimizer, sequence=given.tokens, **options).peak


def main(arguments: list[str]) -> int:
    """Prints a line, and adds to the JSON."""
    parser = argparse.ArgumentParser(description="Training steps of a large model under a cap of memory.")
    parser.add_argument("--model", default="7b")
    parser.add_argument("--optimizer", default="galore8bit")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--weights", choices=("fp32", "bf16", "int8"), default="bf16")
    parser.add_argument("--gradients", choices=("dense", "factored"), default="dense")
    parser.add_argument("--updates", choices=("whole", "layerwise"), default="whole")
    parser.add_argument("--basis-format", choices=("int8", "int4"))
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--cap", help="memory that the process may take: 10GiB, 24GB")
    parser.add_argument("--out", type=Path, help="JSON file, to whose runs this one is added")
    given = parser.parse_args(arguments)
    if given.cap is not None and given.device == "cpu":
        parser.error("--cap: only a GPU's memory can be capped; leave it out")
    result = run(given)
    gib = 2.0**30
    print(
        f"{given.model} {given.optimizer} rank {given.rank}, {given.weights}, {given.gradients}, {given.updates}: peak "
        f"{result['measured_peak_bytes'] / gib:.2f} GiB (planned {result['predicted_peak_bytes'] / gib:.2f}), "
        f"{result['tokens_per_second']:,.0f} tokens/s, loss {result['loss_first']:.3f} -> {result['loss_last']:.3f}"
    )
    if given.out is not None:
        earlier = json.loads(given.out.read_text())["runs"] if given.out.exists() else []
        write_json(given.out, {"format": 1, "runs": [*earlier, result]})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
