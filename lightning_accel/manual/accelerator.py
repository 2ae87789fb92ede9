"""``Accelerator``: a plain PyTorch loop, on any number of ranks, with every row, precision and checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.types import _PATH
from lightning.fabric.wrappers import _FabricModule, _unwrap_compiled
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

from lightning_accel.core.clipping import clip_grad_norm
from lightning_accel.core.registry import engines_of
from lightning_accel.data import ShardedLoader, join_uneven_inputs, prepare_data_loader, skip_first_batches
from lightning_accel.data.shuffling import seed_of
from lightning_accel.manual.accumulation import Accumulation
from lightning_accel.manual.choices import choose_strategy, precision_arguments, reject_unknown
from lightning_accel.manual.clipping import Together, optimizers_of
from lightning_accel.manual.deepspeed import LoopFile, MakesByFile
from lightning_accel.manual.environment import GivenRanks, Ranks
from lightning_accel.manual.environment import flag as flag_of
from lightning_accel.manual.environment import number as number_of
from lightning_accel.manual.optimizer import PreparedOptimizer
from lightning_accel.manual.peers import Peers
from lightning_accel.manual.records import Records
from lightning_accel.manual.scheduler import PreparedScheduler
from lightning_accel.manual.seeding import set_seed
from lightning_accel.manual.states import Prepared, States
from lightning_accel.manual.tracking import Trackers
from lightning_accel.manual.watching import LoaderWatch
from lightning_accel.strategies.deepspeed_file import DeepSpeedFile
from lightning_accel.strategies.engine_module import EngineModule
from lightning_accel.strategies.fabric import AccelFabricStrategy, AccelZeROStrategy
from lightning_accel.variables import ACCUMULATION, CPU, DEBUG, MIXED_PRECISION


class Accelerator(Records, MakesByFile):
    """A manual training loop on any number of ranks.

    It starts no processes. Which rank this is comes from the environment, which ``accel launch`` and ``torchrun`` set;
    without them there is one.

    Args:
        mixed_precision: ``"no"``, ``"fp16"``, ``"bf16"`` or ``"fp8"``, or a precision plugin such as
            ``AccelPrecision(...)``. Default: what ``accel launch`` was told, or ``"no"``.
        gradient_accumulation_steps: Micro-batches of one optimizer step: ``accumulate`` counts them, and ``backward``
            divides losses by their number. Default: what ``accel launch`` was told, or 1.
        strategy: Where model state rests: ``"ddp"``, ``"zero1"``, ``"zero2"``, ``"zero3"``, ``"fsdp"``,
            ``"fsdp_partial"`` or ``"fsdp_hybrid"``; or a strategy of ``lightning_accel.strategies.fabric`` with options
            of its own. Default: what ``accel launch`` was told, or ``"ddp"``.
        deepspeed_config: A DeepSpeed JSON file, or a dict of what would be in it, instead of ``strategy``: it says
            where model state rests, precision, loss scale, accumulation, clipping, batch sizes, and by
            ``make_optimizer`` and ``make_scheduler`` these. ``docs/from-deepspeed.md`` has every key. Default: what
            ``accel launch`` was told.
        cpu: Whether to stay on the CPU where there is CUDA. Default: what ``accel launch`` was told, or False.
        split_batches: Whether prepared loaders divide each of their batches over the ranks. If not, ranks take whole
            batches in turn, and a step sees as many samples more as there are ranks.
        even_batches: Whether the last batches of an epoch are filled up with its first samples, so that all ranks have
            as many; ``gather_for_metrics`` leaves these out again.
        dispatch_batches: Whether rank 0 reads all batches and sends the others theirs. Default: for iterable datasets.
        non_blocking: Whether copies of batches to the device may overlap with what the host does.
        step_scheduler_with_optimizer: Whether schedulers step only when optimizers do, once for every batch that a
            single process would have had. If not, each call of ``scheduler.step()`` is one step.
        log_with: ``"tensorboard"``, ``"csv"``, ``"wandb"``, ``"all"``, a Lightning logger, or a list of these.
        project_dir: Where ``save_state()`` makes ``checkpoints/checkpoint_0``, …, and loggers write.
        logging_dir: Where loggers write, if elsewhere.
        checkpoints_total_limit: How many checkpoints under ``project_dir`` are kept; all by default.
        seed: For random numbers, as ``set_seed`` sets them, and for the loaders' shuffling.
        patience_s: How long, in seconds, ranks wait for the others in ``save_state`` and ``load_state``.
        unknown: Options that do not exist; refused.

    Raises:
        FileNotFoundError: If there is no such DeepSpeed file.
        ValueError: If there is no such strategy or precision (the nearest names are told), a number is out of range,
            the environment is incomplete, or a DeepSpeed file is not accepted or contradicts another argument.
        TypeError: If there is no such option.

    Example::

        accelerator = Accelerator(mixed_precision="bf16", strategy="zero2")
        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(loss_function(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    """

    def __init__(
        self,
        *,
        mixed_precision: Any = None,
        gradient_accumulation_steps: int | None = None,
        strategy: str | AccelFabricStrategy | None = None,
        deepspeed_config: DeepSpeedFile | None = None,
        cpu: bool | None = None,
        split_batches: bool = False,
        even_batches: bool = True,
        dispatch_batches: bool | None = None,
        non_blocking: bool = False,
        step_scheduler_with_optimizer: bool = True,
        log_with: Any = None,
        project_dir: _PATH | None = None,
        logging_dir: _PATH | None = None,
        checkpoints_total_limit: int | None = None,
        seed: int | None = None,
        patience_s: float = 120.0,
        **unknown: Any,
    ) -> None:
        reject_unknown(Accelerator.__init__, unknown)
        if checkpoints_total_limit is not None and checkpoints_total_limit < 1:
            raise ValueError(f"Expected checkpoints_total_limit to be positive, got {checkpoints_total_limit}.")
        if not patience_s > 0:
            raise ValueError(f"Expected patience_s to be positive, got {patience_s}.")
        if gradient_accumulation_steps is None:
            gradient_accumulation_steps = number_of(os.environ, ACCUMULATION, 1)
        self._accumulation = Accumulation(gradient_accumulation_steps)
        if mixed_precision is None:
            mixed_precision = os.environ.get(MIXED_PRECISION, "no")
        precision = precision_arguments(mixed_precision)
        chosen = choose_strategy(strategy, deepspeed_config, os.environ)
        if chosen._start_method != "popen":
            raise ValueError(
                f"Expected a strategy that starts no processes, got one with start_method={chosen._start_method!r}."
                " Leave start_method out; `accel launch`, torchrun or notebook_launcher start them."
            )
        self.project_dir = None if project_dir is None else Path(project_dir)
        """Where checkpoints that get no path go, and what loggers write."""
        self.logging_dir = self.project_dir if logging_dir is None else Path(logging_dir)
        """Where loggers write."""
        self._trackers = Trackers(log_with, self.logging_dir)
        self._ranks = Ranks.found()
        on_cpu = flag_of(CPU) if cpu is None else cpu
        plugins = precision.pop("plugins", [])
        if chosen.cluster_environment is None:
            plugins = [*plugins, GivenRanks(self._ranks)]
        self.fabric = Fabric(
            accelerator="cuda" if torch.cuda.is_available() and not on_cpu else "cpu",
            strategy=chosen,
            devices=self._ranks.local_ranks,
            num_nodes=self._ranks.machines,
            plugins=plugins,
            **precision,
        )
        self.fabric.launch()
        file = chosen.take_file() if isinstance(chosen, AccelZeROStrategy) else None
        self._file = None
        if file is not None:
            self._file = LoopFile(file, self._ranks.ranks, gradient_accumulation_steps)
            self._accumulation.set_steps(self._file.accumulation)
            mixed_precision = self._file.mixed_precision or mixed_precision
        self.split_batches = split_batches
        """Whether prepared loaders divide each of their batches over the ranks."""
        self.even_batches = even_batches
        """Whether the last batches of an epoch are filled up."""
        self.dispatch_batches = dispatch_batches
        """Whether rank 0 reads for all."""
        self.non_blocking = non_blocking
        """Whether copies of batches to the device may overlap with what the host does."""
        self.step_scheduler_with_optimizer = step_scheduler_with_optimizer
        """Whether schedulers step only when optimizers do."""
        self.mixed_precision = mixed_precision
        """As it was asked for, or as a DeepSpeed file says."""
        self._seed = seed
        if seed is not None:
            set_seed(seed)
        self._strategy = chosen
        self._loaders = LoaderWatch()
        self._peers = Peers(self.fabric.device, debug=flag_of(DEBUG))
        self._triggered = False
        self._prepared = Prepared()
        self._states = States(
            self.fabric,
            self._peers,
            self._prepared,
            self._accumulation,
            project_dir=self.project_dir,
            limit=checkpoints_total_limit,
            patience_s=patience_s,
        )

    # ----------------------------------------------------------------- prepare

    def prepare(self, *objects: Any) -> Any:
        """Make models, optimizers, loaders and schedulers ready for all ranks. All ranks call it together.

        Args:
            objects: Any number of them, in any order; None stays None.

        Returns:
            Each in its place: a tuple, or the one object that there was.

        Raises:
            ValueError: If one was prepared already, an optimizer has parameters of no prepared model, or a scheduler's
                optimizer was not prepared.
            TypeError: If something is none of these.

        """
        kinds = [_kind_of(entry) for entry in objects]
        found: list[Any] = [None] * len(objects)
        for kind, prepare in (
            ("model", self.prepare_model),
            ("optimizer", self.prepare_optimizer),
            ("scheduler", self.prepare_scheduler),
            ("loader", self.prepare_data_loader),
        ):
            for position, entry in enumerate(objects):
                if kinds[position] == kind:
                    found[position] = prepare(entry)
        return found[0] if len(found) == 1 else tuple(found)

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Have an engine train a model. Its parameters stay the same objects.

        Raises:
            ValueError: If it was prepared already.

        """
        inner, _ = _unwrap_compiled(model)
        if isinstance(inner, (_FabricModule, EngineModule)) or engines_of(inner):
            raise ValueError(
                f"Expected a model that was not prepared yet, got a {type(self.unwrap_model(model)).__name__} that was."
                " Prepare each model once, and use what prepare has returned."
            )
        prepared = self.fabric.setup_module(model)
        engine, _ = _unwrap_compiled(prepared._forward_module)
        assert isinstance(engine, EngineModule)
        self._prepared.models.append(prepared)
        self._prepared.engines.append(engine)
        return prepared

    def prepare_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Have an optimizer update this rank's part of a prepared model, at the end of accumulation windows.

        Raises:
            ValueError: If it was prepared already, or has parameters of no prepared model or of several.

        """
        if isinstance(optimizer, PreparedOptimizer):
            raise ValueError("Expected an optimizer that was not prepared yet. Use what prepare has returned.")
        name = type(optimizer).__name__
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        engines = [module.engine for module in self._prepared.engines]
        owners = {index for p in parameters for index, engine in enumerate(engines) if p in engine.names}
        if not owners:
            raise ValueError(
                f"Expected the parameters of {name} to belong to a prepared model, but none of the"
                f" {len(engines)} prepared models has them. Make the optimizer from model.parameters(), and pass both"
                " to accelerator.prepare(model, optimizer)."
            )
        if len(owners) > 1:
            raise ValueError(
                f"Expected the parameters of {name} to belong to one prepared model, got those of {len(owners)}. Make"
                " an optimizer for each, or prepare the models as one: torch.nn.ModuleDict({...})."
            )
        inner: Any = self.fabric.setup_optimizers(optimizer)
        prepared = PreparedOptimizer(inner.optimizer, self._strategy, self._accumulation, self._file)
        self._prepared.optimizers.append(prepared)
        return prepared  # type: ignore[return-value]

    def prepare_scheduler(self, scheduler: Any) -> PreparedScheduler:
        """Have a scheduler step with its optimizer; see ``PreparedScheduler.step``.

        Raises:
            ValueError: If it was prepared already, or its optimizer was not prepared.

        """
        if isinstance(scheduler, PreparedScheduler):
            raise ValueError("Expected a scheduler that was not prepared yet. Use what prepare has returned.")
        optimizers = self._prepared.optimizers
        if hasattr(scheduler, "optimizer"):
            own = getattr(scheduler.optimizer, "_optimizer", scheduler.optimizer)
            optimizers = [optimizer for optimizer in optimizers if optimizer.optimizer is own]
            if not optimizers:
                raise ValueError(
                    f"Expected the optimizer of {type(scheduler).__name__} to be prepared, but it was not. Pass it to"
                    " accelerator.prepare together with the scheduler, or before it."
                )
        is_of_file = self._file is not None and self._file.has_made(scheduler)
        prepared = PreparedScheduler(
            scheduler,
            optimizers,
            self._accumulation,
            times=1 if self.split_batches or is_of_file else self.num_processes,
            with_optimizer=self.step_scheduler_with_optimizer,
        )
        self._prepared.schedulers.append(prepared)
        return prepared

    def prepare_data_loader(self, data_loader: DataLoader[Any]) -> ShardedLoader:
        """Have a loader give this rank its share of the batches, on the rank's device.

        Raises:
            ValueError: If it was prepared already, or its batches cannot be divided as was asked for.

        """
        if isinstance(data_loader, ShardedLoader):
            raise ValueError("Expected a loader that was not prepared yet. Use what prepare has returned.")
        seed = None
        if self._seed is not None:  # loaders that are alike shuffle in orders of their own
            seed = seed_of(self._seed, "loader", len(self._prepared.loaders))
        prepared = prepare_data_loader(
            data_loader,
            rank=self.process_index,
            ranks=self.num_processes,
            device=self.device,
            split_batches=self.split_batches,
            even_batches=self.even_batches,
            dispatch_batches=self.dispatch_batches,
            non_blocking=self.non_blocking,
            seed=seed,
            watcher=self._loaders,
        )
        self._prepared.loaders.append(prepared)
        return prepared

    def skip_first_batches(self, dataloader: Any, num_batches: int = 0) -> Any:
        """A loader without its first batches, for one epoch; ``load_state`` does so by itself.

        Args:
            dataloader: Prepared or not.
            num_batches: How many, of this rank's.

        """
        return skip_first_batches(dataloader, num_batches)

    def unwrap_model(self, model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True) -> Any:
        """The user's model behind what ``prepare`` has returned. What rests sharded has no values there between uses.

        Args:
            model: Prepared or not.
            keep_fp32_wrapper: Without meaning here: models are not changed to convert outputs.
            keep_torch_compile: Without meaning for prepared models: what was compiled is what wraps them.

        """
        inner, _ = _unwrap_compiled(model)
        if isinstance(inner, _FabricModule):
            return _unwrap_compiled(inner.module)[0]
        return model if keep_torch_compile else inner

    def free_memory(self, *objects: Any) -> Any:
        """Let go of all that was prepared; models get their memory back from their engines. All ranks call it together.

        Returns:
            None for each object, to overwrite the caller's names with: ``model, optimizer = free_memory(...)``.

        """
        self._strategy.teardown()
        for kept in (
            self._prepared.models,
            self._prepared.engines,
            self._prepared.optimizers,
            self._prepared.schedulers,
            self._prepared.loaders,
        ):
            kept.clear()
        self._accumulation.reset()
        return None if len(objects) == 1 else (None,) * len(objects)

    clear = free_memory

    # ------------------------------------------------------------------- steps

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of one optimizer step."""
        return self._accumulation.steps

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, steps: int) -> None:
        if self._accumulation.is_open:
            raise RuntimeError(
                "Expected gradient_accumulation_steps to be changed between windows, but gradients are accumulated."
                " Change it when sync_gradients is True."
            )
        if self._file is not None:
            self._file.require_steps(steps)
        self._accumulation.set_steps(steps)

    @property
    def sync_gradients(self) -> bool:
        """Whether this micro-batch ends a window: gradients are complete after its backward, and optimizers step."""
        return self._accumulation.sync_gradients

    @contextmanager
    def accumulate(self, *models: nn.Module) -> Iterator[None]:
        """Around one micro-batch. Every ``gradient_accumulation_steps``-th, and a loader's last, ends a window.

        Within the others optimizers and schedulers do not step, ``zero_grad`` keeps what was accumulated, and rows
        whose gradients accumulate on each rank send nothing. Models that are trained in turns, each with an
        ``accumulate`` of its own, have windows of their own: clip and step within it.

        Args:
            models: Those that are trained; all that were prepared by default.

        Raises:
            ValueError: If a model was not prepared.

        """
        engines = [self._engine_of(model) for model in models or self._prepared.models]
        closes = self._accumulation.advance(ends=self._loaders.at_end, of=frozenset(map(id, engines)))
        for optimizer in self._prepared.optimizers:
            optimizer.enter_window()
        if closes:
            yield
            return
        with ExitStack() as stack:
            for engine in engines:
                stack.enter_context(engine.engine.no_sync())
            yield

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within it, rows whose gradients accumulate on each rank send nothing in backward.

        Raises:
            ValueError: If the model was not prepared.

        """
        return self._engine_of(model).engine.no_sync()

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """``loss.backward()``, with gradients averaged over the ranks; all of them call it together.

        The loss is divided by ``gradient_accumulation_steps``. In a window that a loader's end has cut short the
        gradients count as a mean over the micro-batches that are in it nevertheless, by the time of clipping or step.
        Losses with a weight (``lightning_accel.engine_of(model).set_loss_weight(tokens)``) are not divided.

        Args:
            loss: A tensor of one element.
            kwargs: As for ``Tensor.backward``.

        Raises:
            RuntimeError: If no model was prepared.

        """
        prepared = self._prepared
        if not prepared.engines:
            raise RuntimeError(
                "Expected a model to be prepared before backward, got none: gradients would not be reduced. Call"
                " model, optimizer = accelerator.prepare(model, optimizer) first."
            )
        if self._file is not None:
            self._file.require_batches(self._loaders.active)
        self._accumulation.note_backward()
        if self._accumulation.steps > 1 and all(module.engine.loss_weight is None for module in prepared.engines):
            loss = loss / self._accumulation.steps
        self.fabric.backward(loss, **kwargs)

    def autocast(self) -> AbstractContextManager[Any]:
        """Within it, torch computes as the precision says. Prepared models do so by themselves."""
        return self.fabric.autocast()

    def unscale_gradients(self, optimizer: Any = None) -> None:
        """Divide gradients by the loss scale, as clipping does; nothing happens without one, or while accumulating.

        Args:
            optimizer: A prepared one, or several; all by default.

        Raises:
            ValueError: If one was not prepared.

        """
        if not self.sync_gradients:
            return
        chosen = self._prepared.optimizers if optimizer is None else optimizer
        for entry in chosen if isinstance(chosen, (list, tuple)) else [chosen]:
            if not isinstance(entry, PreparedOptimizer):
                raise ValueError(f"Expected a prepared optimizer to unscale, got {type(entry).__name__}.")
            entry.unscale()

    def clip_grad_norm_(
        self,
        parameters: Any,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
    ) -> Tensor | None:
        """Clip gradients by their norm, taken over all ranks' parts and all parameters, after unscaling them.

        Args:
            parameters: ``model.parameters()``, or those of several models: all of one optimizer or of several. A model
                will do as well.
            max_norm: The largest norm to leave.
            norm_type: p of the p-norm; may be ``inf``.
            error_if_nonfinite: Raise if the norm is infinite or NaN. Otherwise such gradients are set to zero with a
                warning, or left to the scaler that will skip their step.

        Returns:
            The norm before clipping, 0-dim; None while gradients accumulate, where nothing happens.

        Raises:
            ValueError: If an optimizer has more parameters than these, or one of these is in none.
            RuntimeError: If ``error_if_nonfinite`` and the norm is not finite.

        """
        if not self.sync_gradients:
            return None
        optimizers = optimizers_of(parameters, self._prepared.optimizers)
        if self._file is not None and self._file.require_norm(max_norm, norm_type):
            for optimizer in optimizers:
                optimizer.was_clipped = True
        self.unscale_gradients(optimizers)
        if len(optimizers) == 1:
            (only,) = optimizers
            return only.added.engine.clip_grad_norm_(only.optimizer, max_norm, norm_type, error_if_nonfinite)
        together = Together(optimizers)
        return clip_grad_norm(
            together,
            float(max_norm),
            float(norm_type),
            error_if_nonfinite,
            False,  # norms of all ranks' parts are what it is given
            self._prepared.engines[0].engine.mesh.shard,
            together.dtype,
            skipped=all(optimizer.added.overflowed for optimizer in optimizers),  # else one would step unclipped
        )

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """Clamp gradients to ``[-clip_value, clip_value]``, after unscaling them; nothing happens while accumulating.

        Args:
            parameters: As for ``clip_grad_norm_``.
            clip_value: The largest absolute value to leave.

        Raises:
            ValueError: As ``clip_grad_norm_``.

        """
        if not self.sync_gradients:
            return
        optimizers = optimizers_of(parameters, self._prepared.optimizers)
        if self._file is not None:
            self._file.require_value()
        self.unscale_gradients(optimizers)
        for optimizer in optimizers:
            optimizer.was_clipped = True
            optimizer.added.engine.clip_grad_value_(optimizer.optimizer, clip_value)

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether the scaler has skipped the last step of any optimizer."""
        return any(optimizer.step_was_skipped for optimizer in self._prepared.optimizers)

    def join_uneven_inputs(
        self, joinables: Sequence[Any], even_batches: bool | None = None
    ) -> AbstractContextManager[Any]:
        """Within it, ranks may have different numbers of batches. All ranks enter it together.

        Who has none left goes on with its last batch, on which gradients count as zeros; gradients are the mean over
        the ranks that have some.

        Args:
            joinables: The prepared models that are trained.
            even_batches: Another setting for the prepared loaders, within it.

        Raises:
            ValueError: If a model was not prepared.

        """
        engines = [self._engine_of(model).engine for model in joinables]
        return join_uneven_inputs(engines, self._prepared.loaders, even_batches=even_batches)


def _kind_of(entry: Any) -> str | None:
    if entry is None:
        return None
    if isinstance(entry, nn.Module):
        return "model"
    if isinstance(entry, (Optimizer, PreparedOptimizer)):
        return "optimizer"
    if isinstance(entry, (DataLoader, ShardedLoader)):
        return "loader"
    if isinstance(entry, (LRScheduler, ReduceLROnPlateau, PreparedScheduler)) or all(
        callable(getattr(entry, name, None)) for name in ("step", "state_dict", "load_state_dict")
    ):
        return "scheduler"
    raise TypeError(
        "Expected models, optimizers, data loaders and learning rate schedulers to prepare, got"
        f" {type(entry).__name__}. Use it as it is."
    )
