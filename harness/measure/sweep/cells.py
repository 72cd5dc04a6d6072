"""Run the cells of a sweep on this machine's device."""

from __future__ import annotations

import contextlib
from datetime import date

from harness.assets.chat import taken_date
from harness.device.clock import device_clock
from harness.device.engine import best_device, load_engine, load_model
from harness.device.locks import device_held
from harness.device.machine import device_info
from harness.device.prompts import check_lengths, suite_prompts, warmup_prompts
from harness.device.trace import CHAT_DATE_KEY
from harness.errors import UserError
from harness.measure.sweep.decoded import decode_point, traced_prompts
from harness.measure.sweep.sampled import run_sampled, sampled_prompts
from harness.measure.sweep.tasks import CellInputs, RunTask, SampledTask, failed_cell
from harness.records.machines.comparable import MeasuredMachine, not_comparable
from harness.records.sweep_cells import AnyCell


class CellRunner:
    """Runs the cells of one sweep on this machine's device, on an engine that is loaded once.

    Raises: UserError where the suite's model or heads are not those of the trace, or its prompts do not suit
    the sweep.
    """

    def __init__(self, inputs: CellInputs) -> None:
        spec, suite, device = inputs.spec, inputs.suite, best_device()
        loaded = load_model(
            suite.model, device=device, allow_hub=inputs.allow_hub, base_folder=inputs.base_folder
        )
        self._inputs, self._device = inputs, device
        self._engine = load_engine(suite, loaded, base_folder=inputs.base_folder, allow_hub=inputs.allow_hub)
        inputs.trace.require_same(
            backbone_sha256=loaded.sha256,
            heads_sha256=self._engine.heads_sha256,
            where="trace",
            noun="trace",
        )
        traced = inputs.trace.provenance.extra.get(CHAT_DATE_KEY)
        taken_date(loaded.tokenizer, begun=date.fromisoformat(str(traced)) if traced is not None else None)
        prompts = suite_prompts(suite, loaded, base_folder=inputs.base_folder, allow_hub=inputs.allow_hub)
        self._sampled_prompts = sampled_prompts(spec, prompts) if spec.sampled is not None else ()
        if spec.sampled is not None:
            check_lengths(self._sampled_prompts, self._engine, max_new_tokens=spec.sampled.max_new_tokens)
        self._traced = traced_prompts(inputs, prompts) if spec.decoded is not None else ()
        self._warm_ups = warmup_prompts(suite, loaded)
        self._clock, self._first_mode = device_clock(device), self._engine.runner.mode

    def run(self, task: RunTask) -> AnyCell:
        """Return the cell of a task.

        What goes wrong becomes a failed cell with no figure, and the others go on.
        """
        try:
            return self._run(task)
        except Exception as error:
            return failed_cell(task, error_type=type(error).__name__, message=str(error))

    def _run(self, task: RunTask) -> AnyCell:
        if isinstance(task, SampledTask):
            self._engine.runner.use(self._first_mode)
            return run_sampled(
                self._inputs, self._engine, task, self._sampled_prompts, clock=self._clock, held=self._held
            )
        here, label = device_info(self._device), task.curve.label
        assert label.machine is not None  # a point is decoded where a measured curve says so
        if (why := not_comparable(label.machine, MeasuredMachine(here))) is not None:
            raise UserError(
                found=f"a {here.name} ({why})",
                need=f"the {label.device} whose curve the point is composed with",
                where="this node",
            )
        if label.mode is not None:
            self._engine.runner.use(label.mode)  # what the curve was timed in
        return decode_point(
            self._inputs, self._engine, task, self._traced, self._warm_ups, clock=self._clock, held=self._held
        )

    def _held(self) -> contextlib.AbstractContextManager[None]:
        return device_held(self._device)
