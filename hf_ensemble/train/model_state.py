"""What trainers leave on a model beside its parameters: wrapped forwards, hooks, modes, marks."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

# Dictionaries of `nn.Module` that hold what a model consists of. Adapters are added to them while a run goes on.
_STRUCTURE = ("_parameters", "_buffers", "_modules")
# States whose blocks are open, the innermost last. Trainings at once, each in a thread, have their own.
_OPEN: ContextVar[tuple["ModelState", ...]] = ContextVar("open_states", default=())


class ModelState:
    """Attributes, hooks, modes and trainability of every module of a model, as they are now.

    A trainer wraps the model's forward in autocast, patches a fused head onto it, enables gradient checkpointing with
    hooks on the embeddings, and marks the model as prepared. All of it outlives the trainer, so the next one would not
    find the model that the first one found.

    Args:
        model (`nn.Module`): the model. Parameters and buffers are not copied.
        origin (`ModelState`, *optional*): the state of the same run's model, where this one is of a copy of it.
    """

    def __init__(self, model: nn.Module, origin: "ModelState | None" = None):
        self.model = model
        self.origin = origin
        self.record()

    def record(self) -> None:
        """Take the model as it is now for its state; not within a block, where a trainer may have prepared it."""
        model = self.model
        self._modules = [(weakref.ref(module), _attributes(module)) for module in model.modules()]
        self._trainable = [(weakref.ref(parameter), parameter.requires_grad) for parameter in model.parameters()]
        configs = (getattr(model, name, None) for name in ("config", "generation_config"))
        self._configs = [(config, dict(vars(config))) for config in configs if config is not None]

    def restore(self) -> None:
        """Put everything back. Modules and parameters that were added since are left alone."""
        for reference, attributes in self._modules:
            module = reference()
            if module is not None:
                _restore_attributes(module, attributes)
        for reference, requires_grad in self._trainable:
            parameter = reference()
            if parameter is not None:
                parameter.requires_grad_(requires_grad)
        for config, values in self._configs:
            for name in set(vars(config)) - set(values):
                delattr(config, name)
            vars(config).update(values)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The state holds when the block begins and again when it ends, also after an exception.

        A block within another one of the same model is an interlude: when it ends, the model is what it found.
        """
        opened = _OPEN.get()
        is_interlude = any(own.model is self.model for own in opened)
        after = ModelState(self.model) if is_interlude else self
        token = _OPEN.set((*opened, self))
        self.restore()
        try:
            yield
        finally:
            _OPEN.reset(token)
            after.restore()

    def at_work(self) -> "ModelState | None":
        """The innermost state whose block is open, of this model or of a copy of it; `None` between blocks."""
        return next((own for own in reversed(_OPEN.get()) if self in (own, own.origin)), None)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: (value, dict(value)) if _is_hooks(name, value) else (value, None)
        for name, value in vars(module).items()
        if name not in _STRUCTURE
    }


def _restore_attributes(module: nn.Module, attributes: dict[str, Any]) -> None:
    own = vars(module)
    for name in set(own) - set(attributes) - set(_STRUCTURE):
        del own[name]
    for name, (value, content) in attributes.items():
        own[name] = value
        if content is not None:
            # In place: the handles that remove hooks refer to the dictionary itself.
            value.clear()
            value.update(content)


def _is_hooks(name: str, value: Any) -> bool:
    return "hooks" in name and isinstance(value, dict)
