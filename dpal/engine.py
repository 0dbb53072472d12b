"""DeepSpeed behind five verbs: forward_backward, step, reduce, state, close.

ZeRO may cut parameters and optimiser moments over the ranks in any way; what leaves the engine
(`state`) and what enters it (`restored`) is whole, in float32, and by parameter name. A run can
therefore be resumed at another world size or ZeRO stage.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpal.base.recipe import Train
from dpal.optim import build_optimizer
from dpal.ranks import World, import_deepspeed, leave, meet

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class EngineState:
    """Everything the optimiser needs to go on, whole and by parameter name.

    Attributes:
        step: optimiser steps done.
        parameters: float32 master weights; also what is not trained: frozen ones and buffers.
        exp_avg: Adam's first moments.
        exp_avg_sq: Adam's second moments.
    """

    step: int
    parameters: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]


class Engine:
    """A module, its optimiser and its data-parallel group.

    Args:
        module: holds every trained parameter; its forward returns an object with `.total`.
        spec: the `train` section of a recipe.
        world: place of this process.
        restored: state to go on from.
    """

    def __init__(
        self, module: nn.Module, spec: Train, world: World, restored: EngineState | None = None
    ) -> None:
        deepspeed = import_deepspeed()
        meet(world)
        if restored is not None:
            module.load_state_dict(restored.parameters, strict=True)
        self.world, self.module = world, module
        self.accumulation = spec.global_batch // (spec.micro_batch * world.size)
        self._names = {id(p): name for name, p in module.named_parameters()}
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(module, spec),
            config=_config(spec, self.accumulation),
        )
        self.device = self._engine.device
        self.steps_done = restored.step if restored is not None else 0
        optimizer = self._engine.optimizer
        self._sharded = hasattr(optimizer, "optimizer")  # a ZeRO optimiser wraps AdamW
        self._adam = optimizer.optimizer if self._sharded else optimizer
        self._create_adam_states(self.steps_done)
        if restored is not None:
            self._restore_moments(restored)

    def forward_backward(self, *inputs: Any) -> Any:
        """Run the module on one micro-batch, add its gradients, and return its output."""
        output = self._engine(*inputs)
        self._engine.backward(output.total)
        return output

    def step(self, lr: float, *, last_micro_batch: bool) -> None:
        """Count one micro-batch; update the parameters after the last one of a global batch."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        self.steps_done += last_micro_batch

    def reduce(self, values: Tensor) -> Tensor:
        """Mean of a small tensor over all ranks."""
        if self.world.size > 1:
            values = values.to(self.device)
            torch.distributed.all_reduce(values)
        return values / self.world.size

    def state(self) -> EngineState:
        """The whole state, gathered from all ranks (every rank must call it)."""
        parts: dict[str, dict[str, Tensor]] = {key: {} for key in ("", *_MOMENTS)}
        for parameter in self._trained():
            name = self._names[id(parameter)]
            for key, part in parts.items():
                whole = self._whole(parameter, key)
                if self.world.rank == 0:
                    part[name] = whole.detach().float().cpu().clone()
        if self.world.rank == 0:
            for name, value in self.module.state_dict().items():
                # Equal on every rank, but for a batch norm's statistics: those of rank 0 are kept.
                if name not in parts["exp_avg"]:
                    parts[""][name] = value.detach().cpu().clone()
        return EngineState(self.steps_done, parts[""], parts["exp_avg"], parts["exp_avg_sq"])

    def num_parameters(self) -> dict[str, int]:
        """Trained parameters by top-level part of the module."""
        counts: dict[str, int] = {}
        for parameter in self._trained():
            part = self._names[id(parameter)].partition(".")[0]
            size = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO 3 empties the rest
            counts[part] = counts.get(part, 0) + size
        return counts

    def close(self) -> None:
        """Leave the process group."""
        self._engine.destroy()
        leave()

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self._engine.module.parameters() if p.requires_grad]

    def _whole(self, parameter: nn.Parameter, moment: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if not self._sharded:
            return self._adam.state[parameter][moment] if moment else parameter.data
        if moment:
            return safe_get_full_optimizer_state(parameter, moment)
        return safe_get_full_fp32_param(parameter)

    def _create_adam_states(self, step: int) -> None:
        """Give every (shard of a) parameter the state AdamW would create in its first step.

        Left to itself, ZeRO 1 and 2 link the states of the first parameter group only.
        """
        stage = self._engine.zero_optimization_stage()
        shards = [p for group in self._adam.param_groups for p in group["params"]]
        if stage == 3:
            shards = self._engine.optimizer.fp32_partitioned_groups_flat
        for shard in shards:
            self._adam.state[shard] = {
                "step": torch.tensor(float(step)),
                **{moment: torch.zeros_like(shard) for moment in _MOMENTS},
            }
        if stage in (1, 2):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _restore_moments(self, restored: EngineState) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        for parameter in self._trained():
            name = self._names[id(parameter)]
            for moment in _MOMENTS:
                value = getattr(restored, moment)[name].to(self.device)
                if not self._sharded:
                    self._adam.state[parameter][moment].copy_(value)
                elif self._engine.zero_optimization_stage() == 3:
                    self._restore_own_part(parameter, value, moment)
                else:
                    safe_set_full_optimizer_state(parameter, value, moment)

    def _restore_own_part(self, parameter: nn.Parameter, value: Tensor, moment: str) -> None:
        """Cut this rank's part of a moment by hand: ZeRO 3's own setter fails on padded parts."""
        from deepspeed.utils import safe_get_local_optimizer_state

        part = safe_get_local_optimizer_state(parameter, moment)
        flat = value.flatten()
        start = min(self.world.rank * part.numel(), flat.numel())
        own = flat[start : start + part.numel()]
        part.zero_()
        part.flatten()[: own.numel()].copy_(own)


def _config(spec: Train, accumulation: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": spec.micro_batch,
        "gradient_accumulation_steps": accumulation,
        # Autocast keeps float32 master weights at every stage; DeepSpeed's own bf16 mode drifts
        # by about .02 at stage 0.
        "torch_autocast": {"enabled": spec.precision == "bf16", "dtype": "bfloat16"},
        "zero_optimization": {"stage": spec.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }
