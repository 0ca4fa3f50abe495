"""Models: what one replica serves under which name, and how that changes while it serves.

A `ModelSet` says what is wanted. What is new in it is loaded beside what runs, proves itself, and only then takes its
name; what it replaces answers what it was asked and goes. Knows no HTTP and no Ray.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from seqmodels.errors import ModelDirectoryError, SeqModelsError
from serving.config import ModelSet
from serving.errors import HttpError
from serving.runner import Model, Runner

if TYPE_CHECKING:
    from seqmodels.pipeline import Pipeline

logger = logging.getLogger(__name__)

Load = Callable[[list[str]], "Pipeline"]  # of model directories; raises SeqModelsError


@dataclass(eq=False)
class ServedModel(Model):
    """A model that clients can ask, and what it was loaded as."""

    pipeline: "Pipeline"
    directories: list[str] = field(default_factory=list)
    created: int = field(default_factory=lambda: int(time.time()))  # in seconds since 1970

    @property
    def task(self) -> str:
        return self.pipeline.task

    @property
    def revision(self) -> str:
        return self.pipeline.revision


class Models:
    """The models of one replica. `apply` belongs to one thread at a time; the rest may be called by any."""

    def __init__(self, runner: Runner[ServedModel], load: Load) -> None:
        self.wanted: ModelSet | None = None  # what was last applied
        self.aliases: dict[str, str] = {}
        self.refused: dict[str, str] = {}  # name -> why what was last wanted under it is not served
        self.runner = runner
        self._load = load
        self._changing = threading.Lock()

    @property
    def served(self) -> dict[str, ServedModel]:
        """By name."""
        return self.runner.models

    def of_tasks(self, tasks: Sequence[str]) -> list[ServedModel]:
        return [model for model in self.served.values() if model.task in tasks]

    def find(self, name: str | None, tasks: Sequence[str]) -> ServedModel:
        """The model of that name or alias or, without one, the only one with such a task. Raises HttpError."""
        served = self.served
        fitting = {known: model for known, model in served.items() if model.task in tasks}
        if name is None and len(fitting) == 1:
            return next(iter(fitting.values()))
        choices = ", ".join(fitting) or "none"
        if name is None:
            message = f"model is missing; models that this endpoint can use here: {choices}"
            raise HttpError(400 if fitting else 404, message, "model_required" if fitting else "no_model", "model")
        model = served.get(self.aliases.get(name, name))
        if model is None:
            message = f"no model of that name is served here; models for this endpoint: {choices}"
            raise HttpError(404, message, "model_not_found", "model")
        if model.name not in fitting:
            message = f"that model has another task, {model.task}; models for this endpoint: {choices}"
            raise HttpError(400, message, "wrong_task", "model")
        return model

    def apply(self, wanted: ModelSet) -> None:
        """Serve what is wanted, and nothing else; takes as long as loading does.

        A model that cannot be loaded, or is not of the wanted revision, is refused, and then nothing goes that could
        be asked before: neither what had its name, nor another that is no longer wanted, nor an alias. At the first
        call alone, when there is nothing that could go on, this raises what the model was refused for.
        """
        with self._changing:
            first = not self.served
            refused: dict[str, str] = {}
            for name, directories in wanted.directories.items():
                try:
                    self._serve(name, directories, wanted.revisions.get(name))
                except Exception as error:
                    if first:
                        raise
                    told = isinstance(error, SeqModelsError)
                    refused[name] = str(error) if told else f"it failed to load: {type(error).__name__}"
                    logger.error("model refused: %s: %s", name, refused[name], exc_info=None if told else error)
            aliases = {alias: name for alias, name in wanted.aliases.items() if name in self.served}
            if refused:  # a name that is still served is no alias, whether it was one before or would be one now
                aliases = {alias: name for alias, name in (self.aliases | aliases).items() if alias not in self.served}
            self.aliases = aliases
            self.refused = refused
            self.wanted = wanted
            for name in self.served:
                if name not in wanted.models and not refused:
                    self.runner.let_go(name)

    def refuse(self, error: SeqModelsError) -> None:
        """Note that what was wanted is no ModelSet; raise it where there is nothing that could go on."""
        if not self.served:
            raise error
        self.refused = {"user_config": str(error)}
        logger.error("user_config refused: %s", error)

    def _serve(self, name: str, directories: list[str], revision: str | None) -> None:
        """revision: what the directories must hold; anything where None."""
        served = self.served.get(name)
        if served is not None and served.directories == directories and revision in (None, served.revision):
            return
        pipeline = self._load(directories)
        if revision not in (None, pipeline.revision):
            raise ModelDirectoryError(
                f"{', '.join(directories)}: the revision is {pipeline.revision}, but {revision} is wanted; copy that "
                "one there, or leave revisions out"
            )
        self.runner.serve(ServedModel(name, pipeline, directories=directories))

    def report(self) -> dict[str, Any]:
        """What is served, as plain data, for whoever operates the service."""
        return {
            "wanted": self.wanted and self.wanted.model_dump(mode="json"),
            "revisions": {name: model.revision for name, model in self.served.items()},
            "aliases": self.aliases,
            "refused": self.refused,
        }
