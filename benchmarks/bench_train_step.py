"""One optimiser step, in parts: where its time goes, and how far it is from the GEMM peak.

    python benchmarks/bench_train_step.py [--device cuda] [--rounds 2] [--all] [--map-memory]

The student is ViT-Ti, the batch 32. Parts are run alone on what the part before hands over, forward
and backward; together they take about as long as the whole step. Seconds are CPU seconds of one
core, or wall seconds of an accelerator. "of peak" compares with a square matrix product of the
same precision, timed in the same rounds. Without --all, float32 is measured at the smallest size
only. --map-memory leaves freed memory to the C library (see `dpal.base.memory`).

Legend: B samples, N tokens, d student width, D teacher width.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from inputs import BATCH, made_batch, made_header, made_recipe, one_thread
from timing import Clock, Timing, cpu_seconds, interleave, table, wall_seconds
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_tools.backgrounds import load_backgrounds
from dpal.base.memory import keep_freed_memory
from dpal.base.recipe import Recipe
from dpal.batch import TrainBatch
from dpal.method.dpal import DpalTask
from dpal.model.attention import attend, suit_attention
from dpal.model.decoder import Decoded
from dpal.model.mixing import MixingNorm
from dpal.optim import build_optimizer
from dpal.shape_mask import fixed_mask
from dpal.target_source import CachedTargets
from dpal.task import Moment

SIZES = ((128, 192), (128, 768), (256, 768))  # view height, teacher width
FIRST = Moment(step=0, total_steps=100, num_samples=2 * BATCH, global_batch=BATCH)
PEAK_SIDE = {"cpu": 1024, "cuda": 8192}
Work = dict[str, Callable[[], object]]


class Step:
    """A task with its optimiser and batch, and its parts as functions without arguments."""

    def __init__(self, recipe: Recipe, batch: TrainBatch, task: DpalTask) -> None:
        self.batch, self.task, self.device = batch, task, task.device
        self.bf16 = recipe.train.precision == "bf16"
        self.optimizer = build_optimizer(task, recipe.train)
        with self.autocast():
            suit_attention(task.student, self.device)
            self.planes = self._planes()
            seen = task.look(batch, FIRST)
            calls, self.patterns = task._decode(task.decoder[0], seen, BATCH)
        self.seen = seen._replace(
            **{k: leaf(v) for k, v in seen._asdict().items() if v is not None}
        )
        self.calls = [leaves(call) for call in calls]

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The forward's precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            yield

    def whole(self) -> None:
        """Everything from uint8 pixels and target records to new parameters."""
        self.backward()
        self.update()

    def backward(self) -> None:
        """Everything but the update."""
        with self.autocast():
            losses = self.task(self.batch, FIRST)
        losses.total.backward()

    def update(self) -> None:
        """The optimiser's share; a step's gradients are set to None, as DeepSpeed does."""
        self.optimizer.step()

    def augment(self) -> None:
        """Colour noise and normalisation of all views."""
        with self.autocast():
            self._planes()

    def student(self) -> None:
        """The student on all views."""
        with self.autocast():
            seen = [self.task.student(planes) for planes in self.planes]
        sum(part.float().sum() for tokens in seen for part in tokens).backward()

    def decoder(self) -> None:
        """D-PaDe on all tokens."""
        with self.autocast():
            calls, _ = self.task._decode(self.task.decoder[0], self.seen, BATCH)
        sum(part.float().sum() for call in calls for part in differentiable(call)).backward()

    def losses(self) -> None:
        """Dequantised targets, mask and the five terms."""
        source = self.task._sources[0]
        targets = source(self.batch, self.device)
        mask = fixed_mask(targets.base.patches, source.header)
        shapes = [(targets.base.patches, mask)]
        result = self.task._compare(self.calls, self.patterns, targets, shapes, FIRST, None)
        (result.aligned.mean() + result.steering).backward()

    def _planes(self) -> list[Tensor]:
        """Input of the student: base views, composites, crops."""
        batch, noise = self.batch, self.batch.photometric
        crops = batch.crops.reshape(-1, *batch.crops.shape[2:])
        return [
            self.task.pixels(batch.base, noise[:, 0]),
            self.task.pixels(batch.composite, noise[:, 1]),
            self.task.pixels(crops, noise[:, 2:].reshape(-1, noise.shape[2])),
        ]

    def flops(self) -> int:
        """Matrix-product FLOPs of forward and backward."""
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self.backward()
        return counter.get_total_flops()


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def differentiable(call: Decoded) -> tuple[Tensor, ...]:
    """What of a decoder call losses are made of."""
    assert call.routing is not None
    return call.tokens, call.routing.logits, call.routing.energy


def leaves(call: Decoded) -> Decoded:
    """The same values, as the start of a graph."""
    assert call.routing is not None
    tokens, logits, energy = map(leaf, differentiable(call))
    return Decoded(tokens, call.routing._replace(logits=logits, energy=energy))


def clock_of(device: torch.device) -> Clock:
    if device.type == "cpu":
        return cpu_seconds

    def synchronised() -> float:
        torch.cuda.synchronize()
        return wall_seconds()

    return synchronised


def gemm(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Tensor], float]:
    """A square matrix product, and its FLOPs."""
    side = PEAK_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b, 2.0 * side**3


def measure(
    recipe: Recipe, width: int, device: torch.device, rounds: int, precisions: tuple[str, ...]
) -> None:
    """Print the parts of one step in each precision."""
    steps, work = {}, Work()
    batch = made_batch(recipe, header := made_header(recipe, width), load_backgrounds(recipe))
    for precision in precisions:
        task = DpalTask(recipe, (CachedTargets(header),)).to(device)
        train = recipe.train.model_copy(update={"precision": precision})
        step = Step(recipe.model_copy(update={"train": train}), batch, task)
        steps[precision] = step
        for part in ("whole", "augment", "student", "decoder", "losses", "update"):
            work[f"{precision} {part}"] = getattr(step, part)
        dtype = torch.bfloat16 if step.bf16 else torch.float32
        work[f"{precision} gemm"], gemm_flops = gemm(device, dtype)
    timings = interleave(work, rounds, clock=clock_of(device))
    rows = [_row(p, timings, step.flops(), gemm_flops) for p, step in steps.items()]
    head = ("", "s/step", "images/s", "augment", "student", "D-PaDe", "losses", "update", "of peak")
    print(f"\nViT-Ti, views {recipe.views.height} x {recipe.views.width}, teacher width {width}")
    print(table(head, rows))
    if "fp32" in precisions:
        gain = timings["fp32 whole"].over(timings["bf16 whole"])
        print(f"fp32 / bf16, whole step: {gain:.2f}")


def _row(precision: str, timings: dict[str, Timing], flops: int, peak: float) -> list[object]:
    whole, product = timings[f"{precision} whole"], timings[f"{precision} gemm"]
    parts = ("augment", "student", "decoder", "losses", "update")
    shares = [f"{timings[f'{precision} {part}'].over(whole):.0%}" for part in parts]
    of_peak = flops / peak * product.over(whole)
    return [precision, whole.median, BATCH / whole.median, *shares, f"{of_peak:.0%}"]


def compare_kernels(device: torch.device, rounds: int) -> None:
    """Our attention and expert mixing against PyTorch's plain forms, bf16, forward + backward."""
    rows = []
    for heads, tokens, channels in ((6, 33, 32), (6, 129, 32), (16, 257, 12)):
        q, k, v = _heads(heads, tokens, channels, device)
        work = {
            "fused": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v).sum().backward(),
            "float32": lambda q=q, k=k, v=v: attend(q, k, v).sum().backward(),
            "written out": lambda q=q, k=k, v=v: _written_out(q, k, v).sum().backward(),
        }
        timings = interleave(work, 2 * rounds, clock=clock_of(device))
        fused = timings["fused"]
        ratios = [fused.over(timings[name]) for name in ("float32", "written out")]
        rows.append([f"{BATCH} x {heads} heads, {tokens} tokens of {channels}", *ratios])
    print("\nfused bf16 attention / the same in another form (forward + backward)")
    print(table(("", "float32", "written out"), rows))
    timings = interleave(_mixings(device), 2 * rounds, clock=clock_of(device))
    ratio = timings["plain"].over(timings["ours"])
    print(f"\nGELU, LayerNorm and einsum / MixingNorm, 32 x 3 experts of 192 x 768: {ratio:.2f}")


def _heads(heads: int, tokens: int, channels: int, device: torch.device) -> tuple[Tensor, ...]:
    shape = (3, BATCH, heads, tokens, channels)
    packed = torch.randn(shape, device=device, dtype=torch.bfloat16)
    return tuple(leaf(part) for part in packed)


def _written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)).softmax(dim=-1) @ v


def _mixings(device: torch.device) -> Work:
    length = 192 * 768
    ours = MixingNorm(length).to(device)
    raw = leaf(torch.randn(BATCH, 3, length, device=device, dtype=torch.bfloat16))
    probabilities = leaf(torch.full((BATCH, 3), 1 / 3, device=device))

    def plain() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            experts = F.layer_norm(F.gelu(raw), (length,), ours.weight, ours.bias)
            mixed = torch.einsum("bk,bkm->bm", probabilities, experts)
        mixed.float().square().sum().backward()

    def ours_() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            mixed = ours(raw, probabilities)
        mixed.square().sum().backward()

    return {"plain": plain, "ours": ours_}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--all", action="store_true", help="float32 at every size")
    parser.add_argument("--map-memory", action="store_true", help="do not keep freed memory")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    one_thread()
    kept = not arguments.map_memory and keep_freed_memory()
    print(f"freed memory is {'kept' if kept else 'left to the C library'}")
    with tempfile.TemporaryDirectory() as folder:
        for height, width in SIZES:
            place = Path(folder) / f"{height}-{width}"
            place.mkdir()
            recipe = made_recipe(place, height=height, count=2 * BATCH)
            both = arguments.all or (height, width) == SIZES[0]
            precisions = ("fp32", "bf16") if both else ("bf16",)
            measure(recipe, width, device, arguments.rounds, precisions)
    compare_kernels(device, arguments.rounds)


if __name__ == "__main__":
    main()
