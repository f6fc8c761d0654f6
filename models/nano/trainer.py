"""The training loop: stages, evaluations, and a state to go on from."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastvlm_mlx.errors import InputError
from nano.network import NanoVLM
from nano.objectives import (
    DENSE_TARGETS,
    TARGETS,
    answer_logits,
    answer_loss,
    dense_counts,
    dense_loss,
    exact_matches,
    head_counts,
    head_loss,
)
from nano.record import STATE, TOKENIZER, Curve, changed_settings, load_state, save_state
from nano.schedule import CLIP, STAGES, STARTED, Stage, freeze, make_optimizer, outline, rate_factor, set_rate
from nano.settings import NanoConfig, Settings, as_text
from nano.starting import load_weights
from nano.targets import Batch, Batches
from nano.tokenizer import Prompts, make_tokenizer
from nano.warm_start import start_projector
from nano.world import World, make_heads

HELD_OUT = "held-out"
SAVE_EVERY_S = 180.0
LOG_EVERY = 25  # steps
STARTING_PICTURES = 256
RUN_SEEDS, STAGE_SEEDS = 2**40, 2**36  # room between the seeds of two runs, and of two stages


class Trainer:
    """A training run in a folder.

    Args:
        folder: of the run; made if need be, and gone on from where it holds a state.
        config: sizes; the vocabulary's is the tokenizer's. Of a run that begins with a checkpoint, those of
            `nano.starting.read_config`.
        settings: how to train.
        world: the pictures.
        say: called with each line of progress.
        start: a checkpoint, with whose weights and tokenizer a new run begins in the last three stages.

    Attributes:
        changes: what the run went on with that it hadn't before; see `nano.record.changed_settings`.

    Raises:
        InputError: the folder holds a run with other sizes or settings, or `start` isn't what train.py exports.
    """

    def __init__(
        self,
        folder: Path,
        config: NanoConfig,
        settings: Settings,
        world: World,
        say: Callable[[str], None] = print,
        start: Path | None = None,
    ) -> None:
        state = load_state(folder, settings.device) if (folder / STATE).exists() else None
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.settings, self.world, self.say = folder, settings, world, say
        self.stage, self.step = 0, 0
        self.losses: list[float] = []  # of this process, for tests and logs
        self.tokenizer = folder / TOKENIZER
        self.changes = self._changes(state, config) if state else []
        self._saved = state is not None
        torch.manual_seed(settings.seed)
        if state:
            config = NanoConfig(**state["config"])
        elif start:
            shutil.copyfile(start / TOKENIZER, self.tokenizer)
        else:
            config = self._new_tokenizer(config)
        self.model = NanoVLM(config).to(settings.device)
        self.heads = make_heads(config, world).to(settings.device)
        self.parts: dict[str, nn.Module] = {
            "early": self.model.vision.early,
            "late": self.model.vision.late,
            "projector": self.model.projector,
            "decoder": self.model.decoder,
            "heads": self.heads,
        }
        seen = [*(f"cell {name}" for name in TARGETS), *(f"dense {name}" for name in DENSE_TARGETS)]
        self.curve = Curve(folder, [*seen, "exact", *world.KINDS], state["elapsed"] if state else 0.0)
        if start and not state:
            load_weights(
                self.model, start, self._dataset(self._first_seed(0), STARTING_PICTURES, config.side)[0]["pixels"]
            )
        self._enter(state["stage"] if state else STARTED if start else 0)
        self._goes_on = state is None or state.get("schedule") == outline(config.side)
        if state:
            self._restore(state)
        self._held_out: dict[int, Batch] = {}  # by the pictures' side

    def _changes(self, state: dict[str, Any], config: NanoConfig) -> list[dict[str, Any]]:
        before: list[dict[str, Any]] = state.get("changes", [])
        new = changed_settings(state, self.settings, config)
        if not new:
            return before
        self.say("from here on: " + ", ".join(f"{name} {as_text(now)}" for name, (_, now) in new.items()))
        return [*before, {"stage": state["stage"], "step": state["step"], "settings": new}]

    def _new_tokenizer(self, config: NanoConfig) -> NanoConfig:
        first = self._first_seed(0)
        scenes = range(first, first + self.settings.vocabulary_scenes)
        asked = (q for seed in scenes for q in self.world.make_scene(seed, split="train", side=config.side).questions)
        make_tokenizer(asked).save(str(self.tokenizer))
        rows = -(-Prompts(self.tokenizer).size // 64) * 64
        return replace(config, vocabulary=rows)

    def _first_seed(self, part: int) -> int:
        """Of the tokenizer's scenes (0), and of those of a stage (1 and on)."""
        return self.settings.seed * RUN_SEEDS + part * STAGE_SEEDS

    def _enter(self, stage: int) -> None:
        """Begin a stage: freeze what it doesn't train, with a fresh optimiser."""
        self.stage, self.step = stage, 0
        if stage < len(STAGES):
            freeze(self.parts, STAGES[stage])
            self.optimizer = make_optimizer(self.parts, STAGES[stage])

    def _restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        if state["optimizer"] and self._goes_on:
            self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"].cpu())

    def save(self) -> None:
        """Write the state."""
        state = {
            "config": self.model.config.to_dict(),
            "settings": asdict(self.settings),
            "schedule": outline(self.model.config.side),
            "changes": self.changes,
            "stage": self.stage,
            "step": self.step,
            "elapsed": self.curve.elapsed,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.stage < len(STAGES) else None,
            "rng": torch.get_rng_state(),
        }
        save_state(self.folder, state)
        self._saved = True

    @property
    def finished(self) -> bool:
        """Whether all stages are done."""
        return self.stage >= len(STAGES)

    def run(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Train until all stages are done or `stop` says so; what was done is saved at the end.

        Raises:
            InputError: the folder's run was begun with other stages than there are now.
        """
        if not self._goes_on:
            raise InputError(
                f"{self.folder} was begun with other stages; choose another folder, or go on from its weights: "
                "--export CHECKPOINT, then --start CHECKPOINT"
            )
        try:
            while not self.finished and not stop():
                self._run_stage(stop)
        finally:
            if self._saved or self.losses:  # a start that failed leaves nothing that stands in the way of another
                self.save()

    def _run_stage(self, stop: Callable[[], bool]) -> None:
        stage, steps = STAGES[self.stage], self.settings.stage_steps[self.stage]
        saved = logged = time.monotonic()
        recent: list[float] = []
        since = self.step  # the last log
        for batch in self._batches(stage, steps):
            recent.append(self._train_step(stage, batch, steps))
            now = time.monotonic()
            evaluates = self.step % self.settings.evaluate_every == 0 or self.step == steps
            if evaluates or self.step % LOG_EVERY == 0:
                done = self.step - since
                pictures_per_s, mean = self.settings.batch * done / (now - logged), sum(recent[-done:]) / done
                self.say(f"{stage.name} {self.step}/{steps}: loss {mean:.4f}, {pictures_per_s:.1f} pictures/s")
                if evaluates:
                    self._report(stage, sum(recent) / len(recent), pictures_per_s)
                    recent = []
                since, logged = self.step, time.monotonic()
            if now - saved > SAVE_EVERY_S:
                self.save()
                saved = now
            if stop() and self.step < steps:
                return
        self._enter(self.stage + 1)
        if steps and stage.trains("late") and not stage.answers:
            self._start_projector(stage)
        self.save()

    @torch.no_grad()
    def _start_projector(self, before: Stage) -> None:
        """Set the projector by the features of pictures of the stage before."""
        data = self._dataset(self._first_seed(1), STARTING_PICTURES, before.side(self.model.config.side))
        self.model.eval()
        parts = data[0]["pixels"].to(self.settings.device).split(self.settings.batch)
        features = torch.cat([self.model.encode(pixels) for pixels in parts]).flatten(0, 1)
        start_projector(self.model.projector, self.heads.on_features, features)
        freeze(self.parts, STAGES[self.stage])

    def _batches(self, stage: Stage, steps: int) -> Iterator[Batch]:
        """The rest of a stage's batches, made ahead by the workers."""
        settings = self.settings
        first_seed = self._first_seed(self.stage + 1)
        tokenizer = self.tokenizer if stage.answers else None
        drawn = {"pages": stage.pages, "signs": stage.signs, "shapes": stage.shapes}
        side = stage.side(self.model.config.side)
        data = self._dataset(first_seed, settings.batch, side, tokenizer=tokenizer, most=settings.questions, **drawn)
        loader = DataLoader(
            data,
            batch_size=None,
            sampler=range(self.step, steps),
            num_workers=settings.workers,
            prefetch_factor=4 if settings.workers else None,
            generator=torch.Generator(),  # else the loader draws from the global one
        )
        for batch in loader:
            yield {name: tensor.to(settings.device) for name, tensor in batch.items()}

    def _dataset(self, first_seed: int, size: int, side: int, **more: Any) -> Batches:
        return Batches(self.world.make_scene, self.world.KINDS, first_seed, size, side, **more)

    def _train_step(self, stage: Stage, batch: Batch, steps: int) -> float:
        set_rate(self.optimizer, self.settings.rate * rate_factor(self.step, steps))
        loss = self._loss(stage, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(trained, CLIP)
        self.optimizer.step()
        self.step += 1
        self.losses.append(loss.item())
        return self.losses[-1]

    def _loss(self, stage: Stage, batch: Batch) -> Tensor:
        with torch.set_grad_enabled(stage.trains("late")):
            features, maps = self.model.encode_with_maps(batch["pixels"])
        loss = torch.zeros((), device=features.device)
        if stage.answers:
            loss = loss + answer_loss(*answer_logits(self.model, features, batch), batch)
        if stage.heads:
            loss = loss + stage.heads * head_loss(self.heads(features), batch)
        if stage.dense:
            loss = loss + stage.dense * dense_loss(self.heads.dense(maps, features), batch)
        return loss

    def _report(self, stage: Stage, loss: float, pictures_per_s: float) -> None:
        measured = self.evaluate(stage)
        self.curve.add(stage.name, self.step, loss, pictures_per_s, measured)
        self.say("  held out: " + ", ".join(f"{name} {100 * value:.1f}" for name, value in measured.items()))

    @torch.no_grad()
    def evaluate(self, stage: Stage) -> dict[str, float]:
        """On held-out pictures: accuracy of the heads that a stage trains, and exact match of answers by kind."""
        settings, side = self.settings, stage.side(self.model.config.side)
        if side not in self._held_out:
            data = self._dataset(0, settings.evaluated, side, tokenizer=self.tokenizer, most=1000, split=HELD_OUT)
            self._held_out[side] = {name: tensor.to(settings.device) for name, tensor in data[0].items()}
        batch = self._held_out[side]
        for part in self.parts.values():
            part.eval()
        seen = [self.model.encode_with_maps(pixels) for pixels in batch["pixels"].split(settings.batch)]
        features = torch.cat([part for part, _ in seen])
        maps = [torch.cat(parts) for parts in zip(*(maps for _, maps in seen), strict=True)]
        out = {}
        if stage.heads:  # elsewhere they don't follow the features, and a run that starts there never taught them
            counts = {f"cell {name}": count for name, count in head_counts(self.heads(features), batch).items()}
            dense = dense_counts(self.heads.dense(maps, features), batch)
            counts |= {f"dense {name}": count for name, count in dense.items()}
            out = {name: right / max(every, 1) for name, (right, every) in counts.items()}
        if stage.answers:
            logits, labels = answer_logits(self.model, features, batch)
            right = exact_matches(logits, labels, batch)
            out["exact"] = float(right.float().mean())
            for index, kind in enumerate(self.world.KINDS):
                of_kind = right[batch["kind"] == index]
                out |= {kind: float(of_kind.float().mean())} if len(of_kind) else {}
        freeze(self.parts, stage)
        return out
